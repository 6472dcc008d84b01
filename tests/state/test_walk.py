"""What a run publishes stays true in every interleaving of its attempts, and under every fault of a store (`walk`)."""

import json
from pathlib import Path

import pytest

from job.runtime.errors import FencedError, StorageError
from job.runtime.hashing import hashes
from job.state import checkpoints
from job.state.attempts import Attempts
from job.state.ledger import Ledger
from job.state.record import Record
from tests.state import walk
from tests.state.walk import AUTO, CHANGED, FRESH, RUN, STEPS, Kind, Memory, Walk, WrongError

pytestmark = pytest.mark.usefixtures("quiet_walk")


@pytest.mark.parametrize("second", [AUTO, FRESH, CHANGED], ids=lambda kind: kind.name)
@pytest.mark.parametrize("first", [AUTO, FRESH], ids=lambda kind: kind.name)
def test_an_attempt_stopped_anywhere(first, second, record_property):
    """Another attempt runs to its end in the meantime; the first one is killed or continues."""
    seen = Walk()
    seen.one_stop(first, second, range(seen.calls(first) + 1))
    record_property("states", seen.states)
    assert seen.schedules > 80


@pytest.mark.parametrize("kind", [AUTO, FRESH], ids=lambda kind: kind.name)
def test_every_fault_at_every_third_call(kind):
    """A store that loses, repeats, delays or cuts what it confirmed, or denies falsely that it may write."""
    seen = Walk()
    seen.faults(kind, range(kind is FRESH, seen.calls(kind), 3))
    assert seen.schedules > 80


@pytest.mark.full
@pytest.mark.parametrize("kind", [AUTO, FRESH], ids=lambda kind: kind.name)
def test_every_fault_at_every_call(kind):
    """The same at every call."""
    seen = Walk()
    seen.faults(kind, range(seen.calls(kind)))
    assert seen.schedules > 200


def test_two_stops():
    """Both attempts are stopped, at pairs of places that a seed chooses; all pairs: `python -m tests.state.walk`."""
    seen = Walk()
    calls = seen.calls(AUTO)
    pairs = [(stop, other) for stop in range(0, calls, 3) for other in range(stop % 5, calls, 5)]
    seen.two_stops(AUTO, FRESH, iter(pairs))
    assert seen.schedules == len(pairs)


@pytest.mark.parametrize("seed", range(4))
def test_three_attempts_at_random(seed):
    """Random schedules of three attempts with random faults of the store."""
    seen = Walk()
    seen.random(seed, 60)
    assert seen.states > 1000


@pytest.mark.full
@pytest.mark.parametrize("second", [AUTO, FRESH, CHANGED], ids=lambda kind: kind.name)
def test_all_pairs_of_stops(second):
    """Every pair of stops of two attempts."""
    seen = Walk()
    calls = seen.calls(AUTO)
    seen.two_stops(AUTO, second, iter([(stop, other) for stop in range(calls) for other in range(calls)]))


def old_story(store: Memory, kind: Kind, directory: Path) -> int:
    """An attempt that publishes as the job did before there were `published` records: to one prefix for all attempts,
    with `done.json` as what decides."""
    ledger = Ledger(store=store, run_id=RUN)
    attempts, record = Attempts(store=store, closing=lambda _: store, run_id=RUN), Record(ledger=ledger)
    try:
        if kind.resume != "fresh" and (done := store.read(f"{RUN}/done.json")) is not None:
            store.write("latest.json", done)
            return 0
        ledger.attempt = attempts.claim(walk.PROCESS, fencing="auto", from_step=0, versions={}, above=0)
        ledger.owner, ledger.conditional = attempts.owner, attempts.conditional
        if kind.resume == "fresh":
            ledger.fence()
            ledger.start_over()
            old_archive(store, ledger.attempt)
        ledger.fence()
        restored = checkpoints.restore(ledger, directory / "restored", check=lambda *_: None)
        for step in range(restored.step + 1 if restored else 1, STEPS + 1):
            place = walk.checkpoint_files(directory, step)
            facts = checkpoints.upload(store, run_id=RUN, attempt=ledger.attempt, step=step, directory=place)
            ledger.append("checkpoint", **facts, fingerprint={"s": kind.setting}, plan={})
        final = {"steps": STEPS, "plan": {}, "fingerprint": {"s": kind.setting}, "results": {}, "versions": {}}
        ledger.append("final", **final)
        record.remove_unfinished_uploads()
        adapter = walk.adapter_files(directory, f"{ledger.life} {kind.setting}")
        files = sorted(adapter.iterdir())
        for path in files:
            store.upload(path, f"{RUN}/adapter/{path.name}")
        ledger.check()
        artifacts = [
            {"name": f"adapter/{path.name}", "size": path.stat().st_size, "sha256": found}
            for path, found in hashes(files).items()
        ]
        done = json.dumps({**final, "artifacts": artifacts}).encode()
        if not store.create(f"{RUN}/done.json", done) and store.read(f"{RUN}/done.json") != done:
            return 76
        store.write("latest.json", done)
    except StorageError:
        return 74
    except FencedError:
        return 76
    return 0


def old_archive(store: Memory, attempt: int) -> None:
    """How a run that started over moved what it had published."""
    stays = ("checkpoints/", "attempts/", "aside/")
    keys = [entry.key for entry in store.list_objects(f"{RUN}/")]
    published = [key for key in keys if not key.removeprefix(f"{RUN}/").startswith(stays)]
    for key in published:
        store.copy(key, f"{RUN}/aside/{attempt:04d}/{key.removeprefix(f'{RUN}/')}")
    for key in sorted(published, key=lambda key: not key.endswith("/done.json")):
        store.delete(key)


@pytest.mark.parametrize(
    "look",
    [
        pytest.param(lambda seen: seen.one_stop(AUTO, FRESH, range(seen.calls(AUTO))), id="stopped in an upload"),
        pytest.param(lambda seen: seen.one_stop(FRESH, FRESH, range(seen.calls(FRESH))), id="archived"),
        pytest.param(lambda seen: seen.one_stop(AUTO, CHANGED, range(seen.calls(AUTO))), id="changed settings"),
        pytest.param(lambda seen: seen.faults(AUTO, range(seen.calls(AUTO))), id="a store that loses"),
    ],
)
def test_the_walk_finds_what_was_wrong(look):
    """The order of publication as it was before leaves states in which done.json or latest.json is false."""
    with pytest.raises(WrongError):
        look(Walk(program=old_story))
