"""What the configurations next to a tokenizer say: `tokenizer_config.json`, `config.json`, `generation_config.json`.

Each function takes the directory with a model's files, and the model's name for messages. A file that is not there says
nothing; DataError is raised for one that is not a JSON object.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from job.inputs.model_files import (
    CONFIG,
    GENERATION_CONFIG,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    read_object,
)
from job.runtime.errors import DataError


def class_name(directory: Path, name: str) -> str:
    """The class that a tokenizer is to be of, and where that is said."""
    for file in (TOKENIZER_CONFIG, CONFIG):
        if asked := _said(directory, file, name).get("tokenizer_class"):
            return f"{asked} ({file})"
    return f"that transformers has for it (model_type in {CONFIG})"


def check_versions(directory: Path, name: str) -> None:
    """Raise DataError if there is a `tokenizer.json` for each of several versions of transformers."""
    if _said(directory, TOKENIZER_CONFIG, name).get("fast_tokenizer_files") not in (None, [TOKENIZER]):
        raise DataError(
            f"tokenizer_config.json of {name} names other files than tokenizer.json (fast_tokenizer_files), and each "
            "version of transformers takes another of them.",
            remedy="Set TUNE_MODEL to a copy without this key.",
        )


def embedding_rows(directory: Path, name: str) -> int | None:
    """How many tokens the model has embeddings for; None if that is not said."""
    config = _said(directory, CONFIG, name)
    text = config.get("text_config") or config
    rows = text.get("vocab_size") if isinstance(text, dict) else None
    return rows if type(rows) is int else None


def stop_ids(directory: Path, name: str) -> tuple[int, ...]:
    """The tokens that end generation by `eos_token_id` of the generation configuration: one number or several."""
    given = _said(directory, GENERATION_CONFIG, name).get("eos_token_id")
    listed = given if isinstance(given, list) else [given]
    return tuple(number for number in listed if type(number) is int and number >= 0)


def template_notes(directory: Path, name: str) -> tuple[str, ...]:
    """A note where there are two chat templates, of which transformers takes the first."""
    file, other = directory / TEMPLATE, _said(directory, TOKENIZER_CONFIG, name).get("chat_template")
    if file.exists() and isinstance(other, str) and other.strip() != file.read_text(errors="replace").strip():
        return ("the model has two chat templates: chat_template.jinja is used, not that of tokenizer_config.json",)
    return ()


def _said(directory: Path, file: str, name: str) -> dict[str, Any]:
    return read_object(directory / file, name) if (directory / file).exists() else {}
