"""`python -m job env`: what a bug report needs, quickly, whatever is wrong with the environment; without secrets."""

import json
import os
import resource
import subprocess
import sys
from importlib import metadata

import pytest

from tests.jobs import ROOT

pytestmark = pytest.mark.process

SECRET = "hunter2-hunter2"
PLANTED = {
    "HF_TOKEN": SECRET,
    "AWS_SECRET_ACCESS_KEY": "another-secret-value",
    "AWS_ENDPOINT_URL_S3": f"https://user:{SECRET}@minio.example:9000/deep-path",
    "https_proxy": "http://proxy:3128",
    "TUNE_OUTPUT": f"s3://bucket/{SECRET}",
    "TUNE_EPOCHS": f"many {SECRET}",
    "TUNE_MODEL": "hf_" + "a1" * 20,  # pasted into the wrong variable
    "TUNE_API_KEY": "short",
    "TUNE_DATASET": "https://u:pw@host/a?X-Amz-Signature=0a1b,hf://datasets/org/name@main",
    "CUDA_VISIBLE_DEVICES": "0",
}
HEAVY = ("torch", "transformers", "unsloth", "boto3", "datasets", "pyarrow")


def execute(*arguments, python=(), **variables):
    """`python -m job env` with these variables and no other of the job's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TUNE_", "AWS_", "HF_"))}
    command = [sys.executable, *python, "-m", "job", "env", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**kept, **variables}, capture_output=True, text=True, check=True, timeout=60
    )


def report(**variables) -> dict:
    return json.loads(execute("--json", **variables).stdout)


def test_versions_and_machine():
    """Versions of the training stack, the machine, its GPUs and limits, and the space for work."""
    found = report()
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["packages"].keys() >= {"torch", "unsloth", "transformers", "trl", "peft", "bitsandbytes"}
    assert found["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert found["job"]["version"] != "unknown"
    assert found["system"].keys() >= {"os", "kernel", "platform", "cpus", "cpu_quota", "memory_limit_bytes"}
    assert found["gpu"].keys() >= {"device", "driver", "driver_cuda", "torch_cuda", "cards"}
    assert found["scratch"]["free_bytes"] > 0


def test_the_image_says_what_it_is():
    """In the image version and revision come from its build."""
    found = report(FINETUNE_JOB_VERSION="9.9.9", FINETUNE_JOB_REVISION="abc123")
    assert found["job"] == {"version": "9.9.9", "revision": "abc123"}


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "JSON"])
def test_no_secret_is_shown(form):
    """Of credentials only the names are shown, of endpoints only the hosts, of variables what is not secret."""
    said = execute(*form, **PLANTED).stdout
    for secret in (SECRET, "another-secret-value", "hf_a1", "short", "deep-path", "pw@", "0a1b"):
        assert secret not in said
    for shown in (
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "minio.example:9000",
        "proxy:3128",
        "s3://bucket/***",
        "org/name@main",
    ):
        assert shown in said


def test_an_invalid_environment_is_shown():
    """What is set is shown however wrong it is, with the problems that a run would end with."""
    found = report(**PLANTED, RANK="first")
    assert found["variables"]["TUNE_EPOCHS"] == "many ***"
    assert found["variables"]["CUDA_VISIBLE_DEVICES"] == "0"
    assert {"TUNE_DATASET", "TUNE_EPOCHS", "TUNE_API_KEY", "RANK='first'"} <= {
        word.partition("=")[0] if word.startswith("TUNE") else word
        for problem in found["problems"]
        for word in problem.split()[:1]
    }


def test_a_scratch_that_is_unusable_is_named():
    """A scratch directory that cannot be made is part of the report, not the end of it."""
    found = report(TMPDIR="/proc/nowhere")
    assert "/proc/nowhere" in found["scratch"]["problem"]


def test_a_platform_is_recognised():
    """Kubernetes and the like are known by the variables that they set."""
    found = report(KUBERNETES_SERVICE_HOST="10.0.0.1", SLURM_JOB_ID="7")
    assert {"Kubernetes", "Slurm"} <= set(found["system"]["platform"])


def test_it_is_quick_and_imports_nothing_heavy():
    """It takes less than a second of the processor, and imports no training library."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = execute(python=("-X", "importtime"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "structlog" in imported
    assert imported.isdisjoint(HEAVY)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
