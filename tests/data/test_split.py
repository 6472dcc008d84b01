"""A row's side depends on its content alone, or on the user's files."""

from __future__ import annotations

from itertools import compress

from hypothesis import given
from hypothesis import strategies as st

from job.data.examples import Example, content_key
from job.data.split import is_held_out, split_by_content, split_by_files


def example(content: str, line: int = 1) -> Example:
    return Example(source="a", line=line, format="text", text=content)


Sides = tuple[list[Example], list[Example], str]


def parted(examples: list[Example], fraction: float) -> Sides:
    """The rows of both sides, and the note."""
    found = split_by_content([content_key(one) for one in examples], fraction=fraction)
    return list(compress(examples, found.train)), list(compress(examples, found.held_out)), found.note


@given(contents=st.lists(st.text(max_size=3), min_size=2, max_size=60), extra=st.lists(st.text(max_size=3)))
def test_the_split_is_stable_and_never_shares_a_duplicate(contents: list[str], extra: list[str]) -> None:
    """A row's side depends on its key alone: duplicates stay together, and added rows move none."""
    found = parted([example(content) for content in contents], fraction=0.3)
    more = parted([example(content) for content in contents + extra], fraction=0.3)
    train, evaluation = ({row.text for row in side} for side in found[:2])
    assert not train & evaluation
    assert len(found[0]) + len(found[1]) == len(contents)
    if found[1]:
        assert train <= {row.text for row in more[0]}
        assert evaluation <= {row.text for row in more[1]}


def test_the_split_takes_about_the_fraction_and_keeps_the_order() -> None:
    """The hash spreads rows evenly, and both sides keep the order of the files."""
    train, evaluation, _ = parted([example(str(n), line=n) for n in range(4000)], fraction=0.05)
    assert 150 <= len(evaluation) <= 250
    assert [row.line for row in train] == sorted(row.line for row in train)
    assert all(is_held_out(content_key(row), 0.05) for row in evaluation)


def test_too_few_rows_for_an_evaluation_are_all_trained_on() -> None:
    """An empty side is never made; the note says why there is no evaluation."""
    train, evaluation, note = parted([example("a"), example("a")], fraction=0.000001)
    assert (len(train), evaluation) == (2, [])
    assert "leaves one side empty" in note
    assert parted([example("a")], fraction=1.0)[0]
    assert parted([example("a")], fraction=0)[2] == ""


def test_files_of_the_users_own_are_the_split() -> None:
    """No row is moved from one of the user's files to the other."""
    found = split_by_files(train_rows=2, held_out_rows=1)
    assert (found.train, found.held_out) == (b"\1\1\0", b"\0\0\1")
