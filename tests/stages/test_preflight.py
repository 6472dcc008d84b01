"""Is this machine fit for a run? Real mounts, a real store, a real shared library in the place of the driver's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import boto3
import pytest

from job.runtime.errors import ConfigError
from job.stages import preflight
from tests.jobs import ROOT
from tests.servers import serve_proxy

pytestmark = pytest.mark.process

NEEDED = {"TUNE_MODEL": "org/model", "TUNE_DATASET": "/data.jsonl", "TUNE_DEVICE": "cpu", "TUNE_LOG_FORMAT": "json"}
NOEXEC = shutil.which("unshare") and subprocess.call(["unshare", "-m", "true"], stderr=subprocess.DEVNULL) == 0


def _preflight(*prefix, **variables):
    """Run `python -m job preflight` in the present environment; its exit code, its lines, and the bad one."""
    environment = {**os.environ, **NEEDED, **{name: str(value) for name, value in variables.items()}}
    command = [*prefix, sys.executable, "-m", "job", "preflight"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, lines, next((line for line in lines if line["event"] == "run_failed"), None)


def test_fit(s3_env):
    """Where all is well it says so line by line, ends with 0, and leaves nothing in the output."""
    code, lines, _ = _preflight(TUNE_OUTPUT=f"s3://{s3_env}/runs")
    assert code == 0
    passed = {line["check"]: line for line in lines if line["event"] == "preflight_passed"}
    assert list(passed) == ["configuration", "scratch", "output"]
    assert passed["output"]["conditional_writes"] is True
    assert len({line["run_id"] for line in lines}) == 1
    assert lines[-1]["event"] == "preflight_complete"
    assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket=s3_env)


def test_a_store_without_conditional_writes(rclone, s3_env, monkeypatch):
    """It says what a run could rely on at this store."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", rclone.endpoint)
    boto3.client("s3").create_bucket(Bucket=s3_env)  # not by mkdir: rclone remembers a listing for minutes
    code, lines, _ = _preflight(TUNE_OUTPUT=f"s3://{s3_env}/runs")
    assert code == 0
    passed = {line["check"]: line for line in lines if line["event"] == "preflight_passed"}
    assert passed["output"]["conditional_writes"] is False


def test_refused_credentials(rclone, s3_env):
    """Credentials that may not write the output end it with 77."""
    code, _, failed = _preflight(
        TUNE_OUTPUT="s3://preflight/runs", AWS_ENDPOINT_URL_S3=rclone.endpoint, AWS_SECRET_ACCESS_KEY="wrong"
    )
    assert (code, failed["exit_code"]) == (77, 77)


def test_deletes_denied(moto, s3_env):
    """Credentials that may not delete are warned of, as a run warns: it continues and keeps every checkpoint."""

    def rule(seen):
        if seen.method == "DELETE":
            seen.refuse = (403, "AccessDenied")

    with serve_proxy(moto, rule) as proxy:
        code, lines, _ = _preflight(TUNE_OUTPUT=f"s3://{s3_env}/runs", AWS_ENDPOINT_URL_S3=proxy)
    assert code == 0
    left = next(line for line in lines if line["event"] == "preflight_object_not_deleted")
    found = boto3.client("s3").list_objects_v2(Bucket=s3_env)["Contents"]
    assert [entry["Key"] for entry in found] == [f"runs/{left['key']}"]


def test_missing_bucket(s3_env):
    """An output whose bucket does not exist is named."""
    code, _, failed = _preflight(TUNE_OUTPUT=f"s3://{s3_env}-not-there/runs")
    assert code == 65
    assert f"{s3_env}-not-there" in failed["message"]


def test_bad_endpoint(tmp_path, s3_env):
    """An endpoint without a scheme is a mistake in the configuration, and the message shows the right form."""
    code, _, failed = _preflight(TUNE_OUTPUT=f"s3://{s3_env}/runs", AWS_ENDPOINT_URL_S3="minio:9000")
    assert code == 78
    assert "minio:9000" in failed["message"]
    assert "https://" in failed["remedy"]


@pytest.mark.parametrize(
    ("place", "says"),
    [({"WORLD_SIZE": "2"}, "WORLD_SIZE=2"), ({"RANK": "first"}, "RANK='first' is not a whole number")],
    ids=["several processes", "no number"],
)
def test_what_a_launcher_sets(tmp_path, place, says):
    """A launcher that starts several processes, or sets nonsense, is refused before a run would be."""
    code, _, failed = _preflight(TUNE_OUTPUT=tmp_path, **place)
    assert code == 78
    assert says in " ".join([failed["message"], *failed.get("problems", [])])


def test_bad_configuration():
    """A bad variable ends it as it ends a run."""
    code, _, failed = _preflight(TUNE_OUTPUT="/tmp/runs", TUNE_EPOCHS="many")
    assert code == 78
    assert "TUNE_EPOCHS" in failed["problems"][0]


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU")
def test_everything_wrong_with_the_machine_at_once(tmp_path):
    """No GPU and no place to write are reported together, each with its remedy."""
    (tmp_path / "file").touch()
    code, _, failed = _preflight(TUNE_OUTPUT=tmp_path, TUNE_DEVICE="cuda", TMPDIR=tmp_path / "file")
    assert code == 78
    gpu, scratch = failed["problems"]
    assert "no GPU device" in gpu
    assert "--gpus all" in gpu
    assert str(tmp_path / "file") in scratch
    assert "TMPDIR" in scratch


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU")
@pytest.mark.parametrize("batching", ["packed", "padding_free"])
def test_batches_that_need_a_gpu(tmp_path, batching):
    """What only a GPU can train is refused before anything is downloaded or loaded, also where any device will do."""
    code, _, failed = _preflight(TUNE_OUTPUT=tmp_path, TUNE_DEVICE="auto", TUNE_BATCHING=batching)
    assert code == 78
    assert f"TUNE_BATCHING={batching} needs a GPU, and this machine shows none" in failed["message"]
    assert "TUNE_BATCHING=auto or padded" in failed["remedy"]


def test_scratch_that_cannot_be_written(tmp_path):
    """TMPDIR is taken at its word: no other directory is used in silence."""
    code, _, failed = _preflight(TUNE_OUTPUT=tmp_path, TMPDIR="/proc/nowhere")
    assert code == 78
    assert "/proc/nowhere" in failed["message"]


@pytest.mark.skipif(not NOEXEC, reason="needs a mount namespace")
@pytest.mark.parametrize(("compiles", "refused"), [(True, True), (False, False)], ids=["GPU", "CPU"])
def test_noexec(tmp_path, compiles, refused):
    """A scratch mounted noexec is refused where kernels are compiled, which is on a GPU."""
    script = f"""
from pathlib import Path
from job.stages import preflight
preflight.check_scratch(Path({str(tmp_path)!r}), compiles={compiles})
"""
    mounted = f'mount -t tmpfs -o noexec none {tmp_path} && exec "$0" -c "$1"'
    command = ["unshare", "-m", "sh", "-c", mounted, sys.executable, script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) is refused, done.stderr
    assert ("noexec" in done.stderr) is refused


@pytest.mark.skipif(not NOEXEC, reason="needs a mount namespace")
def test_small_shared_memory(tmp_path):
    """Less shared memory than Docker's default is warned of, not refused."""
    mounted = 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"'
    code, lines, _ = _preflight("unshare", "-m", "sh", "-c", mounted, "sh", TUNE_OUTPUT=tmp_path / "out")
    assert code == 0
    warning = next(line for line in lines if line["event"] == "shared_memory_small")
    assert warning["total_bytes"] == 1 << 20
    assert "--shm-size" in warning["remedy"]


@pytest.mark.parametrize(
    ("driver", "refused"),
    [
        pytest.param((12, 8), True, id="older major"),
        pytest.param((13, 0), False, id="same"),
        pytest.param((13, 5), False, id="newer minor"),
        pytest.param((14, 0), False, id="newer major"),
    ],
)
def test_driver(driver, refused):
    """A driver of an older major version of CUDA is refused, with both versions."""
    if not refused:
        preflight.check_driver(driver, (13, 0))
        return
    with pytest.raises(ConfigError, match=r"CUDA 12\.8, and this image needs CUDA 13") as raised:
        preflight.check_driver(driver, (13, 0))
    assert "driver" in raised.value.remedy


def test_a_driver_of_any_major_version_suits_a_torch_without_cuda():
    """Nothing is asked of the driver by a torch that was built without CUDA."""
    preflight.check_driver((11, 0), None)


@pytest.mark.gpu
def test_a_real_gpu(tmp_path):
    """On a machine with a GPU the check passes and names the card and its driver."""
    code, lines, _ = _preflight(TUNE_OUTPUT=tmp_path / "out", TUNE_DEVICE="cuda")
    assert code == 0
    gpu = next(line for line in lines if line.get("check") == "gpu")
    assert gpu["gpus"]
    assert float(gpu["driver_cuda"]) >= 12
