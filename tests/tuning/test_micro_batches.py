"""A batch is split: every row once, nothing over the limit; what is recorded for one length holds others."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from job.tuning.fit.micro_batches import GRAIN, PER_OCTAVE, Limit, bucket_length, bucket_sequences, split

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=12)


def flat(lengths: list[int]) -> dict[str, torch.Tensor]:
    """A padding-free batch of sequences 0 0 0, 1 1, ..."""
    ids = torch.cat([torch.full((length,), row) for row, length in enumerate(lengths)])[None]
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": ids, "position_ids": places, "packed_seq_lengths": torch.tensor(lengths, dtype=torch.int32)}


def padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    """The same, padded with -1."""
    longest = max(lengths)
    mask = torch.tensor([[1] * length + [0] * (longest - length) for length in lengths])
    ids = torch.arange(len(lengths))[:, None].expand(-1, longest)
    return {"input_ids": torch.where(mask == 1, ids, -1), "attention_mask": mask}


@given(LENGTHS, st.integers(1, 13), st.one_of(st.none(), st.integers(1, 200)))
def test_flat_micro_batches_hold_every_sequence_once_and_in_order(lengths, rows, tokens):
    """Put together they are the batch again; each keeps to its limit, unless a single sequence is longer."""
    batch, limit = flat(lengths), Limit(rows=rows, tokens=tokens)
    parts = list(split(batch, limit))
    for name, values in batch.items():
        assert torch.equal(torch.cat([part[name] for part in parts], dim=-1), values)
    for part in parts:
        held = part["packed_seq_lengths"].tolist()
        assert sum(held) == part["input_ids"].shape[1]
        assert len(held) == 1 or (len(held) <= rows if tokens is None else sum(held) <= tokens)


@given(LENGTHS, st.integers(1, 13))
def test_padded_micro_batches_hold_every_row_once_and_no_column_of_padding(lengths, rows):
    """Rows of similar length are together, and no micro-batch is wider than its longest row."""
    parts = list(split(padded(lengths), Limit(rows=rows)))
    seen = sorted(int(row[0]) for part in parts for row in part["input_ids"])
    assert seen == list(range(len(lengths)))
    for part in parts:
        own = part["attention_mask"].sum(dim=1)
        assert len(own) <= rows
        assert part["input_ids"].shape[1] == own.max()
        assert torch.equal(part["input_ids"] >= 0, part["attention_mask"] == 1)
    narrow = [part["input_ids"].shape[1] for part in parts]
    assert narrow == sorted(narrow, reverse=True)


@given(st.integers(1, 200_000))
def test_few_lengths_hold_all(tokens):
    """A recorded length has room for a token of padding, and for little more than an eighth."""
    size = bucket_length(tokens)
    assert size > tokens
    assert size % GRAIN == 0
    assert size - tokens <= max(GRAIN, size / PER_OCTAVE)


def test_how_many_lengths_are_recorded():
    """From 2,048 to 16,383 tokens, three octaves, there are 8 in each."""
    assert len({bucket_length(tokens) for tokens in range(2048, 16_383)}) == 3 * PER_OCTAVE


@given(st.integers(2, 5000), st.integers(1, 700), st.integers(1, 40))
def test_a_bucket_has_all_tokens_and_the_longest_sequence_possible(total, longest, rows):
    """It has two different lengths at least, so that it is never taken for one sequence."""
    lengths = bucket_sequences(total, longest=longest, rows=rows)
    assert sum(lengths) == total
    assert max(lengths) == min(longest, total - 1)
    assert len(lengths) > rows
    assert lengths[0] == max(lengths)


@pytest.mark.parametrize(("rows", "count"), [(1, 3), (2, 2), (3, 1), (8, 1)])
def test_rows(rows, count):
    """The number of micro-batches is what one would expect."""
    assert len(list(split(flat([5, 5, 5]), Limit(rows=rows)))) == count
    assert len(list(split(padded([5, 5, 5]), Limit(rows=rows)))) == count
