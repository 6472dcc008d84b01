"""What is published stays what it was, and true: attempts that were replaced, stores that lose, and old outputs."""

import hashlib
import json

import pytest

from tests.faults.harness import CONFIG, FENCED, KILLED, STORAGE, copied_run
from tests.faults.rules import Fault, Held, refuse, through, to

SLOW = [["slow_steps", 0.1]]
CHANGE = {"learning_rate": 5e-3, "allow_change": "TUNE_LEARNING_RATE"}


def artifacts_are_true(bench, name: str) -> dict:
    """An object that proclaims a result, each of whose files is what it says."""
    body = bench.place.json(name)
    for file in body["artifacts"]:
        data = bench.place.get(f"out/{body['run_id']}/{body['prefix']}/{file['name']}")
        assert hashlib.sha256(data).hexdigest() == file["sha256"], file
    return body


def whole(bench, run_id: str) -> None:
    """`done.json` and `latest.json` agree and are true, and a further start has nothing to do."""
    done = artifacts_are_true(bench, bench.key(run_id, "done.json"))
    latest = artifacts_are_true(bench, "out/latest.json")
    assert (latest["run_id"], latest["prefix"]) == (run_id, done["prefix"])


@pytest.mark.parametrize(
    ("pattern", "successor"),
    [
        ("PUT .*/results/.*/adapter_model.safetensors", {"resume": "fresh", "seed": 9}),
        ("PUT .*/results/.*/adapter_model.safetensors", CHANGE),
        ("PUT .*/results/.*/README.md", {"resume": "fresh", "seed": 9}),
        ("PUT .*/results/.*/metrics.jsonl", CHANGE),
    ],
    ids=["weights, fresh", "weights, changed", "card, fresh", "metrics, changed"],
)
def test_an_upload_that_arrives_late(bench, pattern, successor):
    """An attempt is stopped inside an upload, another one with other results publishes the run, and the first one's
    bytes arrive: they are nowhere that anybody relies on, and it ends with 76."""
    run_id, held = bench.name("late"), Held(pattern)
    with through(bench, held.fault) as url:
        first = bench.start(run_id, endpoint=url)
        assert held.there.wait(60), first.tail()
        bench.start(run_id, **successor).ends(0)
        before = {key: bench.place.get(key) for key in bench.place.names(bench.key(run_id, ""))}
        held.release()
        first.ends(FENCED)
    done = artifacts_are_true(bench, bench.key(run_id, "done.json"))
    kept = [bench.key(run_id, name) for name in ("done.json", "metrics.jsonl", "report.html")]
    kept += bench.place.names(bench.key(run_id, "adapter/")) + bench.place.names(bench.key(run_id, done["prefix"]))
    assert {key: bench.place.get(key) for key in kept} == {key: before[key] for key in kept}
    whole(bench, run_id)
    again = {name: value for name, value in successor.items() if name != "resume"}
    bench.start(run_id, **again).ends(0).event("already_complete")


@pytest.mark.parametrize("pattern", ["PUT .*/done.json", "PUT .*/latest.json", "PUT .*/commits/000009"])
def test_the_last_word_of_a_replaced_attempt(bench, pattern):
    """An attempt is stopped when it is about to say that the run is finished, and let go while another one, which
    starts the run over, trains: it ends with 76, and changes nothing of what comes."""
    run_id, held = bench.name("word"), Held(pattern)
    with through(bench, held.fault) as url:
        first = bench.start(run_id, endpoint=url, hooks=[["commit_every_save"]])
        assert held.there.wait(60), first.tail()
        second = bench.start(run_id, resume="fresh", seed=9, hooks=SLOW)
        second.until("train_progress", step=2)
        held.release()
        first.ends(FENCED)
        if "commits" not in pattern:
            artifacts_are_true(bench, bench.key(run_id, "done.json"))
        second.ends(0)
    whole(bench, run_id)
    bench.start(run_id, seed=9).ends(0).event("already_complete")


def test_a_late_attempt_leaves_the_report_alone(bench):
    """An attempt that is about to win the right to publish when it is replaced writes neither metrics nor report."""
    run_id, held = bench.name("report"), Held("PUT .*/commits/000008")
    with through(bench, held.fault) as url:
        first = bench.start(run_id, endpoint=url, hooks=[["commit_every_save"]])
        assert held.there.wait(60), first.tail()
        bench.start(run_id).ends(0)
        names = [bench.key(run_id, name) for name in ("metrics.jsonl", "report.html")]
        before = [bench.place.get(name) for name in names]
        held.release()
        first.ends(FENCED)
    assert [bench.place.get(name) for name in names] == before
    bench.check_whole(run_id)


@pytest.mark.parametrize("place", ["done.json", "latest.json", "commits/000009", "commits/000008", "commits/000003"])
def test_a_store_that_loses_what_it_confirmed(bench, place):
    """What counts is read back, and written again where it is missing."""
    run_id, fault = bench.name("lost"), Fault(on=f"PUT .*{place}", act=to(lose=True), last=2)
    with through(bench, fault) as url:
        bench.start(run_id, endpoint=url, hooks=[["commit_every_save"]]).ends(0)
    assert fault.hits == 2
    whole(bench, run_id)
    bench.check_whole(run_id)


@pytest.mark.parametrize("place", ["done.json", "commits/000009"])
def test_a_store_that_always_loses(bench, place):
    """An attempt does not say what the store does not show: it ends with 74, and the next one finishes the run."""
    run_id, fault = bench.name("never"), Fault(on=f"PUT .*{place}", act=to(lose=True))
    latest = bench.place.names("out/latest.json") and bench.place.get("out/latest.json")
    with through(bench, fault) as url:
        job = bench.start(run_id, endpoint=url, hooks=[["commit_every_save"]]).ends(STORAGE)
    assert "cannot be read back" in job.event("run_failed")["message"]
    assert not job.events("run_complete")
    assert (bench.place.names("out/latest.json") and bench.place.get("out/latest.json")) == latest
    bench.start(run_id).ends(0)
    bench.check_whole(run_id)


@pytest.mark.parametrize(
    "place", ["done.json", "latest.json", "commits/000009", "commits/000004", "run.json", "attempts/0001.json"]
)
def test_a_false_denial(bench, place):
    """One reply that a condition is not met, where nothing is there: the write is tried again."""
    run_id = bench.name("denied")
    fault = Fault(on=f"PUT .*{place}", act=refuse(412, "PreconditionFailed"), last=1)
    with through(bench, fault) as url:
        bench.start(run_id, endpoint=url, hooks=[["commit_every_save"]]).ends(0)
    assert fault.hits == 1
    whole(bench, run_id)


@pytest.mark.parametrize("content", [b'{"layout": 2, "kind": "fence", "att', b"", b"[]"], ids=["cut", "empty", "other"])
def test_a_record_that_is_not_readable(bench, content):
    """Where something unreadable stands in the place of its next record, an attempt cannot know who owns the run: it
    ends with 74, and the next one continues behind it."""
    run_id, held = bench.name("cut"), Held("PUT .*/commits/000004")
    with through(bench, held.fault) as url:
        job = bench.start(run_id, endpoint=url, hooks=[["commit_every_save"]])
        assert held.there.wait(60), job.tail()
        bench.place.put(bench.key(run_id, "checkpoints/commits/000004.json"), content)
        held.release()
        job.ends(STORAGE)
    assert "is not readable" in job.event("run_failed")["message"]
    bench.start(run_id).ends(0)
    whole(bench, run_id)


@pytest.mark.parametrize("all_of_them", [True, False])
def test_records_of_attempts_that_were_deleted(bench, all_of_them):
    """Somebody deletes `attempts/`: the next numbers come from the ledger, and the run is finished."""
    run_id = bench.name("deleted")
    for step in (4, 7):
        bench.start(run_id, hooks=[["commit_every_save"], ["kill_at_step", step]]).ends(KILLED)
    for name in bench.place.names(bench.key(run_id, "attempts/")):
        if all_of_them or "0002" in name:
            bench.place.delete(name)
    job = bench.start(run_id).ends(0)
    assert job.event("run_started")["attempt"] == 3
    bench.check_whole(run_id)


def as_layout_1(bench, run_id: str, *, fresh: bool = False) -> None:
    """Make of a run what an earlier version of the job would have written, `finished` or not."""
    for key in bench.place.names(bench.key(run_id, "checkpoints/commits/")):
        body = bench.place.json(key) | {"layout": 1}
        if body["kind"] == "published":
            for name in (file["name"] for file in body["artifacts"]):
                bench.place.put(bench.key(run_id, name), bench.place.get(bench.key(run_id, f"{body['prefix']}/{name}")))
                bench.place.delete(bench.key(run_id, f"{body['prefix']}/{name}"))
            facts = {name: body[name] for name in ("steps", "plan", "fingerprint", "results", "versions")}
            files = [file for file in body["artifacts"] if file["name"].startswith("adapter/")]
            done = {"layout": 1, "run_id": run_id, **facts, "artifacts": files}
            bench.place.put(bench.key(run_id, "done.json"), json.dumps(done).encode())
            bench.place.delete(key)
            continue
        if fresh:
            body["life"] = 1
        bench.place.put(key, json.dumps(body).encode())


@pytest.fixture(scope="module")
def finished(bench):
    """A run that ended well."""
    run_id = bench.name("finished")
    bench.start(run_id, hooks=[["commit_every_save"]]).ends(0)
    return run_id


def test_a_finished_run_of_an_earlier_version(bench, finished):
    """It stays finished, `latest.json` is repaired, and TUNE_RESUME=fresh leaves its adapter until another is there."""
    run_id = copied_run(bench, finished, "old")
    as_layout_1(bench, run_id)
    done = bench.place.get(bench.key(run_id, "done.json"))
    bench.place.delete("out/latest.json")
    bench.start(run_id).ends(0).event("already_complete")
    assert bench.place.get(bench.key(run_id, "done.json")) == done
    assert bench.place.json("out/latest.json")["run_id"] == run_id
    bench.start(run_id, resume="fresh", hooks=[["kill_at_step", 5]]).ends(KILLED)
    assert bench.place.get(bench.key(run_id, "done.json")) == done
    for file in json.loads(done)["artifacts"]:
        data = bench.place.get(bench.key(run_id, file["name"]))
        assert hashlib.sha256(data).hexdigest() == file["sha256"]
    bench.start(run_id).ends(0)
    bench.check_whole(run_id)
    whole(bench, run_id)


def test_an_unfinished_run_of_an_earlier_version(bench):
    """It is resumed."""
    run_id = bench.name("older")
    bench.start(run_id, hooks=[["commit_every_save"], ["kill_at_step", 9]]).ends(KILLED)
    as_layout_1(bench, run_id)
    assert bench.start(run_id).ends(0).event("resumed")["resumed_step"] == 8
    bench.check_whole(run_id)


def test_what_is_not_known_of_another_version(bench, finished):
    """An unfinished run that an earlier version started over, and one that a later version worked on, end with 78."""
    run_id = bench.name("restarted")
    bench.start(run_id, hooks=[["commit_every_save"], ["kill_at_step", 5]]).ends(KILLED)
    as_layout_1(bench, run_id, fresh=True)
    failed = bench.start(run_id).ends(CONFIG).event("run_failed")
    assert "earlier version" in failed["message"]
    later = copied_run(bench, finished, "newer")
    newest = bench.place.names(bench.key(later, "checkpoints/commits/"))[-1]
    bench.place.put(newest, json.dumps(bench.place.json(newest) | {"layout": 99}).encode())
    failed = bench.start(later).ends(CONFIG).event("run_failed")
    assert "newer version" in failed["message"]
