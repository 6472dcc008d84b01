"""The corpus of good, odd and bad input files: those under `tests/samples/`, and those that no editor can write.

`tests/samples/verdicts.yaml` has the expected result of each.
"""

import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard

SAMPLES = Path(__file__).resolve().parent / "samples"
VERDICTS: list[dict[str, Any]] = yaml.safe_load((SAMPLES / "verdicts.yaml").read_text(encoding="utf-8"))
QUESTIONS = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}."} for n in range(3)]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[Any]) -> bytes:
    return table(pa.Table.from_pylist(rows))


def table(content: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(content, out)
    return out.getvalue()


def said(answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer, **more}]}


def called(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return said("x", tool_calls=[call])


def nested(depth: int) -> Any:
    return {"x": nested(depth - 1)} if depth else 1


def unreadable(column: str) -> bytes:
    """Text that is not UTF-8 in the second row, and a date of the year 292,000 in the first."""
    columns = {"question": ["a", "c"], "answer": ["b", "d"], "more": ["e", "f"], "date": [2**63 - 1, 0]}
    columns[column][1] = b"\xff"
    made = {name: pa.array(values, pa.binary()).view(pa.string()) for name, values in columns.items() if name != "date"}
    return table(pa.table({**made, "date": pa.array(columns["date"], pa.timestamp("us"))}))


TOOLS = [json.dumps({"name": "f", "parameters": {"type": "object"}}), json.dumps({"name": "g", "parameters": {}})]
GENERATED: dict[str, Callable[[], bytes]] = {
    "gzip.jsonl.gz": lambda: gzip.compress(lines(QUESTIONS)),
    "gzip-cut.jsonl.gz": lambda: gzip.compress(lines(QUESTIONS * 200))[:-9],
    "gzip-named-so.jsonl.gz": lambda: lines(QUESTIONS),
    "zstd.json.zst": lambda: zstandard.compress(json.dumps(QUESTIONS).encode()),
    "zstd-cut.jsonl.zst": lambda: zstandard.compress(lines(QUESTIONS * 200))[:-4],
    "xz.jsonl.xz": lambda: lzma.compress(lines(QUESTIONS)),
    "bomb.jsonl.gz": lambda: gzip.compress(b'{"text": "' + b"a" * (65 << 20) + b'"}\n'),
    "long.jsonl": lambda: lines([{"text": "long " * 400_000}, {"text": "short"}]),
    "deep.jsonl": lambda: b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n",
    "huge-number.jsonl": lambda: b'{"text": "a", "id": ' + b"9" * 5000 + b"}\n",
    "utf-16.jsonl": lambda: lines(QUESTIONS).decode().encode("utf-16"),
    "utf-32.jsonl": lambda: lines(QUESTIONS).decode().encode("utf-32"),
    "utf-16.csv": lambda: "question,answer\na,b\n".encode("utf-16"),
    "turns-many.jsonl": lambda: lines(
        [said("b"), {"messages": said("b")["messages"] * 1000 + [{"role": "user", "content": "c"}]}]
    ),
    "deep-call.jsonl": lambda: lines(
        [called(nested(90)), called(nested(900)), said("b") | {"tools": [{"name": "f", "parameters": nested(900)}]}]
    ),
    "columns-many.jsonl": lambda: lines([{f"c{n}": 1 for n in range(100_000)}]),
    "key-twice-many.jsonl": lambda: (
        lines([{"text": "a"}]) + b"{" + b"".join(b'"k%d": 1, ' % n for n in range(100_000)) + b'"k99999": 2}\n'
    ),
    "latin-1.jsonl": lambda: b'{"text": "plain"}\n{"text": "caf\xe9"}\n',
    "latin-1.csv": lambda: b"question,answer\na,b\ncaf\xe9,c\n",
    "latin-1.json": lambda: b'[{"text": "plain"},\n{"text": "caf\xe9"}]\n',
    "empty.jsonl": lambda: b"",
    "empty.jsonl.gz": lambda: b"",
    "plain.parquet": lambda: parquet(QUESTIONS),
    "packed.parquet.zst": lambda: zstandard.compress(parquet(QUESTIONS)),
    "cut.parquet": lambda: parquet(QUESTIONS)[:-30],
    "named-so.parquet": lambda: lines(QUESTIONS),
    "column-twice.parquet": lambda: table(pa.table([["a"], ["b"], ["c"]], names=["question", "answer", "answer"])),
    "numbers.parquet": lambda: parquet([{"question": "1 + 1?", "answer": 2}]),
    "unreadable.parquet": lambda: unreadable("answer"),
    "unreadable-unused.parquet": lambda: unreadable("more"),
    "bytes.parquet": lambda: parquet([{"question": "1 + 1?", "answer": b"2"}]),
    "messages.parquet": lambda: parquet([said("yes", weight=1), said("no", name="Ann"), called({"x": 1})]),
    "weights.parquet": lambda: parquet([said("yes", weight=1.0), said("no", weight=0.5)]),
    "tools.parquet": lambda: parquet([{**called('{"x": 1}'), "tools": TOOLS}, {**said("b"), "tools": None}]),
}


def content(name: str) -> bytes:
    """A file of the corpus."""
    return GENERATED[name]() if name in GENERATED else (SAMPLES / name).read_bytes()


def names() -> set[str]:
    """All files of the corpus."""
    committed = {path.relative_to(SAMPLES).as_posix() for path in SAMPLES.rglob("*") if path.is_file()}
    return (committed | GENERATED.keys()) - {"verdicts.yaml", ".gitattributes"}


def shown(row: Any) -> str:
    """A row on one line: `user: a | assistant: b`; turns that are context only are in brackets."""
    if row.text is not None:
        return row.text if len(row.text) < 100 else f"{row.text[:20]}...{len(row.text)}"
    return " | ".join(_turn(turn) if turn.trained else f"({_turn(turn)})" for turn in row.turns)


def _turn(turn: Any) -> str:
    functions = [call["function"] for call in turn.tool_calls]
    calls = "".join(f" -> {one['name']}({json.dumps(one['arguments'])})" for one in functions)
    thought = f"<{turn.reasoning_content}> " if turn.reasoning_content else ""
    return f"{turn.role}: {thought}{turn.text}{calls}".replace("\n", "\\n").strip()
