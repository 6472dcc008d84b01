"""The store as a witness: what is written when, what a lost reply means, and who may still write."""

import threading

import pytest

from tests.faults.harness import CONFIG, FENCED
from tests.faults.rules import Fault, refuse, through, to

FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json")
SLOW = [["slow_steps", 0.1]]


def records(bench, run_id):
    """All records of the ledger, which must be of one piece: no number left out, no checkpoint and no word twice."""
    keys = bench.place.names(bench.key(run_id, "checkpoints/commits/"))
    assert [int(key[-11:-5]) for key in keys] == list(range(1, len(keys) + 1))
    found = [bench.place.json(key) for key in keys]
    steps = [body["step"] for body in found if body["kind"] == "checkpoint"]
    assert steps == sorted(set(steps))
    assert len({body["nonce"] for body in found}) == len(found)
    return found


@pytest.mark.parametrize(
    ("place", "stored"),
    [(f"data/.*/{name}", stored) for name in FILES for stored in (False, True)]
    + [("commits/", False), ("commits/", True)],
)
def test_the_machine_is_lost_in_an_upload(bench, place, stored):
    """A checkpoint exists once its commit is stored, whether or not the reply was heard, and not a moment before."""
    run_id, lost, job = bench.name("upload"), threading.Event(), []

    def lose():
        job[0].kill()
        lost.set()

    act = to(cut=True, after=lose) if stored else to(refuse=(503, "SlowDown"), before=lose)
    # The fence is the first record: both patterns mean the third checkpoint.
    fault = Fault(on=f"PUT .*/checkpoints/{place}", act=act, first=4 if "commits" in place else 3)
    with through(bench, fault) as url:
        job.append(bench.start(run_id, endpoint=url, hooks=SLOW))
        assert lost.wait(60), job[0].tail()
    second = bench.start(run_id).ends(0)
    assert second.event("resumed")["resumed_from"] == (4 if place == "commits/" and stored else 3)
    bench.check_whole(run_id)


@pytest.mark.parametrize(
    "place",
    [
        r"attempts/0001\.json",
        r"commits/000001",
        r"commits/000003",
        r"commits/000008",
        r"run\.json",
        r"done\.json",
        r"latest\.json",
        r"0001\.end\.json",
        r"data/0001/step-000004/",
        r"results/",
        r"commits/000009",
    ],
)
def test_the_reply_of_a_write_is_lost(bench, place):
    """A client that never heard of its own success finds it again: nothing is written under two numbers."""
    run_id, fault = bench.name("cut"), Fault(on=f"PUT .*{place}", act=to(cut=True), last=2)
    with through(bench, fault) as url:
        job = bench.start(run_id, endpoint=url, hooks=[["commit_every_save"]]).ends(0)
    assert fault.hits == 2
    assert job.events("storage_retry")
    assert [body["kind"] for body in records(bench, run_id)] == ["fence", *["checkpoint"] * 6, "final", "published"]
    attempts = bench.place.names(bench.key(run_id, "attempts/"))
    assert attempts == [
        bench.key(run_id, f"attempts/0001.{end}") for end in ("end.json", "json", "metrics.jsonl", "report.html")
    ]
    bench.check_whole(run_id)


def test_every_first_reply_is_lost(bench):
    """The same where no write is heard of at the first time."""
    run_id, heard = bench.name("deaf"), set()

    def cut(seen):
        seen.cut = seen.path not in heard
        heard.add(seen.path)

    fault = Fault(on=f"PUT .*/{run_id}/", act=cut)
    with through(bench, fault) as url:
        bench.start(run_id, endpoint=url).ends(0)
    records(bench, run_id)
    bench.check_whole(run_id)


def test_a_conflict_on_the_commit(bench):
    """409 ConditionalRequestConflict says that nothing was decided yet: the commit is tried again."""
    run_id = bench.name("conflict")
    fault = Fault(on="PUT .*/commits/000003", act=refuse(409, "ConditionalRequestConflict"), last=2)
    with through(bench, fault) as url:
        job = bench.start(run_id, endpoint=url, hooks=SLOW).ends(0)
    assert [line["error"].split()[0] for line in job.events("storage_retry")] == ["ConditionalRequestConflict"] * 2
    records(bench, run_id)
    bench.check_whole(run_id)


def test_retention_races_a_reader(bench):
    """The attempt that was replaced deletes old checkpoints while its successor reads: what is read stays."""
    run_id, deleting, reading, ended = bench.name("race"), *(threading.Event() for _ in range(3))

    def delete():
        deleting.set()
        reading.wait(60)

    def read():
        reading.set()
        ended.wait(60)

    old = Fault(on="DELETE", act=to(before=delete))
    new = Fault(on="(GET|HEAD) .*/checkpoints/data/", act=to(before=read))
    with through(bench, old) as first_url, through(bench, new) as second_url:
        first = bench.start(run_id, endpoint=first_url, hooks=SLOW, checkpoint_keep=1)
        assert deleting.wait(60), first.tail()
        second = bench.start(run_id, endpoint=second_url, checkpoint_keep=1)
        assert reading.wait(60), second.tail()
        first.ends(FENCED)
        ended.set()
        second.ends(0)
    assert old.hits
    assert new.hits
    assert second.event("resumed")["resumed_step"] >= 4
    assert not second.events("checkpoint_damaged")
    bench.check_whole(run_id)


def test_the_replaced_attempt_writes_late(bench):
    """A write that the replaced attempt had under way when it stopped, and that arrives after the run is whole, changes
    nothing of it."""
    run_id, held, release = bench.name("late"), threading.Event(), threading.Event()

    def hold():
        held.set()
        release.wait(60)

    with through(bench, Fault(on="PUT .*metrics.jsonl", act=to(before=hold))) as url:
        first = bench.start(run_id, endpoint=url, hooks=SLOW)
        assert held.wait(60), first.tail()
        bench.start(run_id).ends(0)
        release.set()
        first.ends(FENCED)
    bench.check_whole(run_id)


def test_a_store_without_conditional_writes(plain_bench):
    """Such a store is used with a warning, and a lost machine's run is resumed on it all the same."""
    run_id = plain_bench.name("plain")
    first = plain_bench.start(run_id, hooks=SLOW)
    first.until("checkpoint_committed", step=4)
    first.kill()
    second = plain_bench.start(run_id).ends(0)
    assert [len(job.events("fencing_weak")) for job in (first, second)] == [1, 1]
    assert second.event("resumed")["resumed_step"] >= 4
    plain_bench.check_whole(run_id)


def test_a_store_without_conditional_writes_is_refused(plain_bench):
    """TUNE_FENCING=require: 78 before anything is trained, and a message that says what to do."""
    run_id = plain_bench.name("require")
    job = plain_bench.start(run_id, fencing="require").ends(CONFIG)
    assert not job.events("model_loaded")
    assert not job.events("train_progress")
    failed = job.event("run_failed")
    assert "If-None-Match" in failed["message"]
    assert "TUNE_FENCING=auto" in failed["remedy"]


def test_orphans_of_multipart_uploads(bench):
    """A run removes what its broken-off uploads left behind, which costs money and which no listing shows, and touches
    nobody else's."""
    run_id, client = bench.name("orphan"), bench.place.client
    mine = [f"out/{run_id}/checkpoints/data/0001/step-000002/optimizer.pt", f"out/{run_id}/adapter/x.safetensors"]
    foreign = [f"out/{run_id}-2/adapter/x.safetensors", "elsewhere/x"]
    begun = {
        key: client.create_multipart_upload(Bucket=bench.place.bucket, Key=key)["UploadId"] for key in mine + foreign
    }
    job = bench.start(run_id).ends(0)
    assert job.event("unfinished_uploads_removed")["count"] == 2
    uploads = client.list_multipart_uploads(Bucket=bench.place.bucket).get("Uploads", [])
    assert sorted(upload["Key"] for upload in uploads) == sorted(foreign)
    bench.check_whole(run_id)
    for key in foreign:
        client.abort_multipart_upload(Bucket=bench.place.bucket, Key=key, UploadId=begun[key])


@pytest.mark.parametrize(
    "answer", [(403, "AccessDenied"), (501, "NotImplemented"), (404, "NoSuchUpload")], ids=lambda answer: answer[1]
)
def test_sweeping_is_refused(bench, answer):
    """A store that shows no multipart uploads to the job costs at most a warning, not the run."""
    run_id, fault = bench.name("unswept"), Fault(on=r"GET .*\?uploads", act=refuse(*answer))
    with through(bench, fault) as url:
        job = bench.start(run_id, endpoint=url, storage_patience_minutes=0.03).ends(0)
    assert fault.hits
    assert len(job.events("unfinished_uploads_not_removed")) <= 1
    bench.check_whole(run_id)
