"""Which files of a dataset count is said in `check` and on the page, the same for a folder, a prefix and the hub."""

from __future__ import annotations

import io

import pytest

from job.commands.check_text import show
from tests.commands.test_check import chat, check
from tests.inputs.test_places import bucket, folder, repository  # noqa: F401 - fixtures

pytestmark = pytest.mark.process

FILES = {
    "train.jsonl": "".join(map(chat, range(20))).encode(),
    "validation.jsonl": "".join(map(chat, range(20, 24))).encode(),
    "test.jsonl": "".join(map(chat, range(30, 34))).encode(),
    "_temporary/0/task/train.jsonl": b"{not whole",
    "notes.docx": b"1",
}
LEFT_OUT = {"test.jsonl": "held out: test", "_temporary/": "working file or folder", "notes.docx": "no known file type"}


@pytest.mark.parametrize("kind", ["folder", "bucket", pytest.param("repository", marks=pytest.mark.full)])
def test_what_is_read_and_left_out_is_said(request, tiny_model, tmp_path, kind):
    """In JSON, in words and on the page."""
    uri, page = request.getfixturevalue(kind)(FILES), tmp_path / "page.html"
    named = {"model": tiny_model, "dataset": uri, "output": tmp_path / "runs", "max_length": 256}
    checked = check(tmp_path, "--report", str(page), **named)
    assert checked.code == 0, checked.found["problems"]
    top = uri.removeprefix("hf://datasets/") + "/"
    sides = {file["name"].removeprefix(top): (file["rows"], file["held_out"]) for file in checked.found["files"]}
    assert sides == {"train.jsonl": (20, False), "validation.jsonl": (4, True)}
    left_out = {one["name"].removeprefix(top): one["reason"] for one in checked.found["left_out_files"]}
    assert left_out.keys() == LEFT_OUT.keys()
    words = io.StringIO()
    show(checked.found, words)
    for name, reason in LEFT_OUT.items():
        assert reason in left_out[name]
        assert f"{top}{name}: {left_out[name]}" in words.getvalue()
        assert f"{top}{name}" in page.read_text()
    assert "validation.jsonl: 4 rows, messages, for evaluation" in words.getvalue()
