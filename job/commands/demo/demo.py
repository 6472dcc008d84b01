"""The demo: a small model learns to turn order e-mails into JSON, in one run of the real job against a local S3 server.

It does what a user does: puts a model and a dataset into a bucket, starts the job with nothing but environment
variables, follows its log, and reads the results from the bucket. It shows them to a person and judges them; it knows
nothing of how the job works inside. It needs a checkout (`examples/`) and the packages of the extra `demo`.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from rich.console import Console

from job.commands.demo import local_s3
from job.commands.demo.view import Sample, View, show_samples
from job.config import environment as env
from job.config.schema import SETTINGS
from job.runtime import credentials, libraries, signals
from job.runtime.errors import ConfigError, JobError

ROOT = Path(__file__).resolve().parents[3]
ORDERS = ROOT / "examples" / "orders"
BUCKET = "demo"
MODEL, DATA, RUNS, RUN = "models/smollm2-135m", "data/orders", "runs", "first"
SETTINGS_OF_THE_RUN = {
    "TUNE_MODEL": f"s3://{BUCKET}/{MODEL}",
    "TUNE_DATASET": f"s3://{BUCKET}/{DATA}/train.jsonl",
    "TUNE_EVAL_DATASET": f"s3://{BUCKET}/{DATA}/eval.jsonl",
    "TUNE_OUTPUT": f"s3://{BUCKET}/{RUNS}",
    "TUNE_RUN_ID": RUN,
    "TUNE_MAX_STEPS": "48",
    "TUNE_LEARNING_RATE": "1e-3",
    "TUNE_LORA_R": "8",
    "TUNE_LORA_ALPHA": "8",
    "TUNE_MAX_LENGTH": "256",
    "TUNE_EVAL_STEPS": "48",
    "TUNE_SAMPLES": "20",
    "TUNE_STORAGE_PATIENCE_MINUTES": "1",
}
UNCHECKED = "AWS4-HMAC-SHA256 Credential=demo/20260101/us-east-1/s3/aws4_request"
MOST_RIGHT_BEFORE, LEAST_RIGHT_AFTER = 0.1, 0.9
STOP_SECONDS = 15.0


def demo(*, directory: Path = ROOT / ".demo") -> int:
    """Run the demo and show it on stdout.

    Args:
        directory: where the converted model (kept for the next time), the log and the trained adapter go.

    Returns:
        0 if the job succeeded and the model learned the task; otherwise the job's exit code, or 1.

    Raises:
        ConfigError: this is not a checkout.
        JobError: the model could not be converted, or the run left no record.
    """
    signals.grace(STOP_SECONDS + 10)  # the job that it starts has its own
    started = time.monotonic()
    if not ORDERS.is_dir():
        raise ConfigError(f"The demo needs {ORDERS}.", remedy="Run it from a checkout of the repository: make demo.")
    console = Console(highlight=False, soft_wrap=True)
    directory.mkdir(parents=True, exist_ok=True)
    console.print("[bold]finetune-job demo[/]: SmolLM2-135M learns to turn order e-mails into JSON.\n")
    _convert(console, directory / "model")
    with local_s3.serve(log=directory / "s3.log") as endpoint:
        bucket = Bucket(endpoint)
        _fill(console, bucket, directory / "model")
        code = _run(console, endpoint, log=directory / "run.log")
        if code:
            console.print(f"[bold red]The job ended with exit code {code}.[/] Its log: {directory / 'run.log'}")
            return code if code > 0 else 1
        samples = _samples(bucket)
        _download_adapter(bucket, directory / "adapter")
    show_samples(console, samples)
    learned = _judge(console, samples)
    console.print(f"Adapter: s3://{BUCKET}/{RUNS}/{RUN}/adapter/, downloaded to {_shown(directory / 'adapter')}")
    console.print(f"Log:     {_shown(directory / 'run.log')}")
    console.print(f"Time:    {time.monotonic() - started:.0f} s in all\n")
    console.print(f"Try it:  {_try_it(directory, samples[0].email)}", markup=False)
    return 0 if learned else 1


def _convert(console: Console, model: Path) -> None:
    started = time.monotonic()
    command = [sys.executable, str(ROOT / "examples" / "smollm2.py"), str(model)]
    with console.status("converting SmolLM2-135M-Instruct to safetensors"):
        done = subprocess.run(
            command,
            env=credentials.without(libraries.child_environment()),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if done.returncode:
        raise JobError(
            f"The model could not be converted:\n{done.stdout.strip()}", remedy="Install requirements-dev.lock."
        )
    console.print(f"[green]✓[/] base model as safetensors in {_shown(model)} ({time.monotonic() - started:.1f} s)")


class Bucket:
    """A new bucket of the local server, by plain HTTP: that server wants a signature, but any will do.

    `job.storage` takes the endpoint and the credentials from its process's environment, and this process leaves its
    environment as the user set it.
    """

    def __init__(self, endpoint: str) -> None:
        self._address = urlsplit(endpoint).netloc
        self._request("PUT", "")

    def put(self, key: str, path: Path) -> None:
        """Store a file."""
        with path.open("rb") as body:
            self._request("PUT", f"/{key}", body=body, length=path.stat().st_size)

    def get(self, key: str) -> bytes:
        """An object's content.

        Raises:
            JobError: there is none.
        """
        return self._request("GET", f"/{key}")

    def _request(self, method: str, path: str, *, body: IO[bytes] | None = None, length: int = 0) -> bytes:
        headers = {"Authorization": UNCHECKED, "Content-Length": str(length)}
        connection = http.client.HTTPConnection(self._address, blocksize=1 << 20)
        with contextlib.closing(connection):
            connection.request(method, f"/{BUCKET}{path}", body=body, headers=headers)
            reply = connection.getresponse()
            content = reply.read()
        if reply.status != http.HTTPStatus.OK:
            raise JobError(f"The local S3 server answered {reply.status} to {method} s3://{BUCKET}{path}.")
        return content


def _fill(console: Console, bucket: Bucket, model: Path) -> None:
    started = time.monotonic()
    with console.status("uploading"):
        for path in sorted(path for path in model.iterdir() if path.is_file()):
            bucket.put(f"{MODEL}/{path.name}", path)
        for name in ("train.jsonl", "eval.jsonl"):
            bucket.put(f"{DATA}/{name}", ORDERS / name)
    console.print(f"[green]✓[/] a local S3 server with model and data ({time.monotonic() - started:.1f} s)")


def _run(console: Console, endpoint: str, *, log: Path) -> int:
    """Run the job as a container would and follow its log; returns its exit code."""
    console.print("[green]✓[/] starting [bold]python -m job[/] with these variables:")
    given = SETTINGS_OF_THE_RUN | {"AWS_ENDPOINT_URL_S3": endpoint}
    for name, value in given.items():
        console.print(f"    [dim]{name}={value}[/]")
    with (
        tempfile.TemporaryDirectory(prefix="tmp-", dir=log.parent) as scratch,
        log.open("w", encoding="utf-8") as record,
        _child(_environment(endpoint, scratch)) as child,
        View(console) as view,
    ):
        for line in child.stdout or ():
            record.write(line)
            with contextlib.suppress(json.JSONDecodeError):  # a crash dump of the interpreter is not JSON
                view.event(json.loads(line))
        return child.wait()


def _environment(endpoint: str, scratch: str) -> dict[str, str]:
    """The user's environment without credentials, and without anything that would lead the job elsewhere."""
    unset: dict[str, str | None] = {
        name: None for setting in SETTINGS for name in (setting.variable, setting.variable + env.FILE_SUFFIX)
    }
    unset |= dict.fromkeys(("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"))
    local = {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "TMPDIR": scratch,
    }
    return {**credentials.without(libraries.child_environment(**unset)), **SETTINGS_OF_THE_RUN, **local}


@contextlib.contextmanager
def _child(environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The job's process; it ends with the block, also when Ctrl-C leaves it early."""
    child = subprocess.Popen(
        [sys.executable, "-m", "job"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _samples(bucket: Bucket) -> list[Sample]:
    """The answers before and after, from the run's record in the bucket.

    Raises:
        JobError: the record has none.
    """
    lines = bucket.get(f"{RUNS}/{RUN}/metrics.jsonl").decode().splitlines()
    entries = [entry for entry in map(json.loads, lines) if entry["event"] == "sample"]
    emails = {}
    for row in (ORDERS / "eval.jsonl").read_text(encoding="utf-8").splitlines():
        *_, question, answer = json.loads(row)["messages"]
        emails[answer["content"]] = question["content"]
    after = {entry["index"]: entry["answer"] for entry in entries if entry["phase"] == "after"}
    samples = [
        Sample(
            email=emails[entry["reference"]],
            reference=entry["reference"],
            before=entry["answer"],
            after=after[entry["index"]],
        )
        for entry in entries
        if entry["phase"] == "before"
    ]
    if not samples:
        raise JobError(f"s3://{BUCKET}/{RUNS}/{RUN}/metrics.jsonl holds no samples.")
    return samples


def _download_adapter(bucket: Bucket, directory: Path) -> None:
    """The adapter that `done.json` lists, each file checked against the hash that stands there."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    done = json.loads(bucket.get(f"{RUNS}/{RUN}/done.json"))
    for file in done["artifacts"]:
        if not file["name"].startswith("adapter/"):
            continue
        content = bucket.get(f"{RUNS}/{RUN}/{done['prefix']}/{file['name']}")
        if hashlib.sha256(content).hexdigest() != file["sha256"]:
            raise JobError(f"{file['name']} is not what done.json says.")
        (directory / Path(file["name"]).name).write_bytes(content)


def _judge(console: Console, samples: list[Sample]) -> bool:
    """Say how many answers are exactly right, and whether the model learned its task."""
    count = len(samples)
    before = sum(sample.before == sample.reference for sample in samples)
    after = sum(sample.after == sample.reference for sample in samples)
    console.print(f"\nExactly right: before [bold]{before} of {count}[/], after [bold green]{after} of {count}[/]\n")
    if before > MOST_RIGHT_BEFORE * count or after < LEAST_RIGHT_AFTER * count:
        console.print(
            f"[bold red]That is not what the demo should show[/]: expected at most {MOST_RIGHT_BEFORE:.0%} before"
            f" and at least {LEAST_RIGHT_AFTER:.0%} after.\n"
        )
        return False
    return True


def _shown(path: Path) -> Path:
    """Relative to where the user stands, if it is below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _try_it(directory: Path, email: str) -> str:
    words = " ".join(email.split()).replace('"', "'")
    script = _shown(ROOT / "examples" / "try_adapter.py")
    model, adapter = _shown(directory / "model"), _shown(directory / "adapter")
    return f'{_shown(Path(sys.executable))} {script} {model} {adapter} "{words}"'
