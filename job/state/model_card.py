"""The model card: a description of the adapter in the hub's format, a YAML header and Markdown.

It has no time and no host, so that two attempts that finish the same run write the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts of a model card."""

    base: str
    base_revision: str | None
    base_hashes: Mapping[str, str]
    """SHA-256 by file name."""
    data: Sequence[Mapping[str, Any]]
    """name, rows, format and sha256 of each data file."""
    settings: Mapping[str, Any]
    plan: Mapping[str, Any]
    metrics: Mapping[str, Any]
    versions: Mapping[str, str]
    template: str

    def text(self) -> str:
        """The card."""
        return "\n".join([*self._header(), *self._body()]) + "\n"

    def _header(self) -> list[str]:
        from huggingface_hub import ModelCardData  # noqa: PLC0415 - it reads at import whether the process is offline

        on_hub = "://" not in self.base and not self.base.startswith("/")
        data = ModelCardData(
            base_model=self.base.partition("@")[0] if on_hub else None,
            library_name="peft",
            pipeline_tag="text-generation",
            tags=["lora"],
        )
        return ["---", data.to_yaml(), "---", ""]

    def _load(self) -> list[str]:
        """Code that loads the base as it was in training: an adapter fits the weights that it was trained on."""
        name = f'"{self.base if self.base.startswith("/") else self.base.partition("@")[0]}"'
        if "://" in self.base:
            name = '"path/of/the/base"'
        revision = f', revision="{self.base_revision}"' if self.base_revision else ""
        imports = "AutoModelForCausalLM, AutoTokenizer"
        lines = [f"# path/of/the/base: a copy of {self.base}"] if "://" in self.base else []
        if self.settings["TUNE_PRECISION"] != "4bit":
            load = [f"base = AutoModelForCausalLM.from_pretrained({name}{revision})"]
        else:
            imports += ", BitsAndBytesConfig"
            load = [
                "# Trained on the base in NF4: on the 16-bit base it answers differently, small models much worse.",
                "nf4 = BitsAndBytesConfig(",
                '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,',
                "    bnb_4bit_compute_dtype=torch.bfloat16,",
                ")",
                f"base = AutoModelForCausalLM.from_pretrained({name}{revision}, quantization_config=nf4)",
            ]
        head = ["import torch", "from peft import PeftModel", f"from transformers import {imports}", ""]
        return [*head, *lines, *load]

    def _body(self) -> list[str]:
        revision = f" at revision `{self.base_revision}`" if self.base_revision else ""
        return [
            f"# LoRA adapter for {self.base.rpartition('/')[2]}",
            "",
            f"Trained by finetune-job on `{self.base}`{revision}.",
            "",
            "## Use",
            "",
            "```python",
            *self._load(),
            'model = PeftModel.from_pretrained(base, "path/of/this/directory")',
            'tokenizer = AutoTokenizer.from_pretrained("path/of/this/directory")',
            "```",
            "",
            "## Results",
            "",
            *_table(("metric", "value"), self.metrics.items()),
            "## Data",
            "",
            *_table(
                ("file", "rows", "format", "sha256"),
                [(f["name"], f["rows"], f["format"], f"`{f['sha256']}`") for f in self.data],
            ),
            "## Base model files",
            "",
            *_table(("file", "sha256"), [(name, f"`{digest}`") for name, digest in sorted(self.base_hashes.items())]),
            f"Chat template: {self.template}.",
            "",
            "## Training",
            "",
            *_table(("setting", "value"), [*self.plan.items(), *self.settings.items()]),
            "## Versions",
            "",
            *_table(("package", "version"), self.versions.items()),
        ]


def _table(head: Sequence[str], rows: Any) -> list[str]:
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join(_cell(cell) for cell in row) for row in rows]
    return [*(f"| {line} |" for line in lines), ""]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        text = f"{value:.6g}"
    elif isinstance(value, tuple | list):
        text = ", ".join(value)
    else:
        text = str(value)
    return text.replace("|", "\\|").replace("\n", " ")
