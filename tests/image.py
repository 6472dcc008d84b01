"""Build the image and run containers, with the engine that this machine has.

Docker where one runs; otherwise Debian's buildah and podman, on a Debian base made by debootstrap. Containers run as a
platform that trusts nobody would run them: any uid, read-only root, no capabilities, no network but one another's.
"""

from __future__ import annotations

import configparser
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGE = "localhost/finetune-job:test"
DEBIAN_BASE = "localhost/finetune-job-debian:bookworm"
CA = Path("/etc/ssl/certs/ca-certificates.crt")
CA_INSIDE = "/run/ca.pem"  # where the Dockerfile puts the secret ca.pem
LOCKED_DOWN = (
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--user=12345:12345",
    "--shm-size=64m",
)


@functools.cache
def docker() -> bool:
    """Whether a Docker engine answers."""
    if not shutil.which("docker"):
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


def _engine(*arguments: object) -> list[str]:
    """The command line that runs `docker ARGUMENTS` or what amounts to it."""
    words = [str(argument) for argument in arguments]
    if docker():
        return ["docker", *words]
    # Nothing here manages cgroups, and podman must not find a hierarchy that it may not write.
    alone = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec podman "$@"'
    return ["unshare", "--mount", "sh", "-c", alone, "podman", *words]


def engine(*arguments: object) -> str:
    """Run an engine's command; its output."""
    done = subprocess.run(_engine(*arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build() -> dict:
    """Build the image from this checkout's Dockerfile; how long it took, by whom, on which base."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        options, base = _pip_settings(Path(scratch)), ()
        if docker():
            command = ["docker", "build", "--tag", IMAGE, *options]
        else:
            base = ("--build-arg", f"BASE={_debian_base(Path(scratch))}")
            command = ["buildah", "bud", "--isolation=chroot", "--pull-never", "--format=docker", "--layers"]
            command += ["--tag", IMAGE, *base, *options]
        based = time.monotonic()
        subprocess.run([*command, str(ROOT)], check=True)
    return {
        "engine": engine("--version").strip(),
        "base": base[-1].partition("=")[2] if base else "of the Dockerfile",
        "base_seconds": round(based - started, 1),
        "build_seconds": round(time.monotonic() - based, 1),
    }


def _debian_base(scratch: Path) -> str:
    if subprocess.run(["podman", "image", "exists", DEBIAN_BASE], check=False).returncode:
        root = scratch / "root"
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(root)], check=True)
        with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
            subprocess.run(["podman", "import", "-", DEBIAN_BASE], stdin=tar.stdout, check=True)
    return DEBIAN_BASE


def _pip_settings(scratch: Path) -> list[str]:
    """This machine's own pip settings as the secret that the Dockerfile takes, and the directories that they name."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    parser = configparser.ConfigParser(interpolation=None)
    parser["global"] = {"cert": CA_INSIDE} if CA.exists() else {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        option = name.rpartition(".")[2]
        if option not in ("cert", "constraint"):
            parser["global"][option] = value.strip("'\"")
    with (scratch / "pip.conf").open("w") as file:
        parser.write(file)
    found = ["--secret", f"id=pip.conf,src={scratch / 'pip.conf'}"]
    found += ["--secret", f"id=ca.pem,src={CA}"] if CA.exists() else []
    if not docker():
        words = re.findall(r"(?:file://)?(/\S+)", " ".join(parser["global"].values()))
        places = {Path(word) for word in words if Path(word).is_dir()}
        # pip follows links from an index of files to its neighbours.
        places = {place.parent if place.name == "simple" else place for place in places}
        found += [word for place in sorted(places) for word in ("--volume", f"{place}:{place}:ro")]
    return found


def layers() -> list[dict]:
    """The image's layers, newest first: what made each, and its size in MB."""
    lines = engine("history", "--no-trunc", "--human=false", "--format={{json .}}", IMAGE).splitlines()
    found = [json.loads(line) for line in lines]
    found = found[0] if found and isinstance(found[0], list) else found
    rows = [{key.lower(): value for key, value in row.items()} for row in found]
    return [
        {"megabytes": round(int(row["size"]) / 1e6, 1), "made_by": " ".join(row["createdby"].split())[:200]}
        for row in rows
        if int(row["size"]) >= 1e5
    ]


@dataclass(kw_only=True)
class Container:
    """A container that is running or has ended."""

    name: str
    process: subprocess.Popen[str]
    started: float
    lines: list[dict] = field(default_factory=list)

    def until(self, event: str, **fields: object) -> dict:
        """Read the log until an event whose fields are at least these."""
        for text in self.process.stdout or ():
            self.lines.append(json.loads(text))
            line = self.lines[-1]
            if line["event"] == event and all(line.get(key, -1) >= value for key, value in fields.items()):
                return line
        raise AssertionError(f"no {event} {fields}; last: {self.lines[-3:]}")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the container's first process."""
        engine("kill", f"--signal={number.name}", self.name)

    def wait(self, seconds: float = 900) -> int:
        """The container's exit code."""
        output, _ = self.process.communicate(timeout=seconds)
        self.lines += [json.loads(line) for line in output.splitlines()]
        return self.process.returncode

    def events(self, name: str) -> list[dict]:
        """All events of one kind."""
        return [line for line in self.lines if line["event"] == name]


@dataclass(frozen=True, kw_only=True)
class Yard:
    """Containers that see one another on 127.0.0.1 and nothing else: one of them holds the network namespace and runs
    rclone's S3 server on `data`."""

    name: str
    data: Path
    scratch: Path
    endpoint: str = "http://127.0.0.1:9000"

    def start(self, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> Container:
        """Start a job in a new container with a new, empty scratch."""
        name = f"{self.name}-{time.monotonic_ns()}"
        scratch = self.scratch / name
        scratch.mkdir()
        scratch.chmod(0o777)
        given = {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": "demo",
            "AWS_SECRET_ACCESS_KEY": "demo-secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            **variables,
        }
        command = _engine(
            "run",
            "--rm",
            f"--name={name}",
            f"--network=container:{self.name}",
            *LOCKED_DOWN,
            *podman_only(),
            f"--volume={scratch}:/scratch",
            *(f"--env={key}={value}" for key, value in given.items()),
            *options,
            IMAGE,
            *arguments,
        )
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return Container(name=name, process=process, started=time.monotonic())


def podman_only() -> tuple[str, ...]:
    """What makes podman do as Docker does, and what it needs where nothing manages cgroups."""
    if docker():
        return ()
    limits = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096")
    return ("--cgroups=disabled", "--read-only-tmpfs=false", "--passwd=false", *limits)


@contextlib.contextmanager
def yard(directory: Path) -> Iterator[Yard]:
    """Start the S3 server's container; everything that runs in it ends with the block."""
    name = f"finetune-job-test-{os.getpid()}"
    data, scratch = directory / "data", directory / "scratch"
    data.mkdir()
    scratch.mkdir()
    program = Path(sys.executable).with_name("rclone")
    engine(
        "run",
        "--detach",
        "--rm",
        f"--name={name}",
        "--network=none",
        *(option for option in podman_only() if not option.startswith(("--read-only", "--passwd"))),
        f"--volume={program}:/rclone:ro",
        f"--volume={data}:/data",
        "--user=0:0",
        "--entrypoint=/rclone",
        IMAGE,
        *("serve", "s3", "/data", "--addr=127.0.0.1:9000", "--auth-key=demo,demo-secret"),
    )
    try:
        yield Yard(name=name, data=data, scratch=scratch)
    finally:
        subprocess.run(_engine("rm", "--force", name), capture_output=True, check=False)
