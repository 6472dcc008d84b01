"""Which ends of earlier attempts count, and when there were too many."""

import json
from dataclasses import replace

import pytest

from job.observability.memory import Evidence
from job.runtime.errors import PermanentError
from job.runtime.process import Process
from job.state.attempts import Attempts
from job.storage.open import open_store

GIB = 1 << 30
SHORT = Evidence(
    running_out=True,
    limit_of="container",
    limit_bytes=16 * GIB,
    in_use_bytes=int(15.5 * GIB),
    peak_in_use_bytes=int(15.9 * GIB),
    own_bytes=15 * GIB,
    oom_kills=0,
)
ENOUGH = replace(SHORT, running_out=False, in_use_bytes=8 * GIB)


@pytest.fixture
def runs(tmp_path):
    """Attempts at one run, in a directory."""
    store = open_store(str(tmp_path))

    def begin(from_step: int = 0) -> Attempts:
        attempts = Attempts(store=store, closing=lambda _: store, run_id="run")
        attempts.claim(Process.current(), fencing="auto", from_step=from_step, versions={}, above=0)
        return attempts

    return begin


def happen(begin, history: str) -> None:
    """One attempt for each letter: killed with memory running Out, killed after it had Recovered, Killed without a
    word, Interrupted, an own Error at step 7, ended because the store was Down; a digit is the newest checkpoint."""
    from_step = 0
    for letter in history:
        if letter.isdigit():
            from_step = int(letter)
            continue
        attempt = begin(from_step)
        if letter == "E":
            attempt.fail(RuntimeError("broken"), step=7)
        elif letter in "OR":
            attempt.note_memory(SHORT)
            if letter == "R":
                attempt.note_memory(ENOUGH)
        elif letter != "K":
            attempt.end({"I": "interrupted", "D": "storage"}[letter])


@pytest.mark.parametrize("history", ["OOO", "KOKOOK", "OIOIKO", "4OOO", "DOOO", "0O4OOO"])
def test_deaths_for_lack_of_memory_end_the_run(runs, history):
    """Three attempts in a row that ran out of memory, after the same checkpoint, are enough; preemptions in between,
    announced or not, change nothing."""
    happen(runs, history)
    with pytest.raises(PermanentError) as caught:
        runs(4 if "4" in history else 0).check_progress(4 if "4" in history else 0)
    assert "15.90 of 16.00 GiB" in caught.value.message
    assert "memory" in caught.value.remedy


@pytest.mark.parametrize(
    "history", ["", "KKKKKK", "KOK", "OKO", "OO", "ODOO", "OEOO", "RRR", "ORO", "IIII", "OO4O", "DDD"]
)
def test_deaths_that_do_not_end_the_run(runs, history):
    """A death counts only by what the attempt noted last; other ends and a new checkpoint begin a new row."""
    happen(runs, history)
    runs(4 if "4" in history else 0).check_progress(4 if "4" in history else 0)


def test_after_the_last_word_it_is_tried_again(runs):
    """The attempt that gave up has an end of its own, and so the next one does not."""
    happen(runs, "OOO")
    attempt = runs()
    with pytest.raises(PermanentError) as caught:
        attempt.check_progress(0)
    attempt.fail(caught.value, step=None)
    runs().check_progress(0)


@pytest.mark.parametrize(
    ("history", "final"), [("EE", True), ("EKKE", True), ("EIE", True), ("OE", True), ("KKKK", False), ("EDE", False)]
)
def test_own_errors_are_counted_with_deaths_for_lack_of_memory(runs, history, final):
    """The third of them at the same place is final; preemptions do not count."""
    happen(runs, history)
    assert (runs().fail(RuntimeError("broken"), step=7) is not None) == final


DEEP = "[" * 100_000
OTHERS = {
    "not JSON": lambda _: b"\xff{",
    "nested deep": lambda _: DEEP.encode(),
    "a list": lambda _: b"[]",
    "of another attempt": lambda body: {**body, "attempt": 9},
    "of another claim": lambda body: {**body, "nonce": "0" * 32},
    "of a later version": lambda body: {**body, "layout": 99},
    "sizes in words": lambda body: {**body, "limit_bytes": "16 GiB"},
    "sizes that are no sizes": lambda body: {**body, "peak_in_use_bytes": 10**400},
    "without sizes": lambda body: {name: body[name] for name in ("layout", "attempt", "nonce", "running_out")},
    "not running out": lambda body: {**body, "running_out": "no"},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_evidence_that_is_not_valid_is_none(runs, tmp_path, other):
    """What is damaged, of another form or somebody else's says nothing about a death."""
    happen(runs, "OOO")
    path = tmp_path / "run/attempts/0002.memory.json"
    found = other(json.loads(path.read_text()))
    path.write_bytes(found if isinstance(found, bytes) else json.dumps(found).encode())
    runs().check_progress(0)


def test_only_so_many_attempts_are_looked_at(runs):
    """A run that was preempted for weeks starts as quickly as another."""
    happen(runs, "OOO" + "K" * 40)
    runs().check_progress(0)
