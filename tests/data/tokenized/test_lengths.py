from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data.rendering.labels import IGNORED
from job.data.rendering.renderer import Renderer
from job.data.rendering.truncation import truncate
from job.data.tokenized.lengths import Lengths, LengthStatistics
from tests.data.datasets import tokenized
from tests.data.rendering.test_renderer import TALK, conversation, learned, ready, tokenizer, whole

LONG = (*TALK, ("user", "And 3?"), ("assistant", "It is three, " * 9))


def lengths_of(lengths: list[int], *, micro_batch: int = 1) -> Lengths:
    found = LengthStatistics()
    for length in lengths:
        found.add(length, ((1, length),))
        found.add_trained(length, length - 1)
    return found.summary(micro_batch=micro_batch)


def tokens_of(*turns: tuple[str, str]) -> int:
    (sequence,) = Renderer(tokenizer=tokenizer("chatml"), max_length=10**6).render(conversation(*turns))
    return len(sequence.input_ids)


@pytest.mark.parametrize("train_on", ["responses", "all"])
def test_a_conversation_that_is_too_long_ends_after_an_answer(train_on: Any) -> None:
    """Whole turns go until the rest fits, and what stays is, token for token, how the whole begins."""
    found = tokenizer("chatml")
    (complete,) = Renderer(tokenizer=found, train_on=train_on, max_length=10**6).render(conversation(*LONG))
    for limit in range(tokens_of(*TALK), complete.length - 1):
        (sequence,) = Renderer(tokenizer=found, train_on=train_on, max_length=limit).render(conversation(*LONG))
        assert sequence.outcome == "shortened"
        assert whole(found, sequence).endswith("It is two.<|im_end|>")
        assert sequence.input_ids == complete.input_ids[: len(sequence.input_ids)]
        assert sequence.labels == complete.labels[: len(sequence.input_ids)]
        assert (sequence.length, len(sequence.labels)) == (complete.length, len(sequence.input_ids))


def test_white_space_that_does_not_fit_is_no_loss() -> None:
    """A conversation that exceeds the limit only by the line end after its last end marker is not truncated."""
    (sequence,) = Renderer(tokenizer=tokenizer("chatml"), max_length=tokens_of(*TALK) - 1).render(conversation(*TALK))
    assert (sequence.outcome, len(sequence.input_ids)) == ("kept", tokens_of(*TALK) - 1)


def test_no_answer_is_learned_without_its_end_while_another_is_whole() -> None:
    """Whatever the limit: whole answers are learned, or a part of the first, or nothing."""
    found = tokenizer("chatml")
    said = [f"{text}<|im_end|>" for role, text in LONG if role == "assistant"]
    outcomes = []
    for limit in range(1, tokens_of(*LONG) + 1):
        (sequence,) = Renderer(tokenizer=found, max_length=limit).render(conversation(*LONG))
        outcomes.append(sequence.outcome)
        assert len(sequence.input_ids) <= limit
        if sequence.outcome == "masked":
            assert set(sequence.labels) <= {IGNORED}
            continue
        texts = learned(found, sequence)
        assert (texts == said[: len(texts)]) == (sequence.outcome != "cut")
        assert sequence.outcome != "cut" or (len(texts) == 1 and said[0].startswith(texts[0]))
    assert [key for key, _ in itertools.groupby(outcomes)] == ["masked", "cut", "shortened", "kept"]


def test_ready_text_is_cut_where_it_must_end() -> None:
    """Ready text has no turns: it is cut at the limit and counted as cut inside."""
    (sequence,) = Renderer(tokenizer=tokenizer("chatml"), max_length=5).render(ready("word " * 20))
    assert (sequence.outcome, len(sequence.input_ids)) == ("cut", 5)
    assert sequence.labels == [IGNORED, *sequence.input_ids[1:]]


def test_a_template_that_rewrites_turns_falls_back_to_a_plain_cut() -> None:
    """With `all`, answers that cannot be found in the whole text do not stop the run."""
    renderer = Renderer(tokenizer=tokenizer("qwen-3"), train_on="all", max_length=30)
    (sequence,) = renderer.render(conversation(*LONG))
    assert (sequence.outcome, len(sequence.input_ids)) == ("cut", 30)


def test_lost_turns_and_cut_answers_are_counted_apart(tmp_path: Path) -> None:
    """Both kinds of truncation are named with file and line, and together they are all that was truncated."""
    rows = [
        conversation(*TALK, line=1),
        conversation(*LONG, line=2),
        conversation(("user", "a"), ("assistant", "b " * 200), line=3),
        conversation(("user", "a " * 200), ("assistant", "b"), line=4),
        ready("word " * 200, line=5),
    ]
    renderer = Renderer(tokenizer=tokenizer("chatml"), max_length=tokens_of(*TALK))
    prepared = tokenized(rows, renderer=renderer, directory=tmp_path)
    counts, lengths = prepared.counts, prepared.lengths
    assert counts.lost_turns.first == ("a.jsonl:2",)
    assert counts.cut_inside.first == ("a.jsonl:3", "a.jsonl:5")
    assert counts.truncated.first == ("a.jsonl:2", "a.jsonl:3", "a.jsonl:5")
    assert counts.fully_masked.first == ("a.jsonl:4",)
    assert (lengths.sequences, counts.sequences) == (5, 4)
    assert lengths.max > counts.length_max == tokens_of(*TALK)
    labelled = sum(len(row) - row.count(IGNORED) for row in prepared.dataset["labels"])
    assert (lengths.tokens_per_epoch, lengths.labelled_tokens_per_epoch) == (counts.tokens, labelled)


intervals = st.lists(st.integers(1, 40), min_size=2, max_size=8, unique=True).map(sorted)


@settings(deadline=None, max_examples=200)
@given(borders=intervals, limit=st.integers(1, 50), behind=st.integers(0, 5))
def test_the_cut_loses_as_little_as_its_rule_allows(borders: list[int], limit: int, behind: int) -> None:
    """A cut keeps no more than the limit; it ends inside an answer only if none is whole, and no whole one is lost."""
    spans = tuple(itertools.pairwise(borders))[::2]
    length = spans[-1][1] + behind
    found = truncate(spans, length, limit)
    fits = [span for span in spans if span[1] <= limit]
    assert found.keep <= min(limit, length)
    assert (found.outcome == "masked") == (spans[0][0] >= limit)
    assert (found.outcome == "cut") == (not fits and spans[0][0] < limit)
    if fits:
        assert found.keep >= fits[-1][1]
        assert (found.outcome == "kept") == (fits == list(spans))


def test_what_each_limit_would_do_is_what_it_does(tmp_path: Path) -> None:
    """The table of limits says beforehand what a run with that TUNE_MAX_LENGTH counts."""
    chance = random.Random(1)
    rows = [
        conversation(
            *[
                turn
                for _ in range(chance.randrange(1, 10))
                for turn in (("user", "a " * chance.randrange(1, 200)), ("assistant", "b " * chance.randrange(1, 300)))
            ],
            line=line,
        )
        for line in range(1, 120)
    ]
    found = tokenizer("chatml")
    whole_ones = tokenized(rows, renderer=Renderer(tokenizer=found, max_length=10**6), directory=tmp_path)
    for limit in whole_ones.lengths.limits:
        there = tokenized(rows, renderer=Renderer(tokenizer=found, max_length=limit.max_length), directory=tmp_path)
        assert there.lengths.limits == whole_ones.lengths.limits
        assert there.counts.cut_inside.count == limit.cut
        assert there.counts.fully_masked.count == limit.masked
        assert limit.tokens_lost == whole_ones.counts.tokens - there.counts.tokens
        assert limit.labelled_tokens_lost == whole_ones.counts.labelled_tokens - there.counts.labelled_tokens
    assert all(limit.longer and limit.labelled_tokens_lost for limit in whole_ones.lengths.limits[:3])
    assert whole_ones.lengths.limits[0].masked < whole_ones.lengths.limits[0].longer


def test_percentiles_histogram_and_suggestion() -> None:
    """Nearest rank; every sequence is in one bin; the suggestion cuts at most one sequence in a hundred."""
    found = lengths_of(list(range(1, 1001)))
    assert (found.p50, found.p90, found.p99, found.max, found.mean) == (500, 900, 990, 1000, 500.5)
    assert (len(found.histogram), found.histogram_width, set(found.histogram)) == (40, 25, {25})
    assert found.suggested_max_length == 1024
    assert lengths_of([100] * 99 + [5000]).suggested_max_length == 256
    assert lengths_of([100] * 98 + [5000] * 2).suggested_max_length == 8192
    assert sum(lengths_of([7, 100_000]).histogram) == 2


def test_no_sequences_have_no_lengths() -> None:
    """An empty evaluation set has a table of zeros."""
    found = lengths_of([], micro_batch=8)
    assert (found.sequences, found.max, found.mean, found.histogram, found.padding_waste) == (0, 0, 0, (), 0)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_padding_is_what_all_possible_batches_have_on_average(size: int) -> None:
    """The share of padding is that over every batch that can be drawn."""
    lengths = [3, 9, 9, 20, 41]
    batches = list(itertools.combinations(lengths, size))
    padded = sum(max(batch) * size for batch in batches)
    waste = 1 - sum(map(sum, batches)) / padded
    assert lengths_of(lengths, micro_batch=size).padding_waste == pytest.approx(waste, abs=1e-4)
    assert lengths_of([5, 5], micro_batch=8).padding_waste == 0
