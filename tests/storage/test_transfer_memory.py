"""Large objects pass without taking memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from tests.servers import serve_rclone

pytestmark = pytest.mark.process

GIB = 1 << 30
CLIENT = """
import json, resource, sys
from pathlib import Path
from job.storage.open import open_store

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

uri, source, target = sys.argv[1:]
store = open_store(uri)
store.head("nothing")  # boto3 is loaded
start = peak()
store.upload(Path(source), "object")
store.download(store.head("object"), Path(target))
print(json.dumps(peak() - start))
"""


@pytest.fixture
def space(tmp_path: Path) -> Iterator[Path]:
    """A directory with room for the object; memory where there is plenty, since a disk's speed is not the matter."""
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > 4 * GIB:
        with tempfile.TemporaryDirectory(dir=memory) as directory:
            yield Path(directory)
    else:
        yield tmp_path


def test_memory(s3_env: str, monkeypatch: pytest.MonkeyPatch, space: Path) -> None:
    """1 GiB goes up and comes down with less than 300 MiB of memory; `bench-storage --size-gib 5` does it with 5."""
    source, target = space / "source", space / "target"
    with source.open("wb") as file:
        file.truncate(GIB)
        file.seek(GIB // 2)
        file.write(b"not only zeros")
    (space / "objects").mkdir()
    with serve_rclone(space / "objects") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        boto3.client("s3").create_bucket(Bucket=s3_env)
        result = subprocess.run(
            [sys.executable, "-c", CLIENT, f"s3://{s3_env}", str(source), str(target)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
    assert json.loads(result.stdout.splitlines()[-1]) < 300 << 20
    assert target.stat().st_size == GIB
    with target.open("rb") as file:
        file.seek(GIB // 2)
        assert file.read(14) == b"not only zeros"
