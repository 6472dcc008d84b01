"""A small file that claims to be large is rejected before it takes memory, disk or time."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.corpus import parquet, table
from tests.jobs import ROOT

pytestmark = pytest.mark.process
TEXT = "a" * 10_000_000
QUESTION = {"question": "a", "answer": "b"}


def shared(rows: int) -> Any:
    """One text of 10 MB for all rows, stored once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, "int32")), pa.array([TEXT]))


def written(content: Any, **how: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(content, out, compression="zstd", **how)
    return out.getvalue()


def plain_schema(content: bytes) -> bytes:
    """Without Arrow's own schema, which would say that a column is a dictionary."""
    return content.replace(b"ARROW:schema", b"ARROW.schema")


def lists(lengths: list[int], values: Any) -> Any:
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), values)


def messages(rows: int, turns: int) -> Any:
    roles = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows * turns, "int32")), pa.array(["assistant"]))
    return lists([turns] * rows, pa.StructArray.from_arrays([roles, shared(rows * turns)], ["role", "content"]))


def varint(number: int) -> bytes:
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def many(row_groups: int, columns: int) -> bytes:
    """A file that is only a footer: it claims row groups and columns without saying anything about them."""
    root = b"\x48\x04root\x15" + varint(2) + b"\x00"
    leaf = b"\x15" + varint(12) + b"\x25" + varint(2) + b"\x18\x01a\x00"
    group = b"\x19\xfc" + varint(columns) + b"\x26\x00\x00" * columns + b"\x16\x00\x16\x00\x00"
    footer = b"\x15\x04\x19\x2c" + root + leaf + b"\x16\x00\x19\xfc" + varint(row_groups) + group * row_groups + b"\x00"
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def lying_page() -> bytes:
    """A page whose header claims two gigabytes."""
    content = table(pa.table({"text": ["a" * 100]}))
    header = content.index(b"\x15", 4)  # the first page's: type, then the size
    start = content.index(b"\x15", header + 1)
    end = start + 1
    while content[end] & 128:
        end += 1
    size = varint(2 * (2**31 - 1))
    # The footer stays where it is said to be: the data grow over the end of the first value.
    grown = content[:start] + b"\x15" + size + content[end + 1 :]
    cut = len(grown) - len(content)
    body = grown.index(b"aaaa")
    return grown[:body] + grown[body + cut :]


def deep(levels: int) -> bytes:
    return b'{"text": ' + b"[" * levels + b"]" * levels + b"}\n"


BOMBS: dict[str, tuple[Any, str]] = {
    # Parquet
    "shared.parquet": (lambda: written(pa.table({"text": shared(2000)})), "more than"),
    "shared-plain.parquet": (lambda: plain_schema(written(pa.table({"text": shared(2000)}))), "more than"),
    "turns.parquet": (lambda: written(pa.table({"messages": messages(400, 2)})), "more than"),
    "turns-plain.parquet": (lambda: plain_schema(written(pa.table({"messages": messages(400, 2)}))), "more than"),
    "one-row.parquet": (lambda: plain_schema(written(pa.table({"messages": messages(1, 1000)}))), "more than"),
    "list.parquet": (
        lambda: written(
            pa.table({"text": ["x"], "ids": lists([18_000_000], pa.array(np.zeros(18_000_000, "int8")))})
        ),
        "column ids",
    ),
    "long-row.parquet": (
        lambda: written(pa.table({"text": ["x"], "ids": lists([5_000_000], pa.array(np.zeros(5_000_000, "int8")))})),
        "row 1 has",
    ),
    "nulls.parquet": (lambda: written(pa.table({"text": pa.nulls(2_000_000, pa.string())})), "2,000,000 rows"),
    "page.parquet": (
        lambda: written(pa.table({"text": pa.array(["b" * 269_000_000])}), use_dictionary=False), "column text: a page"
    ),
    "lying-page.parquet": (lying_page, "column text: a page"),
    "beginnings.parquet": (
        lambda: written(
            pa.table({"text": pa.array([TEXT] * 60)}), use_dictionary=False,
            column_encoding={"text": "DELTA_BYTE_ARRAY"},
        ),
        "more than",
    ),
    "columns.parquet": (lambda: parquet([{f"c{number}": 1 for number in range(10_100)}]), "10,000 columns"),
    "footer.parquet": (lambda: many(10_000, 100), "too many parts"),
    "packed.parquet.zst": (lambda: zstandard.compress(b"PAR1" + bytes(1 << 28)), "decompressed"),
    "packed.parquet.gz": (lambda: gzip.compress(b"PAR1" + bytes(1 << 27)), "decompressed"),
    # JSON
    "line.jsonl.zst": (lambda: zstandard.compress(b'{"text": "' + b"a" * (1 << 27) + b'"}\n'), "longer than 64 MiB"),
    "blank.jsonl.zst": (lambda: zstandard.compress(b"\n" * (1 << 27)), "are blank"),
    "spaces.json.zst": (lambda: zstandard.compress(b"[" + b" " * (1 << 27) + b"]"), "decompressed"),
    "frames.jsonl.zst": (lambda: zstandard.compress(b'"' + b"a" * (1 << 24) + b'"\n') * 5, "decompressed"),
    "deep.jsonl": (lambda: deep(1_000_000), "nested too deeply"),
    "deep.json": (lambda: b"[" * 1_000_000 + b"]" * 1_000_000, "deep.json"),
    "digits.jsonl": (lambda: b'{"text": ' + b"9" * 1_000_000 + b"}\n", "digits"),
    "digits.json": (lambda: b'[{"text": ' + b"9" * 1_000_000 + b"}]", "digits"),
    "keys.jsonl": (
        lambda: json.dumps({**{f"k{number}": 1 for number in range(300_000)}}).encode(), "match none of the formats"
    ),
    # CSV
    "cell.csv.zst": (lambda: zstandard.compress(b'text\n"' + b"a" * (1 << 27) + b'"\n'), "longer than 64 MiB"),
    "lines.csv.zst": (lambda: zstandard.compress(b'text\n"' + (b"a" * 99 + b"\n") * (1 << 20) + b'"\n'), "longer than"),
    "columns.csv": (lambda: ",".join(f"c{number}" for number in range(10_100)).encode() + b"\n", "10,100 columns"),
}  # fmt: skip
GOOD: dict[str, tuple[Any, int]] = {
    "small.parquet": (lambda: parquet([QUESTION]), 1),
    "repeated.jsonl.gz": (lambda: gzip.compress(json.dumps(QUESTION).encode() + b"\n" + b"\n" * 900_000), 1),
    "long-texts.parquet": (
        lambda: written(pa.table({"text": [f"{number} {'ab' * 500_000}" for number in range(40)]})), 40
    ),
    "wide-window.parquet": (
        lambda: written(pa.table({"text": ["x"] * 2000, "ids": lists([512] * 2000, pa.array(np.arange(512 * 2000)))})),
        2000,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """What became of each file, in one process for all."""
    directory = tmp_path_factory.mktemp("bombs")
    for name, (make, _) in (BOMBS | GOOD).items():
        (directory / name).write_bytes(make())
    files = [str(directory / name) for name in ("small.parquet", *BOMBS, *GOOD)]
    command = [sys.executable, "-m", "tests.data.reading.bombs", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    yield {line["file"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(found: dict[str, dict[str, Any]], name: str) -> None:
    """The error is that of the data, names the file and says why; memory and disk were enough."""
    assert found[name].get("code") == 65, found[name]
    assert name in found[name]["message"]
    assert BOMBS[name][1] in found[name]["message"]
    assert found[name]["remedy"]


@pytest.mark.parametrize("name", GOOD)
def test_what_is_no_bomb(found: dict[str, dict[str, Any]], name: str) -> None:
    """Rows that are long, or compress well, are read."""
    assert found[name].get("rows") == GOOD[name][1], found[name]
