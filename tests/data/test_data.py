"""One pass over the files gives the same as each side alone, reports all errors, and needs little memory."""

import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

import pytest
import structlog

from job.config import role_weights
from job.config.schema import Config
from job.data import prepare
from job.data.examples import Example
from job.data.reading import dataset
from job.data.rendering.renderer import Renderer
from job.data.split import EvaluationSplit
from job.data.tokenized import draft
from job.data.tokenized.arrow import TokenizedDataset
from job.data.tokenizer.load import load_tokenizer
from job.inputs.pull import Inputs
from job.runtime.errors import ConfigError, DataError
from tests.data.datasets import tokenized
from tests.data.quality.test_quality import pulled
from tests.tiny_tokenizer import DATE, tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with only a tokenizer."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny().save_pretrained(directory)
    return directory


def config(**settings: Any) -> Config:
    return Config(**{"model": "/m", "dataset": ("/d",), "output": "/o", "chat_template": "chatml", **settings})


def talk(number: int) -> list[tuple[str, str]]:
    """Some are too long for 120 tokens, some hold a special token, some hold a call's result."""
    first = [("user", f"{number} <|im_end|>" if number % 7 == 0 else f"Count to {number}."), ("assistant", f"{number}")]
    return [*first, ("user", "And on. " * (number % 9)), ("tool", f"t{number}"), ("assistant", "ok " * (number % 40))]


def write(path: Path, talks: list[list[tuple[str, str]]]) -> Path:
    rows = ({"messages": [{"role": role, "content": content} for role, content in one]} for one in talks)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def given(model: Path, train: Path, held_out: Path | None = None) -> Inputs:
    return replace(pulled(train, held_out), model=model)


def alone(asked: Config, model: Path, examples: list[Example], weights: Any, directory: Path) -> TokenizedDataset:
    """One side by itself."""
    loaded = load_tokenizer(model, chat_template=asked.chat_template, date=DATE)
    renderer = Renderer(tokenizer=loaded, max_length=asked.max_length, overlong=asked.overlong, weights=weights)
    return tokenized(examples, renderer=renderer, directory=directory, micro_batch=asked.rows_in_pass)


def compared(one: TokenizedDataset) -> tuple[Any, ...]:
    columns = {name: one.dataset[name][:] for name in one.dataset.column_names}
    return columns, one.counts, one.lengths, one.digest


WAYS = {
    "kept": {},
    "truncated": {"max_length": 120},
    "dropped": {"max_length": 120, "overlong": "drop"},
    "weights": {"max_length": 120, "role_weights": ("assistant=1", "user=0.5", "tool=0.2")},
    "user_only": {"role_weights": ("assistant=0", "user=1", "tool=0.5")},
    "one_weight": {"role_weights": ("assistant=0.3",)},
}


@pytest.mark.parametrize("own", [False, True], ids=["split", "own"])
@pytest.mark.parametrize("way", WAYS)
def test_each_side_is_as_if_rendered_by_itself(model: Path, tmp_path: Path, way: str, own: bool) -> None:
    """Tokens, labels, weights, counts, lengths and digest of both sides, for a split and for the user's own files; a
    second way, reading first and rendering then, gives the same."""
    asked = config(eval_fraction=0.3, samples=2, **WAYS[way])
    path = write(tmp_path / "a.jsonl", [talk(number) for number in range(150)])
    held_out = write(tmp_path / "b.jsonl", [talk(number) for number in range(300, 340)]) if own else None
    inputs = given(model, path, held_out)
    found = prepare.prepare(asked, inputs, directory=tmp_path / "one")

    read = prepare.read(asked, inputs)
    rows = list(dataset.ExampleStream([dataset.Source(name=path.name, path=path)]))
    rows += list(dataset.ExampleStream([dataset.Source(name=held_out.name, path=held_out)])) if held_out else []
    weights = role_weights.learned(asked.role_weights) or None
    train = alone(asked, model, list(compress(rows, read.split.train)), weights, tmp_path / "train")
    shown = list(compress(rows, read.split.held_out))
    evaluation = alone(
        asked, model, shown, role_weights.held_out(weights) if weights else None, tmp_path / "evaluation"
    )
    assert found.evaluation is not None
    assert compared(found.train) == compared(train)
    assert compared(found.evaluation) == compared(evaluation)
    assert (found.train.counts.rows, found.evaluation.counts.rows) == (sum(read.split.train), len(shown))
    assert found.prompts[0].reference == shown[0].turns[-1].content
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == ["evaluation.arrow", "train.arrow"]

    again = prepare.render(asked, inputs, read, directory=tmp_path / "two")
    assert again.evaluation is not None
    assert (again.train.digest, again.evaluation.digest) == (train.digest, evaluation.digest)
    assert (again.findings, again.files, again.prompts) == (found.findings, found.files, found.prompts)


def test_the_digest_does_not_depend_on_chunks(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of the contents and their order alone."""
    talks = [talk(number) for number in range(60)]
    inputs = [given(model, write(tmp_path / f"{n}.jsonl", some)) for n, some in enumerate((talks, talks[::-1]))]
    found = []
    for name, value in (("CHUNK", 1024), ("CHUNK", 7), ("CHUNK_CHARACTERS", 300)):
        monkeypatch.setattr(draft, name, value)
        found.append(prepare.prepare(config(eval_fraction=0), inputs[0], directory=tmp_path / "out").train.digest)
    assert len(set(found)) == 1
    assert prepare.prepare(config(eval_fraction=0), inputs[1], directory=tmp_path / "out").train.digest != found[0]


def test_rejected_rows_of_both_sides_are_reported_together(model: Path, tmp_path: Path) -> None:
    """Whichever side they would be on; and no draft and no dataset is left."""
    bad = [[("assistant", f"{number}"), ("user", "a"), ("assistant", "b")] for number in range(12)]
    path = write(tmp_path / "a.jsonl", [[("user", "a"), ("assistant", "b")], *bad])
    with pytest.raises(DataError, match=r"12 of 13 rows are invalid, the first ten:\na\.jsonl:2: ") as caught:
        prepare.prepare(
            config(chat_template="gemma", eval_fraction=0.5), given(model, path), directory=tmp_path / "out"
        )
    assert len(caught.value.message.splitlines()) == 11
    assert list((tmp_path / "out").iterdir()) == []


def test_rows_that_cannot_be_read_end_the_pass(model: Path, tmp_path: Path) -> None:
    """They are reported as by reading, in either file, and no file is left."""
    path = write(tmp_path / "a.jsonl", [talk(number) for number in range(30)])
    broken = tmp_path / "b.jsonl"
    broken.write_text('{"messages": []}\n' + path.read_text() + "no\n")
    for inputs in (given(model, broken), given(model, path, broken)):
        with pytest.raises(DataError, match=r"2 of 32 rows are invalid:\nb\.jsonl:1: .*\nb\.jsonl:32: not JSON"):
            prepare.prepare(config(), inputs, directory=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_fail_ends_the_pass_before_a_set_is_made(model: Path, tmp_path: Path) -> None:
    """TUNE_QUALITY=fail looks at what was found before anything can be trained on."""
    path = write(tmp_path / "a.jsonl", [*map(talk, range(1, 30)), [("user", "Who?"), ("assistant", "")]])
    with pytest.raises(DataError, match="TUNE_QUALITY=fail"):
        prepare.prepare(config(quality="fail"), given(model, path), directory=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_validate_head_reports_mistakes_in_the_first_rows(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An invalid row among the first is reported with all others of the file; a later one is left to `prepare`."""
    monkeypatch.setattr(dataset, "HEAD_ROWS", 20)
    good = write(tmp_path / "good.jsonl", [talk(number) for number in range(40)])
    early, late = tmp_path / "early.jsonl", tmp_path / "late.jsonl"
    early.write_text('{"messages": []}\n' + good.read_text() + "no\n")
    late.write_text(good.read_text() + "no\n")
    prepare.validate_head(config(), given(model, late))
    for inputs in (given(model, early), given(model, good, early)):
        with pytest.raises(DataError, match="2 of 42 rows are invalid"):
            prepare.validate_head(config(), inputs)
    short = write(tmp_path / "short.jsonl", [talk(1)])
    with pytest.raises(ConfigError, match="no row has `reply`"):
        prepare.validate_head(config(columns=("messages=reply",), format="messages"), given(model, short))


def test_a_draft_holds_no_texts_in_memory(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the chunks in flight are in memory, however many rows there are."""
    monkeypatch.setattr(draft, "CHUNK", 8)
    renderer = Renderer(tokenizer=load_tokenizer(model, chat_template="chatml", date=DATE))
    path = write(tmp_path / "a.jsonl", [[("user", "a " * 2000), ("assistant", f"{number}")] for number in range(400)])
    rows = list(dataset.ExampleStream([dataset.Source(name=path.name, path=path)]))

    def passing(count: int) -> Iterator[Example]:
        for row in rows[:count]:
            yield replace(row, turns=tuple(replace(turn, content=turn.content + " ") for turn in row.turns))

    def peak(count: int) -> int:
        tracemalloc.start()
        with draft.Draft(tmp_path / "out") as drafted:
            drafted.add(passing(count), renderer)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(50)
    assert peak(400) < 5_000_000  # three chunks of 8 rows; all texts would be twice that, their tokens ten times


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_an_evaluation_of_which_nothing_is_left(model: Path, tmp_path: Path, overlong: str) -> None:
    """With evaluation files it is an error; with a split, counts and a finding remain, and the log says that nothing is
    evaluated."""
    short = [[("user", f"Count to {number}."), ("assistant", f"{number}")] for number in range(40)]
    long = [("user", "word " * 300), ("assistant", "ok")]
    asked = config(eval_fraction=0.2, max_length=100, overlong=overlong)
    held_out = write(tmp_path / "b.jsonl", [long])
    with pytest.raises(DataError, match="Nothing to evaluate: of 1 rows") as caught:
        prepare.prepare(asked, given(model, write(tmp_path / "a.jsonl", short), held_out), directory=tmp_path / "own")
    assert "TUNE_EVAL_DATASET" in caught.value.remedy

    train = write(tmp_path / "c.jsonl", short)
    sides = prepare.read(asked, given(model, train)).split.held_out
    grown = [
        [("user", "word " * 300 + one[0][1]), one[1]] if side else one for one, side in zip(short, sides, strict=True)
    ]
    inputs = given(model, write(tmp_path / "c.jsonl", grown))
    read = prepare.read(asked, inputs)
    read = replace(read, split=EvaluationSplit(held_out=sides, note=""))
    with structlog.testing.capture_logs() as said:
        found = prepare.render(asked, inputs, read, directory=tmp_path / "split")
    assert found.evaluation is None
    assert found.held_out is not None
    assert found.held_out.rows == sum(sides)
    code = {"truncate": "fully_masked", "drop": "dropped_overlong"}[overlong]
    (finding,) = [one for one in found.all_findings() if "evaluation" in one.message]
    assert (finding.code, finding.count) == (code, sum(sides))
    (reason,) = [line["reason"] for line in said if line["event"] == "evaluation_disabled"]
    assert f"{sum(sides)} held-out rows" in reason


def test_log_lines_of_the_pass(model: Path, tmp_path: Path) -> None:
    """Findings are logged before `dataset_ready`, which counts both sides."""
    path = write(tmp_path / "a.jsonl", [*map(talk, range(30)), talk(3)])
    with structlog.testing.capture_logs() as lines:
        prepare.prepare(config(eval_fraction=0.3), given(model, path), directory=tmp_path / "out")
    assert {line["event"] for line in lines[:-1]} == {"data_quality"}
    ready = lines[-1]
    assert (ready["event"], ready["rows"] + ready["eval_rows"], ready["duplicates"]) == ("dataset_ready", 31, 1)


DROPS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("quality", ["warn", "fail", "off"])
def test_what_is_not_learned_is_judged(model: Path, tmp_path: Path, quality: str) -> None:
    """A part of an answer that the template drops is a warning before `dataset_ready`, and ends a run under `fail`;
    every held-out row is held against its labels, too."""
    talks = [[("user", f"What is {n} + {n}?"), ("assistant", f"<think>{n} twice.</think>{2 * n}")] for n in range(40)]
    inputs = replace(given(model, write(tmp_path / "a.jsonl", talks)), template_text=DROPS_THOUGHTS)
    asked = config(quality=quality, eval_fraction=0.3)
    with structlog.testing.capture_logs() as lines:
        if quality == "fail":
            with pytest.raises(DataError, match="answers_not_learned"):
                prepare.prepare(asked, inputs, directory=tmp_path / "out")
            return
        found = prepare.prepare(asked, inputs, directory=tmp_path / "out")
    assert lines[-1]["event"] == "dataset_ready"
    assert lines[-1]["answers_not_learned"]["count"] + lines[-1]["evaluation"]["answers_not_learned"]["count"] == 40
    warned = [line for line in lines if line.get("code") == "answers_not_learned"]
    assert len(warned) == (2 if quality == "warn" else 0)
    assert [one.code for one in found.losses()] == ["answers_not_learned"] * 2
