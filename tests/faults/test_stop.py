"""SIGTERM, SIGINT and SIGHUP: served between two steps with a commit where there is time, and always in time."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.faults.harness import INTERRUPTED
from tests.jobs import ROOT
from tests.servers import serve_proxy

SLACK_SECONDS = 1.0  # for a machine that is busy with other tests
PHASES = {
    "download": "job.inputs.pull:Puller.rest",
    "waiting for the weights": "job.stages.fetch:await_model",
    "tokenising": "job.run:prepare",
    "restoring": "job.state.checkpoints:restore",
    "model load": "job.tuning.model:load",
    "evaluation": "job.tuning.finetune:evaluate",
    "answers": "job.tuning.finetune:answer",
    "building the trainer": "job.tuning.finetune:build",
    "saving": "job.tuning.trainer.sft:write_adapter",
    "final record": "job.state.ledger:Ledger.append",
    "export": "job.tuning.export.adapter:save_adapter",
    "uploading": "job.state.publication:Publication.upload",
    "publishing": "job.state.publication:Publication.publish",
    "done.json": "job.state.publication:Publication.proclaim",
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_training(bench, number):
    """With time enough, a signal costs no step: the one under way is finished, committed, and resumed from."""
    run_id = bench.name("term")
    job = bench.start(run_id, hooks=[["slow_steps", 0.1]], checkpoint_steps=50, grace_seconds=30)
    job.until("train_progress", step=5)
    job.send(number)
    job.ends(INTERRUPTED)
    stopped = job.event("stopped_between_steps")
    assert stopped["committed"]
    assert job.event("interrupted")["signal"] == number.name
    assert bench.place.json(bench.key(run_id, "attempts/0001.end.json"))["outcome"] == "interrupted"
    second = bench.start(run_id).ends(0)
    assert second.event("resumed")["resumed_step"] == stopped["step"] >= 5
    bench.check_whole(run_id)


def test_a_signal_with_a_slow_link(bench):
    """Where the commit does not fit into the grace, the process ends within it anyway, and says 75."""
    run_id = bench.name("slow-link")

    def rule(seen):
        if seen.method == "PUT" and "/checkpoints/data/" in seen.path:
            seen.hang_seconds = 30

    with serve_proxy(bench.place.endpoint, rule) as proxy:
        job = bench.start(run_id, endpoint=proxy, hooks=[["slow_steps", 0.1]], grace_seconds=5)
        job.until("train_progress", step=4)
        job.send(signal.SIGTERM)
        asked = time.monotonic()
        job.ends(INTERRUPTED)
        assert time.monotonic() - asked < 5 + SLACK_SECONDS
    assert not job.events("checkpoint_committed")
    bench.start(run_id).ends(0)
    bench.check_whole(run_id)


def test_a_commit_that_would_not_fit_is_not_begun(bench):
    """What uploads have taken so far says whether another one fits: if not, nothing is saved and the end is quick."""
    run_id = bench.name("measured")

    def rule(seen):
        if seen.method == "PUT" and "optimizer.pt" in seen.path:
            seen.before = lambda: time.sleep(4)

    with serve_proxy(bench.place.endpoint, rule) as proxy:
        variables = {"hooks": [["slow_steps", 0.3]], "grace_seconds": 6, "max_steps": 60, "checkpoint_steps": 15}
        job = bench.start(run_id, endpoint=proxy, **variables)
        job.until("checkpoint_committed", seconds=30)
        job.send(signal.SIGTERM)
        asked = time.monotonic()
        job.ends(INTERRUPTED)
        assert time.monotonic() - asked < 4
    assert len(job.events("checkpoint_committed")) == 1


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_each_phase(bench, phase):
    """Whatever the run is doing, SIGTERM ends it with 75 in time, and the next attempt ends with the same adapter."""
    run_id = bench.name("phase")
    number = {"final record": 2, "evaluation": 3}.get(phase, 1)
    job = bench.start(run_id, hooks=[["call_before", PHASES[phase], number, "SIGTERM"]], eval_steps=2)
    job.ends(INTERRUPTED)
    assert job.event("interrupted")["exit_code"] == INTERRUPTED
    assert bench.place.json(bench.key(run_id, "attempts/0001.end.json"))["outcome"] == "interrupted"
    bench.start(run_id, eval_steps=2).ends(0)
    bench.check_whole(run_id)
    history = [json.loads(line) for line in bench.place.get(bench.key(run_id, "metrics.jsonl")).splitlines()]
    evaluated = [line["step"] for line in history if line["event"] == "evaluated"]
    assert evaluated == [0, 2, 4, 6, 8, 10, 12]


def test_a_signal_while_the_plan_is_made(bench):
    """What fits is no longer looked for, and no step is begun."""
    hooks = [["call_before", "job.tuning.fit.search:PassSearch.choose", 1, "SIGTERM"]]
    job = bench.start(bench.name("plan"), hooks=hooks).ends(INTERRUPTED)
    assert job.events("plan_made") + job.events("train_progress") == []


def test_a_signal_during_the_first_imports(tmp_path):
    """A signal that comes while the program itself is being imported ends it with 75 as well."""
    code = (
        "import os, runpy, signal, sys, types\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'job.config.environment':\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv = ['job']\n"
        "runpy.run_module('job', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == INTERRUPTED, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["event"] == "interrupted"


def test_a_signal_while_a_server_is_silent(bench):
    """Waiting for a server is cancelled at once."""

    def rule(seen):
        if seen.method == "GET" and "rows.jsonl" in seen.path:
            seen.hang_seconds = 20

    with serve_proxy(bench.place.endpoint, rule) as proxy:
        job = bench.start(bench.name("silent"), endpoint=proxy)
        job.until("run_started")
        time.sleep(0.5)
        job.send(signal.SIGTERM)
        asked = time.monotonic()
        job.ends(INTERRUPTED)
        assert time.monotonic() - asked < 3 + SLACK_SECONDS


def test_a_signal_during_c_code(bench):
    """C code that returns to Python too late does not keep the process beyond its grace, and the attempt's end is
    written down meanwhile."""
    run_id = bench.name("c-code")
    job = bench.start(run_id, hooks=[["block", "job.tuning.model:load", 20]], grace_seconds=6)
    job.until("library_output", message="the test blocks")
    time.sleep(0.5)  # on a busy machine the line arrives before the C code has begun
    job.send(signal.SIGTERM)
    asked = time.monotonic()
    job.ends(INTERRUPTED)
    assert time.monotonic() - asked < 6 + SLACK_SECONDS
    assert job.event("interrupted")["at_once"]
    assert bench.place.json(bench.key(run_id, "attempts/0001.end.json"))["outcome"] == "interrupted"


def test_a_second_signal_ends_at_once(bench):
    """Whoever asks twice does not want to wait for the grace."""
    job = bench.start(bench.name("twice"), hooks=[["block", "job.tuning.model:load", 60]], grace_seconds=120)
    job.until("library_output", message="the test blocks")
    job.send(signal.SIGTERM)
    time.sleep(2)
    job.send(signal.SIGTERM)
    asked = time.monotonic()
    job.ends(INTERRUPTED)
    assert time.monotonic() - asked < 3 + SLACK_SECONDS


def test_a_signal_that_somebody_swallowed(bench):
    """An exception that a library swallows is raised again."""
    job = bench.start(bench.name("swallowed"), hooks=[["swallow", "job.tuning.model:load"]], grace_seconds=20)
    job.until("dataset_ready")
    started = time.monotonic()
    job.ends(INTERRUPTED)
    assert time.monotonic() - started < 12  # the grace is 20, and what swallows sleeps for 30


def own_namespace() -> list[str]:
    """The command that starts another as the first process of a PID namespace: as root, or in a user namespace."""
    for own in ([], ["--user", "--map-root-user"]):
        command = ["unshare", *own, "--pid", "--fork", "--mount-proc"]
        if (
            shutil.which("unshare")
            and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
        ):
            return command
    return pytest.skip("this machine lets nobody make a PID namespace")


def test_pid_1(tiny_model, rows, tmp_path):
    """As the first process of a PID namespace, without an init, the job obeys SIGTERM, commits and leaves nothing
    running; the next one resumes."""
    namespace = own_namespace()
    settings = {
        "TUNE_MODEL": str(tiny_model),
        "TUNE_DATASET": str(rows),
        "TUNE_OUTPUT": str(tmp_path / "out"),
        "TUNE_RUN_ID": "first",
        "TUNE_MAX_STEPS": "80",
        "TUNE_MAX_LENGTH": "128",
        "TUNE_SAMPLES": "0",
        "TUNE_LOG_FORMAT": "json",
        "TMPDIR": str(tmp_path / "scratch"),
        "OMP_NUM_THREADS": "1",
    }
    command = [*namespace, sys.executable, "-m", "job"]
    with (tmp_path / "log").open("wb") as log:
        outer = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, stdout=log, stderr=log)
        import psutil

        deadline = time.monotonic() + 60
        while b'"step": 5,' not in (tmp_path / "log").read_bytes() and time.monotonic() < deadline:
            time.sleep(0.05)
        (inner,) = psutil.Process(outer.pid).children()
        family = inner.children(recursive=True)
        inner.send_signal(signal.SIGTERM)
        assert outer.wait(30) == INTERRUPTED, (tmp_path / "log").read_text()[-2000:]
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    stopped = next(line for line in lines if line["event"] == "stopped_between_steps")
    assert stopped["committed"]
    done = subprocess.run(
        [sys.executable, "-m", "job"],
        cwd=ROOT,
        env={**os.environ, **settings, "TUNE_GRACE_SECONDS": "9"},
        capture_output=True,
        check=True,
        timeout=120,
    )
    resumed = next(line for line in map(json.loads, done.stdout.splitlines()) if line["event"] == "resumed")
    assert resumed["resumed_step"] == stopped["step"]
