"""A result has the base model's own tokenizer files; only what the run has changed is changed in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.data.tokenizer.chat_template import bundled_template
from job.data.tokenizer.load import Tokenizer, load_tokenizer
from job.tuning.export.tokenizer import write_tokenizer
from tests import model_templates
from tests.tiny_tokenizer import DATE, tiny

pytestmark = pytest.mark.process

# Written as transformers 4 does: what 5 makes of these keys, 4.57 does not load (a class that it does not know, and a
# list of extra tokens where it wants an object).
SETTINGS: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": None,
    "additional_special_tokens": ["<|im_start|>", "<|user|>"],
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1000000000000000019884624838656,
    "padding_side": "left",
    "chat_template": bundled_template("chatml"),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model's directory, in a form of its own."""
    directory = tmp_path / "base"
    directory.mkdir()
    tiny(eos="<|im_end|>").backend_tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    (directory / "tokenizer_config.json").write_text(json.dumps(SETTINGS, indent=4) + "\n\n")
    (directory / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>", "lstrip": false}}')
    (directory / "tokenizer.model").write_bytes(b"for other programs")
    (directory / "vocab.json").write_bytes(b"{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "config.json").write_bytes(b'{"model_type": "llama"}')
    return directory


def written(base: Path, tmp_path: Path, **options: Any) -> tuple[Tokenizer, Path]:
    found = load_tokenizer(base, date=DATE, **options)
    directory = tmp_path / "result"
    directory.mkdir()
    write_tokenizer(found, directory, base=base)
    return found, directory


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def settings(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "tokenizer_config.json").read_text())
    return found


def test_unchanged_files_are_the_same_bytes(base: Path, tmp_path: Path) -> None:
    """Everything of the tokenizer, also what only other programs read; neither weights nor the model's settings."""
    more = base / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("{{ messages }}")
    (base / "chat_template.jinja").write_bytes(bundled_template("chatml").replace("\n", "\r\n").encode())
    _, directory = written(base, tmp_path)
    not_copied = ("model.safetensors", "config.json")
    assert contents(directory) == {name: data for name, data in contents(base).items() if name not in not_copied}


def test_a_corrected_eos_is_written_where_it_stood(base: Path, tmp_path: Path) -> None:
    """An EOS that opens turns is replaced in both files, in the form that each has it in; the rest stays."""
    (base / "tokenizer_config.json").write_text(json.dumps(SETTINGS | {"eos_token": "<|im_start|>"}))
    (base / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_start|>", "lstrip": false}}')
    found, directory = written(base, tmp_path)
    assert found.hf.eos_token == "<|im_end|>"
    assert settings(directory) == SETTINGS
    assert json.loads((directory / "special_tokens_map.json").read_text()) == {
        "eos_token": {"content": "<|im_end|>", "lstrip": False}
    }
    assert load_tokenizer(directory, date=DATE).notes == ()


@pytest.mark.parametrize("options", [{"chat_template": "zephyr"}, {"template_text": bundled_template("zephyr")}])
def test_another_template_takes_the_place_of_the_old_one(base: Path, tmp_path: Path, options: dict[str, str]) -> None:
    """Both where transformers looks first and where the old one stood; others for the same model are left out."""
    more = base / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("{{ messages }}")
    found, directory = written(base, tmp_path, **options)
    assert settings(directory) == SETTINGS | {"chat_template": found.template}
    assert (directory / "chat_template.jinja").read_text() == found.template
    assert not (directory / more.name).exists()
    again = load_tokenizer(directory, date=DATE)
    assert (again.template, again.notes) == (found.template, ())


def test_the_class_of_a_tokenizer_that_is_as_its_file_says(tmp_path: Path) -> None:
    """Where the base's class would make other tokens, or stands in config.json only, the result names one that every
    version of transformers knows."""
    directory = tmp_path / "base"
    directory.mkdir()
    hf = model_templates.tokenizer("llama-2").hf
    hf.backend_tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    found, result = written(directory, tmp_path)
    assert found.of_file
    assert settings(result) == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    assert load_tokenizer(result, date=DATE).encode(" a <s> b").ids == found.encode(" a <s> b").ids


def test_a_class_that_only_the_model_says(base: Path, tmp_path: Path) -> None:
    """A result has no config.json of the model, so its tokenizer says the class itself."""
    said = {name: value for name, value in SETTINGS.items() if name != "tokenizer_class"}
    (base / "tokenizer_config.json").write_text(json.dumps(said))
    found, directory = written(base, tmp_path)
    assert settings(directory) == SETTINGS
    assert load_tokenizer(directory, date=DATE).encode("a b").ids == found.encode("a b").ids
