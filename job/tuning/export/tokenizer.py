"""The tokenizer of a result: the base model's own files, byte for byte, but for what the run has changed.

Saved by transformers 5, a tokenizer would not load in transformers 4: its class and its extra tokens are written in
another form.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from job.data.tokenizer.load import Tokenizer
from job.inputs.model_files import MORE_TEMPLATES, SPECIAL_TOKENS, TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_FILES

GENERIC = "PreTrainedTokenizerFast"
"""The class that does as `tokenizer.json` says; transformers 5 calls it TokenizersBackend, which 4 does not know."""


def write_tokenizer(tokenizer: Tokenizer, directory: Path, *, base: Path) -> None:
    """Copy the base's tokenizer, and change in it what the run has changed: EOS, the chat template, the class.

    Args:
        tokenizer: as it was trained with.
        directory: where to; it exists.
        base: directory of the base model.
    """
    for name in (*TOKENIZER_FILES, TEMPLATE):
        if (base / name).exists():
            shutil.copyfile(base / name, directory / name)
    if (base / MORE_TEMPLATES).is_dir() and tokenizer.name == "tokenizer":
        shutil.copytree(base / MORE_TEMPLATES, directory / MORE_TEMPLATES, dirs_exist_ok=True)
    eos, template = tokenizer.hf.eos_token, tokenizer.template
    _change(directory / SPECIAL_TOKENS, lambda said: _eos(said, eos))
    _change(directory / TOKENIZER_CONFIG, lambda said: _eos(said, eos) | _class(said, tokenizer), needed=True)
    if template is not None and tokenizer.name != "tokenizer":
        (directory / TEMPLATE).write_text(template, encoding="utf-8")
        _change(
            directory / TOKENIZER_CONFIG, lambda said: {"chat_template": template} if "chat_template" in said else {}
        )


def _change(file: Path, changes: Callable[[dict[str, Any]], dict[str, Any]], *, needed: bool = False) -> None:
    """Rewrite a file of settings if something in it changes; one that does not exist, only if it is needed."""
    said = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    changed = changes(said)
    if changed and (needed or file.exists()):
        file.write_text(json.dumps({**said, **changed}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _eos(before: dict[str, Any], eos: str) -> dict[str, Any]:
    """EOS in the form that the file has it in; nothing where it is the same, or is not said."""
    said = before.get("eos_token")
    if isinstance(said, dict):
        return {} if said.get("content") == eos else {"eos_token": {**said, "content": eos}}
    return {} if said in (None, eos) else {"eos_token": eos}


def _class(before: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The class, where the base's would not do what was trained on, or is said only in its `config.json`."""
    if tokenizer.of_file:
        return {"tokenizer_class": GENERIC}
    own = type(tokenizer.hf).__name__
    return {} if before.get("tokenizer_class") else {"tokenizer_class": GENERIC if own == "TokenizersBackend" else own}
