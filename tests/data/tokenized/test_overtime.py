"""A template or a tokenizer that explodes on one row ends the run with the name of that row."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from job.data.tokenized import overtime
from job.data.tokenized.overtime import OvertimeError, Watch
from tests.jobs import ROOT
from tests.tiny_tokenizer import tiny

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
LOOP = (
    "{% for m in messages %}{% if 'explode' in m.content %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
)
PATTERN = {"type": "Split", "pattern": {"Regex": "(?:Q|QQ){1,18}z|."}, "behavior": "Isolated", "invert": False}
"""Like `TooMuch` patterns, but the library does not give up at once: each place takes a while."""


def write(directory: Path, *, template: str, pattern: bool, row: str) -> None:
    directory.mkdir()
    tiny(template=template).save_pretrained(directory)
    if pattern:
        path = directory / "tokenizer.json"
        content = json.loads(path.read_text())
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [PATTERN, content["pre_tokenizer"]]}
        path.write_text(json.dumps(content))
    rows = [{"prompt": text, "completion": "A."} for text in ("fine", row, "fine")]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.process
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(
            {"template": (LOOP, False, "explode"), "escaped": (PLAIN, True, "</s>" + "Q" * 20_000)}, id="here"
        ),
        pytest.param(
            {"tokenizer": (PLAIN, True, "Q" * 20_000)}, marks=pytest.mark.full, id="in the thread that tokenises"
        ),
    ],
)
def test_a_row_that_explodes(cases: dict[str, tuple[str, bool, str]], tmp_path: Path) -> None:
    """In a template, in a text that is tokenised in parts, and in one of many texts that are tokenised at once."""
    for name, (template, pattern, row) in cases.items():
        write(tmp_path / name, template=template, pattern=pattern, row=row)
    command = [sys.executable, "-m", "tests.data.tokenized.stuck", str(tmp_path), *cases]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == cases.keys()
    for line in found.values():
        assert line["message"].startswith("rows.jsonl:2: the chat template and the tokenizer take more than 1 s")
        assert line["remedy"]


def test_only_one_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows may take long; waiting is not computing."""
    monkeypatch.setattr(overtime, "SECONDS", 0.2)
    with Watch() as watch:
        end = time.thread_time() + 0.5
        while time.thread_time() < end:
            watch.current = object()
        time.sleep(0.5)
    waiting: Future[int] = Future()
    threading.Timer(0.5, waiting.set_result, [5]).start()
    assert overtime.result(waiting) == 5


def test_a_row_that_computes_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exception comes in the middle of it, and `except Exception` does not stop it."""
    monkeypatch.setattr(overtime, "SECONDS", 0.1)

    def compute() -> None:
        with Watch() as watch:
            watch.current = object()
            while True:
                with contextlib.suppress(Exception):
                    sum(range(1000))

    with pytest.raises(OvertimeError):
        compute()
