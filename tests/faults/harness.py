"""Jobs that are disturbed: how they are started, watched and killed, and what must be true in the end."""

import hashlib
import json
import os
import signal
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import psutil

from tests.jobs import KEPT
from tests.zygote import Zygote

SETTINGS = {
    "max_steps": 12,
    "batch_size": 4,
    "micro_batch": 2,
    "max_length": 128,
    "lora_r": 4,
    "lora_dropout": 0.1,
    "learning_rate": 1e-2,
    "checkpoint_steps": 2,
    "eval_steps": 5,
    "samples": 1,
    "log_format": "json",
    "storage_patience_minutes": 0.5,
}
INTERRUPTED, FENCED, STORAGE, PERMANENT, DENIED, CONFIG, KILLED = 75, 76, 74, 70, 77, 78, -signal.SIGKILL


@dataclass(kw_only=True)
class Job:
    """One attempt."""

    zygote: Zygote
    pid: int
    log: Path
    started: float = field(default_factory=time.monotonic)

    def lines(self) -> list[dict]:
        """What it logged so far; every whole line is JSON."""
        if not self.log.exists():
            return []
        text = self.log.read_bytes()
        return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]

    def events(self, name: str) -> list[dict]:
        """All events of one kind."""
        return [line for line in self.lines() if line["event"] == name]

    def event(self, name: str) -> dict:
        """The last event of one kind."""
        found = self.events(name)
        assert found, f"no {name} in {self.tail()}"
        return found[-1]

    def until(self, name: str, *, seconds: float = 60, **fields: Any) -> dict:
        """Wait for an event with these fields."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in self.events(name):
                if all(line.get(key) == value for key, value in fields.items()):
                    return line
            assert self.pid not in self.zygote.codes, f"ended before {name} {fields}: {self.tail()}"
            time.sleep(0.01)
        raise AssertionError(f"no {name} {fields} in {seconds} s: {self.tail()}")

    def tail(self) -> list:
        """The last lines, short."""
        lines = [line for line in self.lines() if line["event"] != "library_output"]
        return [str({k: v for k, v in line.items() if k not in ("timestamp", "config")})[:600] for line in lines[-6:]]

    def send(self, number: int) -> None:
        """A signal to the job's own process."""
        os.kill(self.pid, number)

    def family(self) -> list[psutil.Process]:
        """The processes that it started."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def uploader(self) -> psutil.Process:
        """The process that uploads its checkpoints."""
        return next(child for child in self.family() if "job.state.upload_worker" in child.cmdline())

    def kill(self) -> None:
        """What losing the machine does: SIGKILL to all of it."""
        family = self.family()
        for process in [psutil.Process(self.pid), *family]:
            process.kill()
        self.wait()
        psutil.wait_procs(family, timeout=10)

    def wait(self, seconds: float = 90) -> int:
        """The exit code, negative for a signal."""
        code = self.zygote.wait(self.pid, seconds)
        if code is None:
            tail = self.tail()
            self.kill()
            raise AssertionError(f"still running after {seconds} s: {tail}")
        return code

    def ends(self, code: int, seconds: float = 90) -> "Job":
        """Wait, and insist on the exit code."""
        found = self.wait(seconds)
        assert found == code, f"exit code {found}, not {code}: {self.tail()}"
        return self


@dataclass(kw_only=True)
class Place:
    """A bucket, as an observer sees it; jobs and this process reach it at `endpoint`."""

    bucket: str
    endpoint: str

    def __post_init__(self) -> None:
        self.client = boto3.client("s3", endpoint_url=self.endpoint)

    def names(self, prefix: str = "") -> list[str]:
        """All keys under a prefix."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def get(self, key: str) -> bytes:
        """An object's content."""
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def json(self, key: str) -> dict:
        """A JSON object's content."""
        return json.loads(self.get(key))

    def put(self, key: str, data: bytes) -> None:
        """Write an object."""
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def delete(self, key: str) -> None:
        """Delete an object."""
        self.client.delete_object(Bucket=self.bucket, Key=key)

    def unfinished(self) -> list[str]:
        """The keys of multipart uploads that were begun and not ended."""
        try:
            return [u["Key"] for u in self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", [])]
        except self.client.exceptions.NoSuchUpload:  # how rclone says that there is none
            return []


@dataclass(kw_only=True)
class Bench:
    """Starts jobs on one bucket and compares how they end with a run that nothing disturbed."""

    zygote: Zygote
    place: Place
    directory: Path
    common: dict[str, Any]
    baselines: dict[str, tuple[str, dict[int, float]]]

    def name(self, what: str = "run") -> str:
        """A run id of its own."""
        return f"{what}-{uuid.uuid4().hex[:8]}"

    def start(
        self, run_id: str, *, hooks: list[list] | None = None, endpoint: str | None = None, **variables: Any
    ) -> Job:
        """Start an attempt. Each of `hooks` is [a name in tests.faults.points, *its arguments]."""
        kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
        settings = {**self.common, "run_id": run_id, **variables}
        named = {(k if k.isupper() else f"TUNE_{k.upper()}"): str(v) for k, v in settings.items() if v is not None}
        scratch = self.directory / f"scratch-{uuid.uuid4().hex[:8]}"
        scratch.mkdir()
        environment = {**kept, "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch), **named}
        if endpoint:
            environment["AWS_ENDPOINT_URL_S3"] = endpoint
        log = self.directory / f"{run_id}-{uuid.uuid4().hex[:8]}.jsonl"
        request = {"env": environment, "log": str(log), "hooks": hooks or []}
        return Job(zygote=self.zygote, pid=self.zygote.fork(request), log=log)

    def key(self, run_id: str, name: str) -> str:
        """An object of a run."""
        return f"out/{run_id}/{name}"

    def result(self, run_id: str) -> tuple[str, dict[int, float]]:
        """SHA-256 of the published adapter, and the loss of each step."""
        prefix = self.place.json(self.key(run_id, "done.json"))["prefix"]
        adapter = self.place.get(self.key(run_id, f"{prefix}/adapter/adapter_model.safetensors"))
        metrics = self.place.get(self.key(run_id, f"{prefix}/metrics.jsonl"))
        lines = [json.loads(line) for line in metrics.splitlines()]
        losses = {line["step"]: line["loss"] for line in lines if line["event"] == "train_progress"}
        return hashlib.sha256(adapter).hexdigest(), losses

    def baseline(self, **variables: Any) -> tuple[str, dict[int, float]]:
        """The same of a run that nothing disturbed; made once for each set of settings."""
        key = json.dumps(variables, sort_keys=True, default=str)
        if key not in self.baselines:
            run_id = self.name("baseline")
            self.start(run_id, **variables).ends(0, 300)
            self.baselines[key] = self.result(run_id)
        return self.baselines[key]

    def check_whole(self, run_id: str, *, against: dict[str, Any] | None = None) -> None:
        """The oracles for a run that has ended with 0: the very adapter and losses of an undisturbed run; `done.json`
        tells the truth about every artefact; every commit that still has files verifies; no multipart upload is left.
        """
        assert self.result(run_id) == self.baseline(**(against or {}))
        done = self.place.json(self.key(run_id, "done.json"))
        for artifact in done["artifacts"]:
            data = self.place.get(self.key(run_id, f"{done['prefix']}/{artifact['name']}"))
            assert (len(data), hashlib.sha256(data).hexdigest()) == (artifact["size"], artifact["sha256"]), artifact
        assert self.place.json("out/latest.json")["run_id"]
        copied = self.place.get(self.key(run_id, "adapter/adapter_model.safetensors"))
        assert hashlib.sha256(copied).hexdigest() == self.result(run_id)[0]
        self.check_commits(run_id)
        assert not [key for key in self.place.unfinished() if f"/{run_id}/" in key]

    def check_commits(self, run_id: str) -> list[dict]:
        """Every checkpoint record of the run's present life whose files are there names exactly what is stored."""
        keys = self.place.names(self.key(run_id, "checkpoints/commits/"))
        records = [self.place.json(key) for key in keys]
        life = max((number for number, body in enumerate(records) if body["kind"] == "fresh"), default=0)
        present = [(key, body) for key, body in zip(keys, records, strict=True)][life:]
        newest = max((key for key, body in present if body["kind"] == "checkpoint"), default=None)
        for key, body in present:
            stored = set(self.place.names(f"out/{body['data']}/")) if body["kind"] == "checkpoint" else set()
            for file in body.get("files", []):
                name = f"out/{body['data']}/{file['name']}"
                if name not in stored:  # retired, perhaps by an attempt that was killed in the middle of that
                    assert key != newest, name
                    continue
                data = self.place.get(name)
                assert (len(data), hashlib.sha256(data).hexdigest()) == (file["size"], file["sha256"]), (key, file)
        return records


def killed_run(bench: Bench, what: str = "killed", step: int = 9, **variables: Any) -> str:
    """A run whose only attempt was killed at a step (of 12), when every checkpoint before was committed."""
    run_id = bench.name(what)
    bench.start(run_id, hooks=[["commit_every_save"], ["kill_at_step", step]], **variables).ends(KILLED)
    return run_id


def copied_run(bench: Bench, source: str, what: str = "copy") -> str:
    """Another run of the same content; its records name the new run. Cheaper than another training."""
    run_id = bench.name(what)
    for key in bench.place.names(bench.key(source, "")):
        name, data = key.removeprefix(bench.key(source, "")), bench.place.get(key)
        is_record = "/" not in name or name.startswith(("checkpoints/commits/", "attempts/"))
        bench.place.put(bench.key(run_id, name), data.replace(source.encode(), run_id.encode()) if is_record else data)
    return run_id


def commits(bench: Bench, run_id: str) -> dict[int, str]:
    """The key of the checkpoint record of each step, in order."""
    keys = bench.place.names(bench.key(run_id, "checkpoints/commits/"))
    records = {key: bench.place.json(key) for key in keys}
    return {body["step"]: key for key, body in records.items() if body["kind"] == "checkpoint"}


def damaged(data: bytes, how: str) -> bytes:
    """What is left of an object."""
    flipped = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
    return {"empty": b"", "truncated": data[: len(data) // 2], "flipped": flipped}[how]
