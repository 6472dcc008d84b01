"""The image as a platform runs it: any uid, read-only root, no capabilities, no network but the S3 server.

`make image-test` builds it first (`tests/image.py`) and keeps what was measured in benchmarks/results/.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job.commands.demo.demo import BUCKET, DATA, LEAST_RIGHT_AFTER, MODEL, ORDERS, RUNS, SETTINGS_OF_THE_RUN
from tests import image
from tests.jobs import ROOT

pytestmark = [pytest.mark.image, pytest.mark.process, pytest.mark.timeout(3000)]
DEMO = {**SETTINGS_OF_THE_RUN, "TUNE_DEVICE": "cpu", "TUNE_CHECKPOINT_STEPS": "8"}
STOPPED_AFTER = 12
NOT_COMPILED = """
import json, sys
from pathlib import Path
import job.__main__, job.run
import unsloth
specs = [vars(module).get("__spec__") for module in list(sys.modules.values())]
modules = [spec for spec in specs if str(getattr(spec, "origin", "")).startswith(("/app/", "/opt/")) and spec.cached]
print(json.dumps([len(modules), [spec.name for spec in modules if not Path(spec.cached).exists()]]))
"""
SELF = """
import json, os, socket, pathlib
def refused(act):
    try:
        act()
    except OSError as error:
        return error.strerror or str(error)
status = dict(line.split(":\\t") for line in pathlib.Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "event": "self", "uid": os.getuid(), "groups": os.getgroups(),
    "capabilities": int(status["CapEff"], 16) | int(status["CapBnd"], 16),
    "seccomp": status["Seccomp"], "no_new_privileges": status["NoNewPrivs"],
    "root": refused(lambda: open("/app/x", "w")), "tmp": refused(lambda: open("/tmp/x", "w")),
    "outside": refused(lambda: socket.create_connection(("192.0.2.1", 443), timeout=5)),
    "server": refused(lambda: socket.create_connection(("127.0.0.1", 9000), timeout=5)),
}))
"""


@pytest.fixture(scope="module")
def measured():
    """What this run finds out; kept when IMAGE_RESULTS names a file."""
    found = {"date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count()}
    yield found
    if "IMAGE_RESULTS" in os.environ:
        Path(os.environ["IMAGE_RESULTS"]).write_text(json.dumps(found, indent=1) + "\n")


@pytest.fixture(scope="module")
def built(measured):
    """The image, built from this checkout."""
    measured |= image.build()
    measured["layers"] = image.layers()
    measured["megabytes"] = round(sum(layer["megabytes"] for layer in measured["layers"]))
    return image.IMAGE


@pytest.fixture(scope="module")
def yard(built, tmp_path_factory):
    """A place for containers, with the demo's model and data in its S3 server."""
    model = ROOT / ".demo" / "model"
    if not (model / "config.json").exists():
        subprocess.run([sys.executable, ROOT / "examples" / "smollm2.py", model], check=True)
    with image.yard(tmp_path_factory.mktemp("yard")) as found:
        shutil.copytree(model, found.data / BUCKET / MODEL)
        shutil.copytree(ORDERS, found.data / BUCKET / DATA)
        yield found


@pytest.fixture(scope="module")
def undisturbed(yard, measured):
    """The demo, in a container that nothing disturbs."""
    container = yard.start(**DEMO)
    code = container.wait()
    assert code == 0, container.lines[-3:]
    measured["demo_seconds"] = round(time.monotonic() - container.started, 1)
    return container


def _run(yard, run_id: str) -> Path:
    return yard.data / BUCKET / RUNS / run_id


def _adapter(yard, run_id: str) -> str:
    return hashlib.sha256((_run(yard, run_id) / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


def test_what_is_inside(built):
    """The image says what it is, carries its licence, does not run as root, and holds no tests, no pip and no other
    source than the job's."""
    config = json.loads(image.engine("image", "inspect", built))[0]["Config"]
    assert config["User"] == "10001:0"
    assert config["Entrypoint"] == ["/usr/bin/tini", "--", "python", "-m", "job"]
    assert config["Cmd"] == ["train"]
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items() if ".opencontainers." in name}
    assert labels["title"] == "finetune-job"
    assert labels["licenses"] == "Apache-2.0"
    listed = image.engine("run", "--rm", "--network=none", *image.podman_only(), "--entrypoint=find", built, "/app")
    files = {line.removeprefix("/app/") for line in listed.splitlines()}
    assert {"LICENSE", "job/run.py", "job/data/tokenizer/templates/alpaca.jinja"} <= files
    assert not [name for name in files if "test" in name]
    assert {name.partition("/")[0] for name in files - {"/app"}} == {"LICENSE", "job"}
    pip = ("--entrypoint=python", built, "-c", "import importlib.util; print(importlib.util.find_spec('pip'))")
    assert image.engine("run", "--rm", "--network=none", *image.podman_only(), *pip).strip() == "None"


def test_modules_are_compiled(built):
    """A start on a GPU finds all that it imports compiled, since a read-only root cannot keep what it compiles."""
    settings = ("--env=UNSLOTH_ALLOW_CPU=1", "--env=HOME=/scratch", "--env=UNSLOTH_COMPILE_LOCATION=/scratch/unsloth")
    command = ("run", "--rm", "--network=none", *image.podman_only(), *settings, "--entrypoint=python", built)
    modules, missing = json.loads(image.engine(*command, "-c", NOT_COMPILED).splitlines()[-1])
    assert modules > 4000
    assert missing == []


def test_how_it_is_confined(yard):
    """The containers of these tests are what they claim: a foreign uid, no capabilities, seccomp on, nothing writable
    but /scratch, nobody in reach but the S3 server."""
    container = yard.start("-c", SELF, options=("--entrypoint=python",))
    assert container.wait() == 0
    found = container.lines[0]
    assert (found["uid"], found["capabilities"], found["no_new_privileges"]) == (12345, 0, "1")
    assert found["seccomp"] == "2"  # filtered
    assert "Read-only" in found["root"]
    assert "Read-only" in found["tmp"]
    assert found["outside"]
    assert found["server"] is None


def test_no_gpu(yard, measured):
    """A container without a GPU refuses to train on its CPU unless configured to, within seconds, and says how."""
    started = time.monotonic()
    container = yard.start(**{**DEMO, "TUNE_DEVICE": "cuda"})
    assert container.wait() == 78
    measured["refusal_seconds"] = round(time.monotonic() - started, 1)
    assert "--gpus all" in container.events("run_failed")[0]["remedy"]


def test_preflight(yard):
    """The pre-flight passes where a run would, and finds that this server ignores conditional writes."""
    container = yard.start("preflight", **DEMO)
    assert container.wait() == 0, container.lines
    passed = {line["check"]: line for line in container.events("preflight_passed")}
    assert passed["scratch"]["path"].startswith("/scratch/")
    assert passed["output"]["conditional_writes"] is False


def test_demo(yard, undisturbed):
    """The demo's model learns its task in the container, and the run is whole."""
    run = _run(yard, SETTINGS_OF_THE_RUN["TUNE_RUN_ID"])
    assert json.loads((run / "done.json").read_text())["steps"] == int(DEMO["TUNE_MAX_STEPS"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    after = [line for line in lines if line["event"] == "sample" and line["phase"] == "after"]
    right = sum(line["answer"] == line["reference"] for line in after)
    assert right >= LEAST_RIGHT_AFTER * len(after)


def test_sigterm_and_resume(yard, undisturbed, measured):
    """SIGTERM to the container's first process commits and ends it with 75 within the grace; a second container goes
    on where it stopped and ends with the very adapter of the run that nothing disturbed."""
    given = {**DEMO, "TUNE_RUN_ID": "stopped"}
    first = yard.start(**given)
    first.until("train_progress", step=STOPPED_AFTER)
    asked = time.monotonic()
    first.signal(signal.SIGTERM)
    assert first.wait(60) == 75
    measured["stop_seconds"] = round(time.monotonic() - asked, 1)
    assert measured["stop_seconds"] < 15
    assert first.events("stopped_between_steps")[0]["committed"] is True

    second = yard.start(**given)
    assert second.wait() == 0, second.lines[-3:]
    resumed = second.events("resumed")[0]
    measured["resume_seconds_to_first_step"] = resumed["seconds_to_first_step"]
    assert resumed["resumed_step"] >= STOPPED_AFTER
    assert not second.events("resume_not_bitwise")
    assert _adapter(yard, "stopped") == _adapter(yard, SETTINGS_OF_THE_RUN["TUNE_RUN_ID"])


def test_second_signal(yard):
    """A container whose first process gets the signal twice ends at once, with 75."""
    container = yard.start(**{**DEMO, "TUNE_RUN_ID": "twice"})
    container.until("run_started")
    container.signal(signal.SIGTERM)
    time.sleep(1.5)
    if container.process.poll() is None:
        container.signal(signal.SIGTERM)
    assert container.wait(15) == 75
