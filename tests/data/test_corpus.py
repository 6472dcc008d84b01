"""Every file of the corpus gets its verdict, and every valid conversation is read back from every format and type."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.config.schema import COLUMNS
from job.data.examples import Example, Turn
from job.data.reading.columns import parse_columns
from job.data.reading.dataset import ExampleStream, Source
from job.data.reading.formats import FORMATS
from job.inputs.data_files import choose
from job.runtime.errors import JobError
from tests import corpus


def files(verdict: dict[str, Any]) -> list[str]:
    return verdict["file"] if isinstance(verdict["file"], list) else [verdict["file"]]


def title(verdict: dict[str, Any]) -> str:
    with_ = [f"{key}:{verdict[key]}" for key in ("format", "columns") if key in verdict]
    return " ".join(["+".join(files(verdict)), *with_])


def stream(verdict: dict[str, Any], directory: Path) -> ExampleStream:
    sources = []
    read = choose("/corpus", files(verdict)).files if len(files(verdict)) > 1 else files(verdict)
    for number, name in enumerate(name for name in files(verdict) if name in read):
        (directory / str(number)).write_bytes(corpus.content(name))
        sources.append(Source(name=name, path=directory / str(number)))
    named = parse_columns(verdict["columns"].split(",")) if "columns" in verdict else None
    return ExampleStream(sources, format=verdict.get("format", "auto"), columns=named)


@pytest.mark.parametrize("verdict", corpus.VERDICTS, ids=title)
def test_each_file_gets_its_verdict(verdict: dict[str, Any], tmp_path: Path) -> None:
    """A file is accepted with the rows and turns of the table, or rejected with places, names and remedy."""
    if "refused" in verdict:
        with pytest.raises(JobError) as caught:
            list(stream(verdict, tmp_path))
        assert (caught.value.kind, [words for words in verdict["says"] if words not in caught.value.message]) == (
            verdict["refused"],
            [],
        )
        assert caught.value.remedy.startswith(verdict["remedy"])
        return
    rows = list(stream(verdict, tmp_path))
    formats = verdict["accepted"]
    assert [corpus.shown(row) for row in rows] == verdict["reads"]
    assert [row.line for row in rows] == verdict["lines"]
    assert [row.format for row in rows] == (formats if isinstance(formats, list) else [formats] * len(rows))
    assert [len(row.tools) for row in rows] == verdict.get("tools", [0] * len(rows))


def test_every_file_has_a_verdict() -> None:
    """No file lies in the corpus without being read, and none is named that is not there."""
    assert {name for verdict in corpus.VERDICTS for name in files(verdict)} == corpus.names()


def test_no_refusal_is_without_a_remedy() -> None:
    """Every refusal of the corpus says what to do, in words that are not those for any row."""
    refused = [verdict for verdict in corpus.VERDICTS if "refused" in verdict]
    assert [title(verdict) for verdict in refused if len(verdict["remedy"]) < 15] == []
    assert [title(verdict) for verdict in refused if verdict["remedy"].startswith("Correct or remove")] == []


def test_invalid_rows_of_several_kinds_keep_all_their_remedies(tmp_path: Path) -> None:
    """Each kind of mistake among the rows shown has its remedy in the message, once."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 1}\n{"text": ""}\n{"text": 2}\n{"text": "a", "text": "b"}\n')
    with pytest.raises(JobError) as caught:
        list(ExampleStream([Source(name="a.jsonl", path=path)]))
    assert caught.value.remedy == (
        "Write it as text, in quotes. Give it a text, or remove these rows. Keep one of the two keys."
    )


def test_unicode_is_kept_as_it_is(tmp_path: Path) -> None:
    """Text is neither composed nor decomposed: the file's characters are learned."""
    row = next(iter(stream({"file": "unicode.jsonl"}, tmp_path)))
    assert [turn.content for turn in row.turns] == ["cafe\u0301 \ufb01", "café 👩\u200d👩\u200d👧 \u2028 \x00 終"]


def test_the_table_of_columns_has_those_of_all_formats() -> None:
    """TUNE_COLUMNS knows every column that a format needs."""
    assert set(COLUMNS) >= {column for known in FORMATS.values() for column in known.needs}


def test_a_column_that_only_held_out_rows_lack_is_no_error(tmp_path: Path) -> None:
    """The names are met once all training rows were read; held-out files may use the job's own names."""
    named = parse_columns(["prompt=q", "completion=a"])
    (tmp_path / "train.jsonl").write_text('{"q": "x", "a": "y"}\n')
    (tmp_path / "held-out.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    found = [
        list(ExampleStream([Source(name=name, path=tmp_path / name)], columns=named))
        for name in ("train.jsonl", "held-out.jsonl")
    ]
    assert [row.format for rows in found for row in rows] == ["prompt_completion", "question_answer"]


characters = st.characters(exclude_categories=["Cs"], exclude_characters="\x00\r")
words = st.text(characters, min_size=1, max_size=12).filter(str.strip)
conversations = st.lists(st.tuples(words, words, st.booleans()), min_size=1, max_size=3).filter(
    lambda pairs: any(learned for _, _, learned in pairs)
)


def turns(system: str | None, pairs: list[tuple[str, str, bool]]) -> tuple[Turn, ...]:
    head = (Turn(role="system", content=system),) if system else ()
    said = [(Turn(role="user", content=q), Turn(role="assistant", content=a, trained=t)) for q, a, t in pairs]
    return (*head, *(turn for pair in said for turn in pair))


def as_messages(said: tuple[Turn, ...]) -> dict[str, Any]:
    mark = {"assistant": "weight"}
    return {
        "messages": [
            {"role": t.role, "content": t.content, **({mark[t.role]: int(t.trained)} if t.role in mark else {})}
            for t in said
        ]
    }


def as_sharegpt(said: tuple[Turn, ...]) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {
        "conversations": [
            {"from": names[t.role], "value": t.content, "train": t.trained and t.role == "assistant"} for t in said
        ]
    }


def as_system_column(said: tuple[Turn, ...]) -> dict[str, Any]:
    if said[0].role != "system":
        return as_messages(said)
    return {**as_messages(said[1:]), "system": said[0].content}


def as_jsonl(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def as_array(row: dict[str, Any]) -> bytes:
    return json.dumps([row], indent=1).encode()


def as_csv(row: dict[str, Any]) -> bytes:
    """Lists stand as JSON text in the cells."""
    cells = {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
    out = io.StringIO()
    writer = csv.DictWriter(out, list(cells))
    writer.writeheader()
    writer.writerow(cells)
    return out.getvalue().encode()


def as_parquet(row: dict[str, Any]) -> bytes:
    return corpus.parquet([row])


TYPES: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "a.jsonl": as_jsonl,
    "a.json": as_array,
    "a.csv": as_csv,
    "a.parquet": as_parquet,
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that is written again and again."""
    return tmp_path_factory.mktemp("corpus") / "file"


def one(name: str, content: bytes, file: Path) -> Example:
    file.write_bytes(content)
    (row,) = ExampleStream([Source(name=name, path=file)])
    return row


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("write", [as_messages, as_sharegpt, as_system_column])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(system=st.none() | words, pairs=conversations)
def test_a_conversation_is_the_same_in_every_format_and_type(
    name: str, write: Callable[..., Any], file: Path, system: str | None, pairs: list[tuple[str, str, bool]]
) -> None:
    """Turns, texts and marks do not depend on how a conversation is written down."""
    said = turns(system, pairs)
    assert one(name, TYPES[name](write(said)), file).turns == said


@pytest.mark.parametrize("name", TYPES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=words, answer=words)
def test_a_pair_is_the_same_in_every_format_and_type(name: str, file: Path, question: str, answer: str) -> None:
    """A question with its answer says the same in all formats for pairs."""
    said = turns(None, [(question, answer, True)])
    for asked, answered in (("instruction", "output"), ("prompt", "completion"), ("question", "answer")):
        assert one(name, TYPES[name]({asked: question, answered: answer}), file).turns == said


call = {"name": "f", "arguments": {"x": [1]}}
plain = [None, True, False, 0, 1, 0.5, float("nan"), "", "a", "é", "\ud800", "user", "assistant", "system", "human"]
lists = [[], ["a"], [["a", "b"]], [{"type": "text", "text": "a"}], [call], [{"function": call}], "[]"]
objects = [{}, call, {"function": call}, {"name": "f", "arguments": "{}"}, json.dumps(call)]
values = st.sampled_from([*plain, *lists, *objects])
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "tool_call", None])},
    optional=dict.fromkeys(
        ("content", "from", "value", "tool_calls", "function_call", "weight", "train", "name"), values
    ),
)
rows = st.dictionaries(
    st.sampled_from([*COLUMNS, "images", "label", "functions", "weight"]),
    values | st.lists(message, min_size=1, max_size=3),
    max_size=4,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=rows, format=st.sampled_from(["auto", *FORMATS]))
def test_any_row_is_read_or_rejected_with_a_remedy(file: Path, row: dict[str, Any], format: str) -> None:  # noqa: A002
    """Whatever JSON a row holds, it becomes an example that can be encoded and learned from, or an error of the job's
    own kind."""
    file.write_text(json.dumps(row) + "\n")
    try:
        (found,) = ExampleStream([Source(name="a.jsonl", path=file)], format=format)
    except JobError as refusal:
        remedy, said = refusal.remedy, None
    else:
        remedy, said = "", [found.text, [turn.message() for turn in found.turns], found.tools]
        assert found.text or any(turn.role == "assistant" and turn.trained for turn in found.turns)
    assert remedy or json.dumps(said, ensure_ascii=False).encode()
