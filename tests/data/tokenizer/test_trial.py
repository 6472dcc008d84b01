"""Tokenizers and templates that take too much time or memory are ended elsewhere, and named here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from job.data.tokenizer.file_check import TEXTS
from job.data.tokenizer.trial import Trial
from job.runtime.errors import DataError
from tests.tiny_tokenizer import backend

pytestmark = pytest.mark.process

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MEMORY_BYTES = 1 << 30


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a tokenizer.json with other parts than usual."""

    def write(**parts: Any) -> Path:
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(backend()), **parts}))
        return path

    return write


def splitting(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


def test_what_tokenizer_json_says_by_itself(written: Callable[..., Path]) -> None:
    """The ids are those of the library, with and without the tokens around a text, and with other added tokens."""
    path = written()
    alone = Tokenizer.from_file(str(path))
    text = "a </s> b"
    stripping = {"content": "</s>", "lstrip": True, "rstrip": True, "normalized": False, "special": True}
    with Trial(path, name="m") as trial:
        trial.opened()
        assert trial.encode(TEXTS) == [alone.encode(text, add_special_tokens=False).ids for text in TEXTS]
        assert trial.encode([text], whole=True) == [alone.encode(text).ids]
        (stripped,) = trial.encode([text], added=[stripping | {"single_word": False}])
        assert stripped == [number for part in ("a", "</s>", "b") for number in alone.encode(part).ids]
        assert trial.encode([text]) == [alone.encode(text).ids]


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        pytest.param(r"(x+x+)+y", "retry-limit-in-match over", id="the library gives up"),
        pytest.param(r"(?:x|xx){1,18}y|.", "takes more than 1 s of computing", id="the library goes on"),
    ],
)
def test_a_pattern_that_backtracks(written: Callable[..., Path], pattern: str, part: str) -> None:
    """Long runs of one character are among the samples: there such patterns show."""
    path = written(pre_tokenizer=splitting(pattern))
    with Trial(path, name="org/m", cpu_seconds=1) as trial:
        trial.opened()
        with pytest.raises(DataError, match=f"tokenizer.json of org/m cannot be used.*{part}"):
            trial.encode(TEXTS)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"version": "1.0"', b"", b"null", b'{"version":' + b"9" * 5000])
def test_a_tokenizer_that_cannot_be_opened(tmp_path: Path, content: bytes) -> None:
    """Nested, cut and other JSON is a data error that names the file and quotes the library."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with Trial(path, name="org/m") as trial, pytest.raises(DataError, match=r"tokenizer\.json of org/m cannot be op"):
        trial.opened()


@pytest.mark.parametrize(
    ("template", "part"),
    [
        pytest.param(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "1 s", id="loop"
        ),
        pytest.param("{{ lipsum(10 ** 9) }}", "1 s", marks=pytest.mark.full, id="words"),
        pytest.param("{{ 'x' * 10 ** 10 }}", "more memory", id="product"),
        pytest.param(
            "{% set n = namespace(s='x' * 1000) %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "more memory",
            id="doubling",
        ),
        pytest.param("{{ '%2000000000d' % 1 }}", "more memory", id="padding"),
        pytest.param("{{ 'x' * 2000000 }}", "2,000,000 characters of a question and its answer", id="long"),
    ],
)
def test_a_template_that_takes_too_much(template: str, part: str) -> None:
    """Time, memory and length are limited, in C code too, which nothing interrupts from inside."""
    with Trial(None, name="m", cpu_seconds=1, memory_bytes=MEMORY_BYTES) as trial:
        trial.opened()
        with pytest.raises(DataError, match=f"The chat template `file` cannot be used: .*{part}"):
            trial.render(template, SPECIAL, what="chat template `file`")


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{% if %}", id="syntax"),
        pytest.param("{{ raise_exception('system turns are not supported') }}", id="refusal"),
        pytest.param("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", id="recursion"),
        pytest.param(
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", id="marks"
        ),
        pytest.param("{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}{% break %}", id="extensions"),
    ],
)
def test_what_is_not_a_matter_of_limits(template: str) -> None:
    """What a template refuses or gets wrong is explained where it is used, with the settings in mind."""
    with Trial(None, name="m") as trial:
        trial.opened()
        trial.render(template, SPECIAL, what="template")
