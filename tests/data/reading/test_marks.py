"""Keys by which other trainers say what is learned are followed or rejected; whatever nothing reads is listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.data.reading.dataset import MOST_UNREAD, ExampleStream, Source
from job.data.reading.fields import InvalidError
from job.data.reading.formats import parse_row
from job.data.reading.marks import LEARNED


def talk(*first: dict[str, Any], **row: Any) -> dict[str, Any]:
    """A conversation of two answers; the first messages are as given."""
    usual = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bad"}]
    said = [usual[at] | one for at, one in enumerate((*first, *({},) * (2 - len(first))))]
    return {"messages": [*said, {"role": "user", "content": "c"}, {"role": "assistant", "content": "good"}], **row}


def read(row: dict[str, Any], format: str = "messages") -> Any:  # noqa: A002 - the domain's word
    return parse_row(row, format=format, source="a.jsonl", line=1)


def refused(row: dict[str, Any], format: str = "messages") -> InvalidError:  # noqa: A002
    with pytest.raises(InvalidError) as caught:
        read(row, format)
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("key", LEARNED)
@pytest.mark.parametrize("value", [0, 1, True, False, 1.0])
def test_a_mark_is_followed_in_messages(key: str, value: Any) -> None:
    """0 and false make an answer context, 1 and true change nothing."""
    answers = [turn for turn in read(talk({}, {key: value})).turns if turn.role == "assistant"]
    assert [turn.trained for turn in answers] == [bool(value), True]


def test_torchtunes_mark_means_the_opposite() -> None:
    """`masked` says that a message is not learned; marks of several tools may agree."""
    turns = read(talk({"masked": True}, {"masked": True, "train": False})).turns
    assert [turn.trained for turn in turns] == [True, False, True, True]
    assert "contradict" in str(refused(talk({}, {"masked": True, "train": True})))


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"mask": 0}, "`mask` is 0"),
        ({"mask": 1}, "`mask` is 1"),
        ({"ignore": True}, "`ignore` is True"),
        ({"loss_mask": [0, 1]}, "`loss_mask` marks parts"),
        ({"train_detail": [{"begin_offset": 0}]}, "`train_detail` marks parts"),
        ({"weight": 0.5}, "neither 0 nor 1"),
        ({"trainable": "no"}, "neither 0 nor 1"),
        ({"prefix": True}, "`prefix` marks the beginning"),
        ({"partial": True}, "`partial` marks the beginning"),
        ({"content": [{"type": "text", "text": "a", "train": False}]}, "`train` marks parts"),
        ({"content": [{"type": "text", "text": "a", "mask": 1}]}, "`mask` marks parts"),
        ({"channel": "analysis"}, "its channel is 'analysis'"),
        ({"image": "a.png"}, "the message has `image`"),
        ({"images": ["aGk="]}, "the message has `images`"),
        ({"audio": {"id": "1"}}, "the message has `audio`"),
        ({"tools": [{"name": "f"}]}, "`tools` inside a message"),
        ({"functions": [{"name": "f"}]}, "`functions` inside a message"),
        ({"content": [{"type": "image_url", "image_url": {"url": "data:image/png"}}]}, "of type 'image_url'"),
        ({"content": [{"type": "input_audio", "input_audio": {}}]}, "of type 'input_audio'"),
        ({"content": [{"type": "thinking", "thinking": "hm"}]}, "of type 'thinking'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_followed_is_rejected(message: dict[str, Any], says: str) -> None:
    """In the words of the key, with a remedy, instead of being learned as if it was not there."""
    assert says in str(refused(talk({}, message)))


@pytest.mark.parametrize(
    "message",
    [
        {"ignore": False},
        {"mask": None},
        {"weight": None},
        {"prefix": False},
        {"channel": "final"},
        {"images": []},
        {"image": ""},
        {"tools": None},
        {"content": [{"type": "output_text", "text": "bad", "train": True}]},
    ],
    ids=str,
)
def test_what_says_nothing_is_accepted(message: dict[str, Any]) -> None:
    """A key without a value, or one whose value is what is done anyway."""
    assert [turn.trained for turn in read(talk({}, message)).turns] == [True] * 4


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (talk(trainable=False), "`trainable` is false"),
        (talk(loss_mask=0), "`loss_mask` is false"),
        (talk(train_on_turn=False), "`train_on_turn` is false"),
        (talk(masked=True), "`masked` is true"),
        (talk(ignore=True), "`ignore` is True"),
        (talk(mask="Assistant"), "`mask` is 'Assistant'"),
        (talk(loss_scale=0.3), "`loss_scale` 0.3"),
        (talk(sample_weight=2), "`sample_weight` 2"),
        (talk(completion_mask=[0, 1]), "a mark for each token"),
        (talk(assistant_masks=[0, 1]), "a mark for each token"),
        (talk(image="a.png"), "the row has `image`"),
        (talk(video_path="a.mp4"), "the row has `video_path`"),
        (talk(audio={"bytes": "x", "path": None}), "the row has `audio`"),
        (talk(documents=[{"text": "d"}]), "the row has `documents`"),
        (talk(chat_template_kwargs={"enable_thinking": True}), "the row has `chat_template_kwargs`"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_rows_are_judged_by_the_same_keys(row: dict[str, Any], says: str) -> None:
    """A row that another tool would leave out, weigh, or give a picture to is not learned as it stands."""
    assert says in str(refused(row))


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("question_answer", {"question": "What is this?", "answer": "A heron.", "image": "a.jpg"}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "?"}], "image": "a.jpg"}),
        ("alpaca", {"instruction": "?", "output": "!", "image_path": "a.jpg"}),
    ],
    ids=["question_answer", "sharegpt", "alpaca"],
)  # fmt: skip
def test_a_picture_is_missed_in_every_format(format: str, row: dict[str, Any]) -> None:  # noqa: A002
    """The model would learn to answer about pictures that it never saw."""
    assert "only text is trained on" in str(refused(row, format))


def test_functions_are_tools_in_every_conversation() -> None:
    """OpenAI's older `functions`, as a list or as JSON text."""
    said = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    for functions in ([{"name": "f"}], '[{"name": "f"}]'):
        tools = [{"type": "function", "function": {"name": "f"}}]
        assert list(read({"conversations": said, "functions": functions}, "sharegpt").tools) == tools
        assert list(read(talk(functions=functions)).tools) == tools


def test_what_nothing_reads_is_counted(tmp_path: Path) -> None:
    """By file: columns, keys of messages and of their parts, in how many rows they have a value; marks are no such."""
    rows = [
        talk({"id": "m1", "score": 3}, {"score": 1, "weight": 1}, id=1, label=True, source=None),
        talk(
            {"id": ""}, {"content": [{"type": "text", "text": "b", "cache_control": {"type": "x"}}]}, id=2, label="good"
        ),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = ExampleStream([Source(name="a.jsonl", path=path)])
    assert len(list(stream)) == 2
    assert stream.facts[0].unread == {
        "id": 2,
        "label": 1,
        "messages[].id": 1,
        "messages[].score": 1,
        "messages[].content[].cache_control": 1,
    }
    assert len(list(stream)) == 2
    assert len(stream.facts) == 1


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"question": "q", "answer": "a", "context": "c"}, {"context": 1}),
        ({"instruction": "i", "output": "o", "input": "n", "system": "s", "history": []}, {}),
        ({"text": "t", "image": "a.png", "messages": "m"}, {"image": 1, "messages": 1}),
        ({"prompt": "p", "completion": "c", "tools": []}, {}),
    ],
    ids=["context", "alpaca", "text", "prompt"],
)
def test_columns_are_read_by_format(row: dict[str, Any], unread: dict[str, int], tmp_path: Path) -> None:
    """A column that another format reads is listed where this one does not."""
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    format_ = "text" if "text" in row else "auto"
    stream = ExampleStream([Source(name="a.jsonl", path=tmp_path / "a.jsonl")], format=format_)
    assert len(list(stream)) == 1
    assert stream.facts[0].unread == unread


def test_a_table_of_many_columns_lists_the_most_frequent(tmp_path: Path) -> None:
    """The list is bounded, and begins with what most rows have."""
    rows = [{"text": "a", "always": 1, **{f"c{line}-{n}": 1 for n in range(99)}} for line in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = ExampleStream([Source(name="a.jsonl", path=tmp_path / "a.jsonl")])
    assert len(list(stream)) == 9
    assert len(stream.facts[0].unread) == MOST_UNREAD
    assert next(iter(stream.facts[0].unread.items())) == ("always", 9)
