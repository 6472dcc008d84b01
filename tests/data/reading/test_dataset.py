from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from job.data.examples import Example, Turn, content_key
from job.data.reading import files, json_stream
from job.data.reading.dataset import ExampleStream, Source
from job.runtime.errors import DataError

ROWS = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}, naïvely."} for n in range(3)]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def array(rows: list[Any]) -> bytes:
    return json.dumps(rows, indent=2).encode()


def table(rows: list[Any], delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(rows: list[Any]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def store(directory: Path, name: str, content: bytes) -> Source:
    path = directory / name.replace("/", "_")
    path.write_bytes(content)
    return Source(name=f"s3://bucket/data/{name}", path=path)


def one(directory: Path, row: Any, name: str = "a.jsonl", **how: Any) -> Example:
    (found,) = ExampleStream([store(directory, name, jsonl([row]))], **how)
    return found


def problems(directory: Path, *lines: Any, format: str = "auto") -> str:  # noqa: A002
    content = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    with pytest.raises(DataError) as caught:
        list(ExampleStream([store(directory, "a.jsonl", content.encode())], format=format))
    return caught.value.message


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        pytest.param("", bytes, id="plain"),
        pytest.param(".gz", lambda content: gzip.compress(content[:9]) + gzip.compress(content[9:]), id="gzip-members"),
        pytest.param(".zst", zstandard.compress, id="zstandard"),
    ],
)
@pytest.mark.parametrize(
    ("name", "write", "lines"),
    [
        pytest.param("a.jsonl", jsonl, [1, 2, 3], id="jsonl"),
        pytest.param("a.NDJSON", jsonl, [1, 2, 3], id="ndjson"),
        pytest.param("a.json", jsonl, [1, 2, 3], id="json-lines"),
        pytest.param("a.json", array, [2, 6, 10], id="json-array"),
        pytest.param("a.csv", lambda rows: table(rows, ","), [2, 3, 4], id="csv"),
        pytest.param("a.tsv", lambda rows: table(rows, "\t"), [2, 3, 4], id="tsv"),
        pytest.param("a.parquet", parquet, [1, 2, 3], id="parquet"),
    ],
)
def test_every_type_and_compression_gives_the_same_rows(
    tmp_path: Path,
    name: str,
    write: Callable[[list[Any]], bytes],
    lines: list[int],
    suffix: str,
    compress: Callable[[bytes], bytes],
) -> None:
    """A row's content does not depend on the file's type, and its line is where it starts."""
    stream = ExampleStream([store(tmp_path, name + suffix, compress(write(ROWS)))])
    found = list(stream)
    assert [[turn.content for turn in row.turns] for row in found] == [list(row.values()) for row in ROWS]
    assert [row.line for row in found] == lines
    assert {row.format for row in found} == {"question_answer"}
    assert (stream.facts[0].rows, stream.facts[0].format) == (3, "question_answer")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_byte_order_mark_crlf_and_blank_lines_are_accepted(tmp_path: Path, name: str) -> None:
    """What editors on other systems add changes no row, and lines are still counted as the user sees them."""
    content = (table(ROWS, ",") if name == "a.csv" else jsonl(ROWS)).replace(b"\r\n", b"\n").split(b"\n")
    content.insert(2, b"")
    found = list(ExampleStream([store(tmp_path, name, b"\xef\xbb\xbf" + b"\r\n".join(content))]))
    assert [row.turns[1].content for row in found] == [row["answer"] for row in ROWS]
    assert found[-1].line == found[0].line + 3


def test_records_of_several_lines_are_named_by_their_first(tmp_path: Path) -> None:
    """A CSV record with line ends inside quotes has the line where it starts."""
    source = store(tmp_path, "a.csv", b'question,answer\n"a\nb\nc",d\ne,f\n')
    assert [row.line for row in ExampleStream([source])] == [2, 5]


@given(
    values=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=20)), max_size=8),
    indent=st.sampled_from([None, 2]),
)
def test_an_array_read_in_small_pieces_is_the_array(values: list[dict[str, str]], indent: int | None) -> None:
    """Wherever the window's border falls, the stream gives what the standard decoder gives."""

    class OneByte(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 1, 7))

    content = json.dumps(values, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    found = list(json_stream.elements(OneByte(content), limit=10**6))
    assert [element.value for element in found] == values


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b'[{"text": "a"}, {"text": }]', "not JSON: Expecting value at line 1 column 26", id="bad value"),
        pytest.param(b'[{"text": "a"}\n{"text": "b"}]', "expected ',' or ']' at line 2 column 1", id="no comma"),
        pytest.param(b'[{"text": "a"},\n{"text": "b', "Unterminated string", id="cut in a string"),
        pytest.param(b'[{"text": "a"}', "the array is not closed", id="cut behind an element"),
        pytest.param(b'[{"text": "a"}] x', "text after the array's end", id="something behind"),
    ],
)
def test_a_damaged_array_says_where(tmp_path: Path, content: bytes, reason: str) -> None:
    """Damage in an array is an invalid row with its place, and rows before it do not hide it."""
    with pytest.raises(DataError, match="1 of 2 rows are invalid") as caught:
        list(ExampleStream([store(tmp_path, "a.json", content)]))
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("row", "format", "turns"),
    [
        pytest.param(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "messages",
            [("user", "a"), ("assistant", "b")],
            id="messages",
        ),
        pytest.param(
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                ]
            },
            "sharegpt",
            [("system", "s"), ("user", "a"), ("assistant", "b")],
            id="sharegpt",
        ),
        pytest.param(
            {"instruction": "a", "input": "i", "output": "b"},
            "alpaca",
            [("user", "a\n\ni"), ("assistant", "b")],
            id="alpaca",
        ),
        pytest.param({"instruction": "a", "output": "b"}, "alpaca", [("user", "a"), ("assistant", "b")], id="no input"),
        pytest.param(
            {"instruction": "a", "input": None, "output": "b"},
            "alpaca",
            [("user", "a"), ("assistant", "b")],
            id="null input",
        ),
        pytest.param(
            {"prompt": "a", "completion": "b"}, "prompt_completion", [("user", "a"), ("assistant", "b")], id="prompt"
        ),
        pytest.param(
            {
                "prompt": [{"role": "user", "content": "a"}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}],
            },
            "prompt_completion",
            [("user", "a"), ("assistant", "b")],
            id="conversational prompt",
        ),
        pytest.param({"question": "a", "answer": "b"}, "question_answer", [("user", "a"), ("assistant", "b")], id="qa"),
        pytest.param({"text": "a", "source": "x"}, "text", [], id="text"),
    ],
)
def test_each_format_is_known_by_its_columns(tmp_path: Path, row: Any, format: str, turns: list[Any]) -> None:  # noqa: A002
    """`auto` names the one format whose columns are there, and other columns do not matter."""
    found = one(tmp_path, row)
    assert (found.format, [(turn.role, turn.text) for turn in found.turns]) == (format, turns)
    assert found.text == ("a" if format == "text" else None)


def test_lists_may_stand_as_json_text_in_cells(tmp_path: Path) -> None:
    """A CSV file can hold conversations."""
    messages = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    (found,) = ExampleStream([store(tmp_path, "a.csv", table([{"messages": messages}], ","))])
    assert [turn.content for turn in found.turns] == ["a", "b"]


def test_tool_calls_and_tools_are_kept(tmp_path: Path) -> None:
    """What templates need to print a tool call survives, null contents included."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": None}}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    found = one(tmp_path, {"messages": turns, "tools": [{"name": "f"}]})
    assert found.turns[1].message() == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert found.tools == ({"name": "f"},)


def test_fields_that_parquet_fills_with_null_are_absent(tmp_path: Path) -> None:
    """Parquet gives each turn the keys of all; a template must not print those that the row did not have."""
    messages = [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b"}]
    (found,) = ExampleStream([store(tmp_path, "a.parquet", parquet([{"messages": messages, "text": None}]))])
    assert [turn.message() for turn in found.turns] == messages


def test_answers_inside_a_prompt_are_context(tmp_path: Path) -> None:
    """Of a conversational prompt and completion only the completion is learned."""
    said = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    found = one(tmp_path, {"prompt": said, "completion": [{"role": "assistant", "content": "y"}]})
    assert [turn.trained for turn in found.turns if turn.role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        pytest.param(
            {"text": "a", "question": "b", "answer": "c"},
            ["more than one", "question_answer needs", "text needs"],
            id="two",
        ),
        pytest.param(
            {"input": "a", "label": "b"},
            ["`input`, `label`", "none of the formats", "alpaca needs `instruction`, `output`"],
            id="none",
        ),
    ],
)
def test_an_unclear_format_is_never_guessed(tmp_path: Path, row: Any, words: list[str]) -> None:
    """Columns of two formats, or of none, end the run with the columns found, those needed, and the remedy."""
    with pytest.raises(DataError, match=r"s3://bucket/data/a\.jsonl") as caught:
        one(tmp_path, row)
    assert [word for word in words if word not in caught.value.message] == []
    assert "TUNE_FORMAT=" in caught.value.remedy


def test_the_format_that_is_set_decides(tmp_path: Path) -> None:
    """With TUNE_FORMAT set, columns of another format do not matter."""
    assert one(tmp_path, {"text": "a", "question": "b", "answer": "c"}, format="text").text == "a"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param('{"messages": [}', "not JSON: Expecting value at column 15", id="bad json"),
        pytest.param({"messages": []}, "`messages` is empty", id="empty"),
        pytest.param({"messages": "x"}, "`messages` is text, but not JSON", id="text"),
        pytest.param({"messages": 3}, "`messages` is a number, not a list", id="number"),
        pytest.param({"messages": None}, "no `messages`", id="null column"),
        pytest.param({"other": 1}, "no `messages` (columns: `other`)", id="missing column"),
        pytest.param({"messages": ["x"]}, "`messages` holds text, not an object", id="no object"),
        pytest.param(["x"], "the row is a list, not an object", id="list"),
        pytest.param({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn", id="no answer"),
        pytest.param({"messages": [{"role": "bot", "content": "a"}]}, "turn 1: role 'bot'", id="role"),
        pytest.param({"messages": [{"role": "user", "content": None}]}, "turn 1: `content` is null", id="null content"),
        pytest.param(
            {"messages": [{"role": "user", "content": 7}]}, "turn 1: `content` is a number", id="number content"
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type 'image_url'", id="image"
        ),
        pytest.param('{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate", id="surrogate"),
    ],
)
def test_an_invalid_row_is_named_with_its_reason(tmp_path: Path, row: Any, reason: str) -> None:
    """File, line and reason of a row that cannot be used are in the message; no row is dropped silently."""
    message = problems(tmp_path, {"messages": [{"role": "assistant", "content": "fine"}]}, row, format="messages")
    assert message.startswith("1 of 2 rows are invalid:\ns3://bucket/data/a.jsonl:2: ")
    assert reason in message


def test_a_sharegpt_role_that_is_unknown_is_invalid(tmp_path: Path) -> None:
    """Roles are mapped by a list; a role outside it is not taken for the user's."""
    assert "role 'narrator'" in problems(tmp_path, {"conversations": [{"from": "narrator", "value": "x"}]})


def test_ten_rows_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    """A message stays readable however many rows are bad, and rows of all files are counted together."""
    bad = store(tmp_path, "a.jsonl", jsonl([{"text": 1}] * 25))
    good = store(tmp_path, "b.jsonl", jsonl([{"text": "x"}] * 5))
    with pytest.raises(DataError) as caught:
        list(ExampleStream([bad, good]))
    head, *shown = caught.value.message.split("\n")
    assert head == "25 of 30 rows are invalid, the first ten:"
    assert [line.split(": ")[0] for line in shown] == [f"s3://bucket/data/a.jsonl:{n}" for n in range(1, 11)]


def test_a_last_line_that_was_cut_off_is_invalid(tmp_path: Path) -> None:
    """Half a row at the end is not an empty line."""
    source = store(tmp_path, "a.jsonl", jsonl([{"text": "x"}]) + b'{"text": "y')
    with pytest.raises(DataError, match="was it cut off"):
        list(ExampleStream([source]))


def test_csv_cells_must_match_the_header(tmp_path: Path) -> None:
    """A record with a cell too many is invalid, not shifted."""
    with pytest.raises(DataError, match=r"a\.csv:3: 3 cells, but the header has 2"):
        list(ExampleStream([store(tmp_path, "a.csv", b"question,answer\na,b\na,b,c\n")]))


def test_bytes_that_are_not_utf_8_are_named(tmp_path: Path) -> None:
    """A row in another encoding is invalid at its line and byte."""
    with pytest.raises(DataError, match=r"a\.jsonl:2: not UTF-8 at byte 11"):
        list(ExampleStream([store(tmp_path, "a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n')]))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("keep", [0, 20, -4])
def test_a_compressed_file_that_was_cut_off_is_noticed(tmp_path: Path, suffix: str, keep: int) -> None:
    """Half an upload is an error, not a shorter dataset."""
    content = jsonl([{"text": f"row {n}"} for n in range(500)])
    packed = gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)
    with pytest.raises(DataError, match=f"a.jsonl{suffix}"):
        list(ExampleStream([store(tmp_path, f"a.jsonl{suffix}", packed[:keep])]))


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.json.gz"])
def test_a_bomb_is_rejected_before_it_fills_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No line or element is read beyond the bound, however small it was packed."""
    monkeypatch.setattr(files, "MAX_LINE", 1 << 20)
    content = (b'[{"text": "' if ".jsonl" not in name else b'{"text": "') + b"a" * (8 << 20)
    packed = zstandard.compress(content) if name.endswith("zst") else gzip.compress(content)
    with pytest.raises(DataError, match="longer than 1 MiB"):
        list(ExampleStream([store(tmp_path, name, packed)]))


def test_a_json_file_that_is_one_object_is_rejected(tmp_path: Path) -> None:
    """A `.json` file that is neither rows by line nor an array is not guessed at."""
    with pytest.raises(DataError, match="neither an array of rows nor one row per line"):
        list(ExampleStream([store(tmp_path, "a.json", b'{\n  "data": []\n}')]))


def test_a_file_of_an_unknown_type_is_an_error(tmp_path: Path) -> None:
    """What the user names is read or rejected, never passed over; a hidden name is a name."""
    with pytest.raises(DataError, match=r"README\.md has an unknown file type"):
        list(ExampleStream([store(tmp_path, "README.md", b"{}")]))
    assert len(list(ExampleStream([store(tmp_path, "_a.jsonl", jsonl([{"text": "x"}]))]))) == 1


def test_a_dataset_without_rows_is_an_error(tmp_path: Path) -> None:
    """An empty dataset never looks like a finished one."""
    with pytest.raises(DataError, match="no rows"):
        list(ExampleStream([store(tmp_path, "a.jsonl", b"\n")]))


def test_files_have_their_own_formats_and_facts(tmp_path: Path) -> None:
    """Each file's format is found by itself, and its hash is that of the stored bytes."""
    stream = ExampleStream(
        [
            store(tmp_path, "a.jsonl", jsonl([{"text": "x"}])),
            store(tmp_path, "b.jsonl", jsonl([{"question": "x", "answer": " "}])),
        ]
    )
    assert [row.format for row in stream] == ["text", "question_answer"]
    assert [(facts.rows, facts.bytes, facts.empty_answers) for facts in stream.facts] == [(1, 14, 0), (1, 33, 1)]
    assert [facts.sha256 for facts in stream.facts] == [
        hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("a.jsonl", "b.jsonl")
    ]


def test_a_stream_can_be_iterated_again(tmp_path: Path) -> None:
    """Each time gives the same examples, and the facts are those of one time."""
    stream = ExampleStream([store(tmp_path, "a.jsonl", jsonl(ROWS)), store(tmp_path, "b.json", array([{"text": "x"}]))])
    first = list(stream)
    facts = stream.facts
    assert next(iter(stream)) == first[0]
    assert list(stream) == first
    assert stream.facts == facts


def test_the_content_key_sees_content_only() -> None:
    """The same conversation from another file, line and format has the same key; another role has not."""
    turns = (Turn(role="user", content="a"), Turn(role="assistant", content="b"))
    here = Example(source="x", line=1, format="messages", turns=turns)
    there = Example(source="y", line=9, format="sharegpt", turns=turns)
    other = Example(source="x", line=1, format="messages", turns=turns[::-1])
    assert content_key(here) == content_key(there) != content_key(other)


SIMPLE = {"question": "a", "answer": "b"}


@pytest.mark.parametrize(
    ("splits", "line"),
    [
        pytest.param(["train", "test", "train"], 2, id="test after train"),
        pytest.param(["validation", "validation", "train"], 3, id="train after validation"),
        pytest.param(["train_sft", None, "test_sft"], 3, id="with more words"),
        pytest.param(["Train", "DEV"], 2, id="capitals"),
    ],
)
def test_rows_of_two_sides_in_one_file(tmp_path: Path, splits: list[str | None], line: int) -> None:
    """A column `split` that says train and test was meant to separate the rows: nothing is learned of both.

    Seen at nprint/nprintml#40 and chemprop/chemprop#645, where tables have such a column.
    """
    found = problems(tmp_path, *({**SIMPLE, "split": split} for split in splits))
    assert f"a.jsonl:{line}: its column `split` is" in found
    assert "another side" in found


@pytest.mark.parametrize(
    "splits", [["train", "training"], ["test", "validation"], ["a", "test"], [1, "train"], ["", None]]
)
def test_a_column_split_that_says_one_side(tmp_path: Path, splits: list[Any]) -> None:
    """Rows of one side are read, whichever it is, and the column is listed as not read."""
    rows = [{**SIMPLE, "split": split} for split in splits]
    stream = ExampleStream([store(tmp_path, "a.jsonl", jsonl(rows))])
    assert len(list(stream)) == len(rows)


def test_two_files_of_two_sides(tmp_path: Path) -> None:
    """Files whose names say nothing, and whose rows do, are one side as well."""
    sources = [
        store(tmp_path, f"{name}.jsonl", jsonl([{**SIMPLE, "split": split}]))
        for name, split in (("a", "train"), ("b", "val"))
    ]
    with pytest.raises(DataError, match=r"b\.jsonl:1: its column `split` is 'val', and that of .*a\.jsonl:1"):
        list(ExampleStream(sources))
