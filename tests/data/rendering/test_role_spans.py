"""TUNE_ROLE_WEIGHTS: what may be asked for, which tokens weigh what, and that the loss is the one by hand."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as forall
from hypothesis import settings
from hypothesis import strategies as st

from job.config import role_weights, rules
from job.config.schema import SETTINGS, Config
from job.data.examples import Example, RowError, Turn
from job.data.rendering.labels import IGNORED, Rendered
from job.data.rendering.renderer import Renderer
from job.data.tokenizer.load import Tokenizer, wrap_tokenizer
from job.runtime.errors import DataError
from tests import model_templates as real
from tests.data.datasets import tokenized
from tests.jobs import ROOT
from tests.tiny_tokenizer import DATE, MARKERS, tiny

WEIGHTS = {"assistant": 1.0, "user": 0.5, "system": 0.25, "tool": 0.125}
ENDS = {  # what stands behind a turn that also ends answers, where the template has one for every role
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama-2": "",
    "llama-3": "<|eot_id|>",
    "llama-3.1": "<|eot_id|>",
    "mistral": "",
    "phi-3": "<|end|>",
    "qwen-2.5": "<|im_end|>",
    "qwen-3": "<|im_end|>",
    "zephyr": "</s>",
}
TALK = (("user", "What is 1?"), ("assistant", "It is one."), ("user", "And 2?"), ("assistant", "It is two."))
TOOLS = (*TALK[:2], ("tool", "[3, 4]"), ("tool", "[5]"), ("assistant", "They are."))


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    return wrap_tokenizer(tiny(bos="<s>"), chat_template=name, date=DATE)


def conversation(*turns: tuple[str, str], line: int = 1) -> Example:
    said = tuple(Turn(role=role, content=content) for role, content in turns)
    return Example(source="a.jsonl", line=line, format="messages", turns=said)


def render(name: str, *turns: tuple[str, str], **more: Any) -> list[Rendered]:
    return Renderer(tokenizer=tokenizer(name), **{"weights": WEIGHTS, **more}).render(conversation(*turns))


def stretches(name: str, sequence: Rendered, weight: float) -> list[str]:
    """The text of neighbouring tokens of one weight."""
    found: list[list[int]] = []
    open_ = False
    for token, own in zip(sequence.input_ids, sequence.weights or [], strict=True):
        if own == weight:
            found = [*found[:-1], [*found[-1], token]] if open_ else [*found, [token]]
        open_ = own == weight
    return [tokenizer(name).hf.decode(ids) for ids in found]


def config(**values: Any) -> Config:
    return Config(model="o/n", dataset=("s3://bucket/rows",), output="s3://bucket/runs", **values)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("assistant=1,tool=0.2,user=0.1", {"assistant": 1.0, "tool": 0.2, "user": 0.1}),
        ("assistant=0, user=1", {"assistant": 0.0, "user": 1.0}),
        ("assistant=.5", {"assistant": 0.5}),
    ],
)
def test_weights_are_read(text: str, weights: dict[str, float]) -> None:
    """Roles with numbers are read as they are written."""
    kind = next(setting.kind for setting in SETTINGS if setting.name == "role_weights")
    pairs = kind.field.deserialize(text)
    assert role_weights.by_role(pairs) == weights
    assert rules.problems(config(role_weights=pairs)) == []


@pytest.mark.parametrize(
    "text", ["assistant", "robot=1", "assistant=-1", "assistant=nan", "assistant=1e9999", "user:1"]
)
def test_other_words_are_rejected(text: str) -> None:
    """Unknown roles, and weights other than numbers from 0 on, are rejected."""
    kind = next(setting.kind for setting in SETTINGS if setting.name == "role_weights")
    with pytest.raises(Exception, match="does not match"):
        kind.field.deserialize(text)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        pytest.param({"role_weights": ("assistant=1", "assistant=2")}, "a role twice", id="twice"),
        pytest.param({"role_weights": ("user=1",)}, "Add assistant=1", id="no assistant"),
        pytest.param({"role_weights": ("assistant=0", "user=0")}, "nothing to learn", id="all zero"),
        pytest.param({"role_weights": ("assistant=1",), "train_on": "all"}, "TUNE_TRAIN_ON=all", id="all"),
        pytest.param({"role_weights": ("assistant=1",), "train_on": "last_response"}, "last_response", id="last"),
        pytest.param({"role_weights": ("assistant=1",), "format": "text"}, "TUNE_FORMAT=text", id="text"),
    ],
)
def test_contradictions_are_rejected(values: dict[str, Any], says: str) -> None:
    """Weights that leave something open, or that another variable contradicts, are one problem that says which."""
    (problem,) = rules.problems(config(**values))
    assert says in problem


def test_equal_weights_are_a_mask() -> None:
    """Only ratios count: if all learned roles weigh the same, there are no weights, and each token counts 1."""
    assert role_weights.learned(("assistant=0.3", "user=0.3", "tool=0")) == {"assistant": 1.0, "user": 1.0}
    assert role_weights.learned(("assistant=1", "user=0.5")) == {"assistant": 1.0, "user": 0.5}
    assert role_weights.held_out({"assistant": 0.2, "user": 1.0}) == {"assistant": 1.0}
    assert role_weights.held_out({"user": 1.0, "tool": 0.5}) == {"user": 1.0, "tool": 1.0}


@pytest.mark.parametrize("name", ENDS)
def test_each_role_weighs_what_it_should(name: str) -> None:
    """In every template exactly the text of each turn, with its end marker, has its role's weight."""
    sequences = render(name, ("system", "Be brief."), *TALK)
    end = ENDS[name]
    system = end if name not in {"gemma", "mistral", "llama-2"} else ""  # they write it into the first question
    said = [text for sequence in sequences for text in stretches(name, sequence, 0.5)]
    assert [text.removeprefix(" ") for text in said] == [f"What is 1?{end}", f"And 2?{end}"]
    assert [text for sequence in sequences for text in stretches(name, sequence, 0.25)] == [f"Be brief.{system}"]
    assert sum(len(stretches(name, sequence, 1.0)) for sequence in sequences) == 2


@pytest.mark.parametrize("name", ["chatml", "llama-3", "llama-3.1", "phi-3", "qwen-2.5", "qwen-3", "zephyr"])
def test_tools_weigh_what_they_should(name: str) -> None:
    """What tools returned has its weight, also where the template groups it, or writes it as JSON."""
    end = "" if name in {"qwen-2.5", "qwen-3", "llama-3.1"} else ENDS[name]
    found = [text for sequence in render(name, *TOOLS) for text in stretches(name, sequence, 0.125)]
    assert found == [f"[3, 4]{end}", f"[5]{end}"]


@pytest.mark.parametrize("name", ENDS)
def test_weights_change_nothing_else(name: str) -> None:
    """Token ids are those without weights, and so are the labels of answers; labels are where weights are."""
    plain = Renderer(tokenizer=tokenizer(name)).render(conversation(*TALK))
    for with_weights, without in zip(render(name, *TALK), plain, strict=True):
        assert with_weights.input_ids == without.input_ids
        own = [
            label if weight == 1.0 else IGNORED
            for label, weight in zip(with_weights.labels, with_weights.weights or [], strict=True)
        ]
        assert own == without.labels
        assert [label != IGNORED for label in with_weights.labels] == [w > 0 for w in with_weights.weights or []]


texts = st.lists(
    st.one_of(
        st.sampled_from([*MARKERS, "\n", " ", "\ue000", "\ue001", "user", "{{ x }}"]), st.text("ab é", max_size=4)
    ),
    min_size=1,
    max_size=5,
).map("".join)


@settings(deadline=None, max_examples=150)
@forall(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), name=st.sampled_from(["chatml", "qwen-3"]))
def test_no_content_moves_a_weight(turns: list[tuple[str, str]], name: str) -> None:
    """Whatever a question says, markers included, it alone has its weight, each question once."""
    said = [turn for asked, told in turns for turn in (("user", asked), ("assistant", told))]
    found = [text for sequence in render(name, *said) for text in stretches(name, sequence, 0.5)]
    assert found == [f"{asked}<|im_end|>" for asked, _ in turns if asked.strip()]


@pytest.mark.parametrize("name", ["mistral-v3", "mistral-nemo", "qwen-3"])
def test_a_template_that_moves_a_turn_is_weighed_too(name: str) -> None:
    """Where the system turn stands in the last question alone, answers alone are what a mask gives, and each role's
    turns are found in the piece that has them."""
    found, row = real.tokenizer(name), conversation(("system", "Be brief."), *TALK)
    masks = [one.labels for one in Renderer(tokenizer=found).render(row)]
    alone = Renderer(tokenizer=found, weights={"assistant": 1.0}).render(row)
    assert [one.labels for one in alone] == masks
    weighed = Renderer(tokenizer=found, weights={"assistant": 1.0, "user": 0.5}).render(row)
    said = [
        [token for token, weight in zip(one.input_ids, one.weights or [], strict=True) if weight == 0.5]
        for one in weighed
    ]
    assert [real.decoded(found, ids).strip().removesuffix("<|im_end|>") for ids in said] == ["What is 1?", "And 2?"]


def test_a_role_that_cannot_be_found_is_an_invalid_row() -> None:
    """Where a template leaves a turn's text out, the message names the template, the role and the place."""
    with pytest.raises(RowError, match=r"a\.jsonl:1: the template `alpaca` .* content of turn 1 .* system turns"):
        render("alpaca", ("system", "Be brief."), *TALK)
    render("alpaca", ("system", "Be brief."), *TALK, weights={"assistant": 1.0, "user": 0.5})
    with pytest.raises(RowError, match="ready text has no roles"):
        Renderer(tokenizer=tokenizer("chatml"), weights=WEIGHTS).render(
            Example(source="a", line=1, format="text", text="b")
        )


@pytest.mark.parametrize("length", [8, 17, 30, 2048])
def test_the_counts_are_sums_of_the_weights(tmp_path: Path, length: int) -> None:
    """What the report says of roles adds up to the weights in the file, whatever was cut off."""
    rows = [conversation(*TALK, line=1), conversation(("system", "Be."), *TOOLS, line=2)]
    renderer = Renderer(tokenizer=tokenizer("chatml"), weights=WEIGHTS, max_length=length)
    prepared = tokenized(rows, renderer=renderer, directory=tmp_path)
    weights = [weight for row in prepared.dataset["weights"][:] for weight in row]
    assert sum(prepared.counts.weight_by_role.values()) == pytest.approx(sum(weights), abs=1e-3)
    assert prepared.counts.labelled_tokens == sum(weight > 0 for weight in weights)
    assert [len(row) for row in prepared.dataset["weights"][:]] == prepared.dataset["length"][:]


def test_a_mask_writes_the_very_file_of_one(tmp_path: Path) -> None:
    """Weights that are a mask write the bytes of the mask; others a column more, which is part of the digest."""
    found = {}
    for name, pairs in {
        "none": (),
        "mask": ("assistant=0.3", "user=0"),
        "both": ("assistant=1", "user=1"),
        "half": ("assistant=1", "user=0.5"),
        "less": ("assistant=1", "user=0.4"),
    }.items():
        renderer = Renderer(tokenizer=tokenizer("chatml"), weights=role_weights.learned(pairs) or None)
        found[name] = tokenized([conversation(*TALK)], renderer=renderer, directory=tmp_path / name)
    files = {name: (tmp_path / name / "train.arrow").read_bytes() for name in found}
    assert files["none"] == files["mask"]
    assert ["weights" in one.dataset.column_names for one in found.values()] == [False, False, False, True, True]
    assert found["both"].dataset["labels"][:] == found["half"].dataset["labels"][:]
    assert len({one.digest for one in found.values()}) == 4


def test_nothing_to_learn_is_an_error(tmp_path: Path) -> None:
    """Rows in which no role that weighs anything speaks leave nothing to train on."""
    renderer = Renderer(tokenizer=tokenizer("chatml"), weights={"tool": 1.0})
    with pytest.raises(DataError, match=r"Nothing to train on: .* none is longer than") as caught:
        tokenized([conversation(*TALK)], renderer=renderer, directory=tmp_path)
    assert "TUNE_ROLE_WEIGHTS" in caught.value.remedy
    assert "Raise" not in caught.value.remedy


def test_loss_and_gradients_are_those_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    """Loss and gradients of a step are those computed by hand, however the step is cut into micro-batches; and weights
    that are all but 1, which take the weighted way, give those of the ordinary way."""
    rows = tmp_path / "rows.jsonl"
    talks = [TALK[:2], TOOLS, (*TALK, ("user", "Go on."), ("assistant", "A long answer. " * 4)), TALK]
    rows.write_text(
        "".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in talk]}) + "\n" for talk in talks)
    )
    ways = ["assistant=1,tool=0.2,user=0.1", "assistant=1,tool=1,user=1", "assistant=1,tool=1,user=1.000001"]
    command = [sys.executable, "-m", "tests.by_hand", str(tiny_model), str(rows), "--weights", *ways]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"weights"')]
    assert [(one["weights"], one["micro_batch"]) for one in found] == [(w, m) for w in ways for m in (4, 2, 1)], done
    assert [one["weighted"] for one in found] == [True] * 3 + [False] * 3 + [True] * 3
    for one in found:
        assert one["loss"] == pytest.approx(one["loss_by_hand"], rel=1e-5)
        assert one["gradients_off"] < 0.01  # bf16: a row alone is multiplied in another order than a padded one
    assert found[0]["gradients_off_without_weights"] > 0.1
