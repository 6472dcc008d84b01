"""The store out of order: down, throttling, refusing, or answering with half a reply."""

import contextlib
import random
import threading
import time
from collections import Counter

import pytest

from tests.faults.harness import DENIED, STORAGE
from tests.faults.rules import Fault, refuse, through, to
from tests.servers import _free_port

DOWN, NO_ENTRY = refuse(503, "ServiceUnavailable"), refuse(403, "AccessDenied")
PATIENCE_SECONDS = 6.0
MARGIN_SECONDS = 5.5  # less than the patience, so that a patience that is used up twice is noticed
SHORT = {"storage_patience_minutes": PATIENCE_SECONDS / 60}
SLOW = [["slow_steps", 0.3]]


def ends_in_time(job, code):
    """The exit code, once the patience is over that began with the first failure of what the run depends on."""
    while not [line for line in job.events("storage_retry") if "metrics.jsonl" not in line["key"]]:
        time.sleep(0.05)
    started = time.monotonic()
    job.ends(code)
    assert time.monotonic() - started < PATIENCE_SECONDS + MARGIN_SECONDS, job.tail()


@pytest.mark.parametrize("how", ["unavailable", "refused connection"])
def test_down_at_the_start(bench, how):
    """A job waits for its store: it trains no step before it has read what there is to resume."""
    run_id, port, down = bench.name("start"), _free_port(), threading.Event()
    down.set()
    bench.start(run_id, hooks=[["kill_at_step", 8], *SLOW]).wait()
    with contextlib.ExitStack() as stack:
        proxy = through(bench, Fault(on=".", act=DOWN, during=down), port=port)
        if how == "unavailable":
            stack.enter_context(proxy)
        job = bench.start(run_id, endpoint=f"http://127.0.0.1:{port}")
        job.until("storage_retry")
        time.sleep(2)
        assert not job.events("train_progress")
        if how == "unavailable":
            down.clear()
        else:
            down.clear()
            stack.enter_context(proxy)
        job.ends(0)
    assert job.event("resumed")["resumed_step"] >= 4
    bench.check_whole(run_id)


@pytest.mark.parametrize("act", [DOWN, to(reset=True), NO_ENTRY], ids=["unavailable", "reset", "denied"])
def test_down_in_mid_run(bench, act):
    """Training continues while the store is down, or refuses for a while as it does when roles are edited, and
    checkpoints are committed afterwards."""
    run_id, down = bench.name("mid"), threading.Event()
    with through(bench, Fault(on="PUT" if act is NO_ENTRY else ".", act=act, during=down)) as url:
        job = bench.start(run_id, endpoint=url, hooks=[["slow_steps", 0.8]])
        job.until("checkpoint_committed")
        down.set()
        job.until("storage_retry")
        step = job.event("train_progress")["step"]
        job.until("train_progress", step=step + 2)
        committed = len(job.events("checkpoint_committed"))
        down.clear()
        job.ends(0)
    assert len(job.events("checkpoint_committed")) > committed
    assert not job.events("uploader_died")
    bench.check_whole(run_id)


@pytest.mark.parametrize("code", [STORAGE, DENIED])
def test_down_past_the_patience(bench, code):
    """A store that stays down, or continues refusing, ends the run when the patience is over, once: with a message that
    names the operation, and the next attempt continues from the last commit."""
    run_id, down = bench.name("past"), threading.Event()
    fault = Fault(on="." if code == STORAGE else "PUT", act=DOWN if code == STORAGE else NO_ENTRY, during=down)
    with through(bench, fault) as url:
        job = bench.start(run_id, endpoint=url, hooks=[["slow_steps", 0.8]], **SHORT)
        job.until("checkpoint_committed")
        down.set()
        ends_in_time(job, code)
    failed = job.event("run_failed")
    assert "PutObject" in failed["message"]
    assert failed["remedy"]
    second = bench.start(run_id).ends(0)
    assert second.event("resumed")["resumed_step"] >= 2
    bench.check_whole(run_id)


@pytest.mark.parametrize("place", ["/adapter/", r"/done\.json"])
def test_down_at_the_end(bench, place):
    """What is trained is trained: the attempt that ends because the store is down at the very end is followed by one
    that only publishes."""
    run_id, down = bench.name("end"), threading.Event()
    faults = Fault(on=f"PUT .*{place}", act=lambda _: down.set()), Fault(on=".", act=DOWN, during=down)
    with through(bench, *faults) as url:
        ends_in_time(bench.start(run_id, endpoint=url, **SHORT), STORAGE)
    second = bench.start(run_id).ends(0)
    assert second.events("train_progress") == []
    bench.check_whole(run_id)


def test_denied_from_the_start(bench):
    """A job without permission does not hold a GPU for the patience of an outage: it ends within a minute."""
    run_id = bench.name("denied")
    with through(bench, Fault(on=".", act=NO_ENTRY)) as url:
        job = bench.start(run_id, endpoint=url, storage_patience_minutes=60).ends(DENIED, 60)
    assert "ListObjectsV2" in job.event("run_failed")["message"]  # the ledger says whether the run is finished
    assert not job.events("model_loaded")


@pytest.mark.parametrize("seed", range(2))
def test_throttled(bench, seed):
    """Seven of ten requests get 'slow down', though none more than twice in a row: the run takes longer."""
    run_id, chance, row, lock = bench.name("slow"), random.Random(seed), Counter(), threading.Lock()

    def throttle(seen):
        with lock:
            request = seen.method, seen.path
            if row[request] < 2 and chance.random() < 0.7:
                row[request] += 1
                seen.refuse = 503, "SlowDown"
            else:
                row[request] = 0

    with through(bench, throttle) as url:
        job = bench.start(run_id, endpoint=url, checkpoint_steps=6).ends(0, 200)
    assert job.events("storage_retry")
    bench.check_whole(run_id)


@pytest.mark.parametrize(
    "act",
    [to(truncate=True), to(reset=True), to(cut=True), to(drip_seconds=0.05)],
    ids=["truncated", "reset", "cut", "dripping"],
)
def test_a_bad_line(bench, act):
    """One reply in four is cut, lost or slow, while a run is resumed and finished: what arrives is whole."""
    run_id, count, lock = bench.name("line"), [0], threading.Lock()
    bench.start(run_id, hooks=[["kill_at_step", 8], *SLOW]).wait()

    def fourth(seen):
        with lock:
            count[0] += 1
            if count[0] % 4 == 0:
                act(seen)

    with through(bench, fourth) as url:
        job = bench.start(run_id, endpoint=url).ends(0)
    assert job.event("resumed")["resumed_step"] >= 4
    assert not job.events("checkpoint_damaged")
    bench.check_whole(run_id)


def test_a_hanging_server(bench):
    """A server that is silent, then hangs up: at the pull, at a restore, at an upload, at the end."""
    run_id = bench.name("hang")
    bench.start(run_id, hooks=[["kill_at_step", 8], *SLOW]).wait()
    places = ["GET .*/data/rows", "GET .*/optimizer.pt", r"PUT .*/optimizer.pt", "PUT .*/done.json"]
    faults = [Fault(on=place, act=to(hang_seconds=4), last=1) for place in places]
    with through(bench, *faults) as url:
        job = bench.start(run_id, endpoint=url, hooks=SLOW).ends(0)
    assert [fault.hits for fault in faults] == [1, 1, 1, 1]
    assert job.event("resumed")["resumed_step"] >= 4
    bench.check_whole(run_id)


def test_a_token_expires(bench):
    """Expired credentials are asked for again, whichever request meets it first."""
    run_id = bench.name("token")
    places = [
        "GET .*/data/rows",
        "PUT .*/optimizer.pt",
        "HEAD .*/trainer_state",
        "PUT .*/commits/000003",
        "PUT .*/adapter/",
    ]
    faults = [Fault(on=place, act=refuse(400, "ExpiredToken"), last=2) for place in places]
    with through(bench, *faults) as url:
        job = bench.start(run_id, endpoint=url, hooks=SLOW).ends(0)
    assert [fault.hits for fault in faults] == [2] * 5
    assert "ExpiredToken" in job.event("storage_retry")["error"]
    bench.check_whole(run_id)


def test_deletes_are_denied(bench):
    """Whoever may not delete keeps all checkpoints, is warned once, and loses nothing."""
    run_id = bench.name("keep")
    with through(bench, Fault(on=r"DELETE|POST .*\?delete", act=NO_ENTRY)) as url:
        job = bench.start(run_id, endpoint=url, hooks=SLOW).ends(0)
    assert len(job.events("old_checkpoints_kept")) == 1
    assert "s3:DeleteObject" in job.event("old_checkpoints_kept")["remedy"]
    steps = {line["step"] for line in job.events("checkpoint_committed")}
    kept = bench.place.names(bench.key(run_id, "checkpoints/data/"))
    assert {int(key.split("/step-")[1][:6]) for key in kept} == steps
    assert len(steps) > 2
    bench.check_whole(run_id)
