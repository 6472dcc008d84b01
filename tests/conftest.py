"""Servers that several tests share, and the environment in which boto3 finds them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import hypothesis
import pytest

from job.commands.demo.local_s3 import serve
from tests.jobs import ROOT
from tests.servers import ACCESS_KEY, SECRET_KEY, Rclone, serve_rclone

pytest_plugins = ["tests.quick"]

# The same examples every time, however slow the machine is; `make fuzz` looks for others.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")

# Test processes share the cores: with a thread for each core in each of them, all threads would wait for each other,
# spinning, and a training step would take 13 s instead of 2.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The endpoint of a server that honours conditional writes."""
    with serve() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rclone]:
    """A server on real files that a test can damage."""
    with serve_rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture
def s3_env(moto: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of a fresh bucket, in an environment that reaches it and nothing else."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return bucket


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama on disk, in several shards."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    subprocess.run([sys.executable, "-m", "tests.tiny", str(directory)], cwd=ROOT, check=True, capture_output=True)
    return directory


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short conversations as JSON Lines."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": f"Say the number {number}."},
                        {"role": "assistant", "content": f"It is {number * 7}."},
                    ]
                }
            )
            + "\n"
            for number in range(40)
        )
    )
    return path
