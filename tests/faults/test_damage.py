"""What is stored rots: a damaged checkpoint is never used, the one before is, and nothing starts over silently."""

import hashlib
import json

import pytest

from job.tuning.checkpoint_files import FILES
from tests.faults.harness import KILLED, PERMANENT, commits, copied_run, damaged, killed_run

NEWEST, BEFORE = 8, 6
HOW = ("missing", "empty", "truncated", "flipped")
PRESENT = "checkpoints/data/"
RECORDS = {
    "empty": lambda _: b"",
    "truncated": lambda body: json.dumps(body).encode()[:200],
    "no text": lambda _: b"\xff\xfe\x00garbage",
    "not JSON": lambda _: b"<html>503</html>",
    "null": lambda _: b"null",
    "a list": lambda body: json.dumps([body]).encode(),
    "no kind": lambda body: _without(body, "kind"),
    "a strange kind": lambda body: json.dumps({**body, "kind": "chekpoint"}).encode(),
    "only a kind": lambda _: b'{"kind": "checkpoint"}',
    "no step": lambda body: _without(body, "step"),
    "step in words": lambda body: json.dumps({**body, "step": "eight"}).encode(),
    "no data": lambda body: _without(body, "data"),
    "files of another shape": lambda body: json.dumps({**body, "files": {"name": "optimizer.pt"}}).encode(),
    "no files": lambda body: json.dumps({**body, "files": []}).encode(),
    "no fingerprint": lambda body: _without(body, "fingerprint"),
    "a fingerprint of another shape": lambda body: json.dumps({**body, "fingerprint": []}).encode(),
    "no plan": lambda body: _without(body, "plan"),
    "no attempt": lambda body: _without(body, "attempt"),
    "attempt in words": lambda body: json.dumps({**body, "attempt": "one"}).encode(),
    "another step": lambda body: json.dumps({**body, "step": 7}).encode(),
    "no history": lambda body: json.dumps(
        {**body, "files": [file for file in body["files"] if file["name"] != "history.jsonl"]}
    ).encode(),
}
LATEST = {
    "wrong": b"<html>",
    "empty": b"",
    "a list": b"[]",
    "of another run": b'{"run_id": "other", "uri": "s3://faults/out/other", "artifacts": []}',
}


def _without(body, name):
    return json.dumps({key: value for key, value in body.items() if key != name}).encode()


def _rewrite(bench, key, change):
    """Change a record as JSON."""
    body = bench.place.json(key)
    change(body)
    bench.place.put(key, json.dumps(body).encode())


def _resumes_from(bench, run_id, *, step=BEFORE, newest=NEWEST):
    """Start again: the newest commit is reported as damaged and passed over, and the run ends whole."""
    job = bench.start(run_id).ends(0)
    number = _number(bench, run_id, newest)
    assert [event["commit"] for event in job.events("checkpoint_damaged")] == [number], job.tail()
    assert job.event("resumed")["resumed_step"] == step
    assert job.events("train_progress")[0]["step"] == step + 1
    return job


def _number(bench, run_id, step):
    """Of the record of a step that the killed attempt made: one record for its fence, then one for every two steps."""
    assert bench.place.names(bench.key(run_id, f"checkpoints/commits/{1 + step // 2:06d}"))
    return 1 + step // 2


@pytest.fixture(scope="module")
def killed(bench):
    """A run that was killed with commits of steps 2 to 8, the last two with their files."""
    run_id = killed_run(bench)
    assert list(commits(bench, run_id)) == [2, 4, 6, 8]
    return run_id


@pytest.fixture
def run_id(bench, killed):
    """A copy of it to damage."""
    return copied_run(bench, killed, "damage")


@pytest.fixture(scope="module")
def finished(bench):
    """A run that ended well."""
    run_id = bench.name("finished")
    bench.start(run_id, hooks=[["commit_every_save"]]).ends(0)
    return run_id


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", [*FILES, "history.jsonl"])
def test_damaged_file(bench, run_id, name, how):
    """Whatever becomes of any file of the newest checkpoint, the run continues from the one before and ends whole."""
    key = f"out/{bench.place.json(commits(bench, run_id)[NEWEST])['data']}/{name}"
    if how == "missing":
        bench.place.delete(key)
    else:
        bench.place.put(key, damaged(bench.place.get(key), how))
    _resumes_from(bench, run_id)
    bench.check_whole(run_id)


@pytest.mark.parametrize("how", RECORDS)
def test_damaged_record(bench, run_id, how):
    """Whatever becomes of the newest commit record, the run continues from the one before, ends whole, and leaves the
    record as it found it."""
    key = commits(bench, run_id)[NEWEST]
    wrong = RECORDS[how](bench.place.json(key))
    bench.place.put(key, wrong)
    _resumes_from(bench, run_id)
    assert bench.place.get(key) == wrong
    bench.place.delete(key)
    bench.check_whole(run_id)


@pytest.mark.parametrize("name", ["../../../escape", "/tmp/escape", "a/../../b", "..\\escape", "", "./x", "a//b"])
def test_record_with_a_path_that_escapes(bench, run_id, name):
    """A record that names a file outside its checkpoint is refused as damaged."""
    _rewrite(bench, commits(bench, run_id)[NEWEST], lambda body: body["files"][0].update(name=name))
    job = _resumes_from(bench, run_id)
    assert repr(name) in job.event("checkpoint_damaged")["reason"]


@pytest.mark.parametrize("prefix", ["../elsewhere", "/elsewhere", "a\\b", ""])
def test_record_with_a_prefix_that_escapes(bench, run_id, prefix):
    """A record whose files would lie outside the output is refused as damaged."""
    _rewrite(bench, commits(bench, run_id)[NEWEST], lambda body: body.update(data=prefix))
    _resumes_from(bench, run_id)


def test_everything_damaged(bench, run_id):
    """Where no checkpoint is good, the run ends with code 70, again and again, and neither trains nor deletes; what
    TUNE_RESUME=fresh then does is the work of an undisturbed run."""
    records = commits(bench, run_id)
    for step in (NEWEST, BEFORE):
        key = f"out/{bench.place.json(records[step])['data']}/optimizer.pt"
        bench.place.put(key, damaged(bench.place.get(key), "flipped"))
    stored = set(bench.place.names(bench.key(run_id, "checkpoints/commits/")))
    data = set(bench.place.names(bench.key(run_id, PRESENT)))
    for _ in range(2):
        job = bench.start(run_id).ends(PERMANENT)
        failed = job.event("run_failed")
        assert "TUNE_RESUME=fresh" in failed["remedy"]
        assert run_id in failed["message"]
        assert len(job.events("checkpoint_damaged")) == len(records)
        assert not job.events("train_progress") + job.events("model_loaded") + job.events("evaluated")
        assert stored <= set(bench.place.names(bench.key(run_id, "checkpoints/commits/")))
        assert data == set(bench.place.names(bench.key(run_id, PRESENT)))
    job = bench.start(run_id, resume="fresh").ends(0)
    assert [line["step"] for line in job.events("train_progress")] == list(range(1, 13))
    bench.check_whole(run_id)


@pytest.mark.parametrize("what", LATEST)
def test_latest_does_not_influence_a_resume(bench, run_id, what):
    """`latest.json` is for readers: whatever stands in it, the run resumes from its own ledger, and names itself."""
    bench.place.put("out/latest.json", LATEST[what])
    job = bench.start(run_id).ends(0)
    assert job.event("resumed")["resumed_step"] == NEWEST
    assert bench.place.json("out/latest.json")["run_id"] == run_id
    bench.check_whole(run_id)


@pytest.mark.parametrize("what", [*LATEST, "missing"])
def test_latest_is_repaired(bench, finished, what):
    """A finished run that is started again repairs a lost or broken `latest.json`, and leaves that of another run."""
    run_id = copied_run(bench, finished, "latest")
    if what == "missing":
        bench.place.delete("out/latest.json")
    else:
        bench.place.put("out/latest.json", LATEST[what])
    bench.start(run_id).ends(0).event("already_complete")
    latest = bench.place.json("out/latest.json")
    assert latest["run_id"] == ("other" if what == "of another run" else run_id)
    if what != "of another run":
        assert latest["artifacts"] == bench.place.json(bench.key(run_id, "done.json"))["artifacts"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt"])
def test_rot_on_the_disk_of_the_store(plain_bench, rclone, name):
    """A bit that flips on the server's own disk, behind its back: the checkpoint before is used."""
    run_id = killed_run(plain_bench, "rot")
    record = plain_bench.place.json(commits(plain_bench, run_id)[NEWEST])
    path = rclone.directory / plain_bench.place.bucket / "out" / record["data"] / name
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))
    _resumes_from(plain_bench, run_id)
    plain_bench.check_whole(run_id)


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "history.jsonl", "all of them"])
def test_parts_of_different_steps(bench, run_id, name):
    """A checkpoint whose parts are of different steps is refused, although every hash agrees with its record."""
    records = commits(bench, run_id)
    older, newer = bench.place.json(records[BEFORE]), bench.place.json(records[NEWEST])
    for file in newer["files"]:
        if name in {file["name"], "all of them"}:
            data = bench.place.get(f"out/{older['data']}/{file['name']}")
            bench.place.put(f"out/{newer['data']}/{file['name']}", data)
            file.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    bench.place.put(records[NEWEST], json.dumps(newer).encode())
    job = _resumes_from(bench, run_id)
    reason = job.event("checkpoint_damaged")["reason"]
    assert "different steps" in reason or "history.jsonl is not of step" in reason
    bench.check_whole(run_id)


def _with_files(bench, run_id):
    """The checkpoints whose files are there, as attempt and step."""
    names = [
        key.removeprefix(bench.key(run_id, PRESENT)).split("/") for key in bench.place.names(bench.key(run_id, PRESENT))
    ]
    return {(int(attempt), int(step.removeprefix("step-"))) for attempt, step, *_ in names}


def test_retention_of_an_undisturbed_run(bench, finished):
    """Of a finished run the files of the last TUNE_CHECKPOINT_KEEP checkpoints remain, and every record."""
    assert _with_files(bench, finished) == {(1, 10), (1, 12)}
    assert list(commits(bench, finished)) == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_retention_after_a_crash(bench, run_id, keep):
    """Attempts that only fenced displace no checkpoint; after the successor's first own commit the dead attempts'
    files are gone, but for the checkpoint it resumed from where that is among those to keep."""
    for _ in range(2):
        bench.start(run_id, hooks=[["call_before", "job.state.checkpoints:restore", 1, "SIGKILL"]]).ends(KILLED)
        assert _with_files(bench, run_id) == {(1, BEFORE), (1, NEWEST)}
    hooks = [["commit_every_save"], ["kill_at_step", 11]]
    bench.start(run_id, hooks=hooks, checkpoint_keep=keep).ends(KILLED)
    assert _with_files(bench, run_id) == ({(4, 10)} if keep == 1 else {(1, NEWEST), (4, 10)})
    assert list(commits(bench, run_id)) == [2, 4, 6, 8, 10]
    bench.start(run_id, checkpoint_keep=keep).ends(0)
    bench.check_whole(run_id)
