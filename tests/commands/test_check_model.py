"""`python -m job check` on models that strangers bring: what would be trained otherwise, or crash later, is 65 here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands.test_check import Checked, chat, check

pytestmark = pytest.mark.process


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def stale(model: Path) -> None:
    shutil.copy(min(model.glob("*.safetensors")), model / "model.safetensors")


def adapter(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (model / "adapter_model.safetensors").write_bytes(b"")


def overlapping(model: Path) -> None:
    shard = min(model.glob("*.safetensors"))
    data = shard.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    first, second, *_ = (name for name in header if name != "__metadata__")
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode().ljust(end - 8)
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def new_token(model: Path) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    token = content["added_tokens"][-1]
    content["added_tokens"].append({**token, "id": token["id"] + 1, "content": "number", "special": False})
    (model / "tokenizer.json").write_text(json.dumps(content))


def endless(model: Path) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (model / "chat_template.jinja").write_text(loop)


@pytest.mark.parametrize(
    ("damage", "where", "parts"),
    [
        pytest.param(stale, "model", ("model.safetensors, and", "ignore the index"), id="an older file"),
        pytest.param(adapter, "model", ("adapter_config.json", "a base model and an adapter"), id="an adapter"),
        pytest.param(overlapping, "model", ("model-00001-of-", "damaged"), id="overlapping tensors"),
        pytest.param(
            lambda model: changed(model / "config.json", hidden_size=[64]), "model", ("hidden_size=[64]",), id="a list"
        ),
        pytest.param(
            lambda model: changed(model / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast"),
            "rendering",
            ("LlamaTokenizerFast (tokenizer_config.json)", "does not do what tokenizer.json says"),
            id="another class",
        ),
        pytest.param(new_token, "rendering", ("a.jsonl:1: its token 'number' has the number 260",), id="new token"),
        pytest.param(
            lambda model: (model / "generation_config.json").write_text('{"a":' * 100_000),
            "rendering",
            ("generation_config.json", "nested too deep"),
            id="nested",
        ),
        pytest.param(
            endless, "rendering", ("rendering a question", "takes more than 20 s"), marks=pytest.mark.full, id="endless"
        ),
    ],
)
def test_a_model_that_is_not_what_it_seems(
    tiny_model: Path, tmp_path: Path, damage: Callable[[Path], None], where: str, parts: tuple[str, ...]
) -> None:
    """The code, the check that found it, and words that name the file and what is wrong."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    damage(model)
    (tmp_path / "a.jsonl").write_text("".join(map(chat, range(3))))
    settings = {"model": model, "dataset": tmp_path / "a.jsonl", "output": tmp_path / "runs", "max_length": 256}
    checked: Checked = check(tmp_path, device="cpu", eval_fraction=0, **settings)
    assert checked.code == 65, checked.found
    said = checked.problem(where)
    assert [part for part in parts if part not in said["message"]] == []
    assert said["remedy"]
