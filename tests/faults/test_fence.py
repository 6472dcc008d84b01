"""Several attempts at one run: one owns it, the others notice and harm nothing."""

import signal
import threading
import time

import boto3
import pytest

from job.runtime.errors import FencedError
from job.state.ledger import Ledger
from job.storage.open import open_store
from tests.faults.harness import FENCED, INTERRUPTED, PERMANENT, killed_run
from tests.faults.rules import Held, through

CONTENT = {"data": "", "files": [], "fingerprint": {}, "plan": {}}  # of a record that is no checkpoint


def published(bench, run_id) -> dict[str, bytes]:
    """Everything that a reader of the run relies on."""
    folders = (bench.place.json(bench.key(run_id, "done.json"))["prefix"] + "/", "adapter/")
    inside = [name for folder in folders for name in bench.place.names(bench.key(run_id, folder))]
    names = [*inside, *(bench.key(run_id, name) for name in ("done.json", "metrics.jsonl", "report.html"))]
    return {name: bench.place.get(name) for name in names}


def test_two_attempts_at_once(bench):
    """The newer attempt takes the run over; the older one ends with 76 and blames nobody in the run's record."""
    run_id = bench.name("two")
    older = bench.start(run_id, hooks=[["slow_steps", 1.5]])
    older.until("checkpoint_committed")
    newer = bench.start(run_id)
    older.ends(FENCED)
    newer.ends(0)
    assert "Attempt 2" in older.event("run_failed")["message"]
    assert bench.place.json(bench.key(run_id, "attempts/0001.end.json"))["outcome"] == "fenced"
    assert bench.key(run_id, "failure.json") not in bench.place.names(bench.key(run_id, ""))
    bench.check_whole(run_id)


@pytest.mark.parametrize("uploader_too", [False, True])
def test_a_zombie_in_training(bench, uploader_too):
    """An attempt that was frozen and wakes after its successor has committed changes nothing and ends with 76."""
    run_id = bench.name("zombie")
    zombie = bench.start(run_id, hooks=[["slow_steps", 0.1], ["stop_at_step", 5]])
    zombie.until("train_progress", step=4)
    zombie.until("checkpoint_committed")
    uploader = zombie.uploader()
    if uploader_too:
        uploader.suspend()
    bench.start(run_id).ends(0)
    before = published(bench, run_id)
    uploader.resume()
    zombie.send(signal.SIGCONT)
    zombie.ends(FENCED)
    assert published(bench, run_id) == before
    bench.check_whole(run_id)


def test_a_zombie_in_the_restore(bench):
    """An attempt that stands still while it restores, until its successor has finished and deleted that checkpoint,
    ends with 76: neither does it call the checkpoints damaged, nor the finished run failed."""
    run_id, held = killed_run(bench, "restore"), Held("GET .*/data/0001/step-.*/optimizer.pt")
    with through(bench, held.fault) as url:
        zombie = bench.start(run_id, endpoint=url)
        assert held.there.wait(60), zombie.tail()
        bench.start(run_id).ends(0)
        held.release()
        zombie.ends(FENCED)
    names = [name.removeprefix(bench.key(run_id, "")) for name in bench.place.names(bench.key(run_id, ""))]
    assert not [name for name in names if name == "failure.json" or name.startswith("checkpoints/damaged/")]
    bench.check_whole(run_id)


@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("job.state.publication:Publication.upload", 1),
        ("job.storage.s3.store:S3Store.upload", 3),
        ("job.state.publication:Publication.publish", 1),
        ("job.state.publication:Publication.proclaim", 1),
        ("job.storage.s3.store:S3Store.copy", 1),
    ],
)
def test_a_zombie_that_publishes(bench, target, number):
    """An attempt that wakes after another has published the run changes nothing that anybody relies on."""
    run_id = bench.name("late")
    zombie = bench.start(run_id, hooks=[["call_before", target, number, "SIGSTOP"]])
    zombie.until("evaluated", step=12)
    deadline = time.monotonic() + 30
    while not [record for record in bench.check_commits(run_id) if record["kind"] == "final"]:
        assert time.monotonic() < deadline, zombie.tail()
        time.sleep(0.05)
    second = bench.start(run_id).ends(0)
    assert second.events("train_progress") == []
    before = published(bench, run_id)
    zombie.send(signal.SIGCONT)
    # From the `published` record on the run is finished, and it is this attempt that finished it.
    assert zombie.wait() == (0 if target.endswith(("copy", "proclaim")) else FENCED), zombie.tail()
    assert published(bench, run_id) == before
    bench.check_whole(run_id)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("races", [50, pytest.param(1000, marks=pytest.mark.full)])
def test_fence_races(bench, races):
    """However attempts interleave: each number has one owner, and behind a fence no lower attempt ever commits."""
    bucket = f"races-{races}"
    boto3.client("s3", endpoint_url=bench.place.endpoint).create_bucket(Bucket=bucket)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", bench.place.endpoint)
        stores = [open_store(f"s3://{bucket}") for _ in range(4)]
        for race in range(races):
            race_once(stores, f"run-{race}")


def race_once(stores: list, run_id: str) -> None:
    """Three attempts that fence and commit at the same time."""
    start, won = threading.Barrier(3), {}

    def attempt(number: int) -> None:
        ledger = Ledger(store=stores[number], run_id=run_id, attempt=number)
        start.wait()
        won[number] = []
        try:
            ledger.fence()
            for step in range(2):
                won[number].append(ledger.append("checkpoint", step=step, **CONTENT))
        except FencedError:
            pass

    threads = [threading.Thread(target=attempt, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = list(Ledger(store=stores[0], run_id=run_id).newest_first())[::-1]
    assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
    for number, mine in won.items():
        assert mine == [entry.number for entry in entries if entry.attempt == number and entry.kind == "checkpoint"]
    highest = 0
    for entry in entries:
        if entry.kind == "fence":
            highest = max(highest, entry.attempt)
        else:
            assert entry.attempt >= highest
    assert len(won[3]) == 2  # nobody is above the highest


def test_the_same_step_failing_three_times(bench):
    """An error of the program's own at the same step is tried three times, the third end is 70, and whoever starts the
    run again after mending the cause continues."""
    run_id, hooks = bench.name("broken"), [["fail_at_step", 7]]
    assert [bench.start(run_id, hooks=hooks).wait() for _ in range(3)] == [1, 1, PERMANENT]
    failure = bench.place.json(bench.key(run_id, "failure.json"))
    assert (failure["kind"], failure["exit_code"]) == ("permanent", PERMANENT)
    assert "the test broke step 7" in failure["message"]
    bench.start(run_id).ends(0)
    bench.check_whole(run_id)


def test_errors_at_different_steps_are_not_permanent(bench):
    """Three errors that got further each time are three tries."""
    run_id = bench.name("flaky")
    assert [bench.start(run_id, hooks=[["fail_at_step", step]]).wait() for step in (3, 6, 9)] == [1, 1, 1]


def test_three_preemptions_at_the_same_step(bench):
    """Being preempted is nobody's fault: any number of times at the same step, the run continues."""
    run_id = bench.name("preempted")
    for _ in range(4):
        bench.start(run_id, hooks=[["call_before", "job.tuning.model:load", 1, "SIGTERM"]]).ends(INTERRUPTED)
    bench.start(run_id).ends(0)
    bench.check_whole(run_id)
