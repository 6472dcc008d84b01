"""The model card: what the adapter is, in the format that the Hugging Face hub reads (YAML header, Markdown).

It holds no clock and no host, so that two attempts that finish the same run write the same bytes.
"""

from __future__ import annotations

import json
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
        """The whole card."""
        return "\n".join([*self._header(), *self._body()]) + "\n"

    def _header(self) -> list[str]:
        on_hub = "://" not in self.base and not self.base.startswith("/")
        name = [f"base_model: {json.dumps(self.base.partition('@')[0])}"] if on_hub else []
        return ["---", "library_name: peft", "pipeline_tag: text-generation", *name, "tags: [lora]", "---", ""]

    def _load(self) -> list[str]:
        """How to load the base as it was in training: an adapter fits the weights that it was trained on."""
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
    text = (
        f"{value:.6g}"
        if isinstance(value, float)
        else ", ".join(value)
        if isinstance(value, (tuple, list))
        else str(value)
    )
    return text.replace("|", "\\|").replace("\n", " ")
