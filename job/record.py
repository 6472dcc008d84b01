"""What a run leaves behind besides its artefacts: run.json, inputs.json, attempts, metrics, and done.json last.

Everything here is small JSON, without secrets, written through the store.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from job import logs
from job.config import Config
from job.env import Process
from job.errors import ConfigError, JobError, StorageError
from job.storage.store import Store

LAYOUT = 1
PACKAGES = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
TRIES = 1000
SHOWN = 5


def versions() -> dict[str, str]:
    """The installed versions of the training stack."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(kw_only=True)
class Record:
    """One run's record under `<output>/<run id>/`."""

    store: Store
    run_id: str
    attempt: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def uri(self) -> str:
        """Where the run's files lie."""
        return f"{self.store.uri.rstrip('/')}/{self.run_id}"

    def finished(self) -> dict[str, Any] | None:
        """`done.json`, or None while the run is not whole."""
        return self._read("done.json")

    def repair_latest(self, done: dict[str, Any]) -> None:
        """Write `<output>/latest.json` if there is none: a crash may have lost it after `done.json` was written."""
        if self.store.head("latest.json") is None:
            self._write_latest(done)

    def claim_attempt(self, process: Process) -> int:
        """Create the next `attempts/<n>.json`; the number is this process's alone."""
        taken = [int(e.key.rpartition("/")[2][:4]) for e in self.store.entries(f"{self.run_id}/attempts/")]
        first = max(taken, default=0) + 1
        facts = {"host": process.host, "pod": process.pod, "started": _now(), "versions": versions()}
        for number in range(first, first + TRIES):
            if self._create(f"attempts/{number:04d}.json", {"attempt": number, **facts}):
                self.attempt = number
                return number
        raise StorageError(f"No free attempt number from {first} on in {self.uri}/attempts/.")

    def pinned(self, config: Config) -> dict[str, Any] | None:
        """`inputs.json`: what an earlier attempt read, or None if none got as far as training.

        Raises:
            ConfigError: an earlier attempt trained with other settings.
        """
        first = self._read("run.json")
        if first is not None:
            self.check_settings(config, first["config"])
        return self._read("inputs.json")

    def pin(self, config: Config, inputs: dict[str, Any]) -> None:
        """Create `run.json` and `inputs.json`, when all is checked and training is about to begin: from here on the
        run is what it is, and a mistake that was found before leaves no trace.

        Raises:
            ConfigError: another attempt pinned other settings or inputs.
        """
        body = {"layout": LAYOUT, "run_id": self.run_id, "config": config.as_variables(), "versions": versions()}
        if not (self._create("run.json", body) & self._create("inputs.json", inputs)):
            self.check_inputs(self.pinned(config) or {}, inputs)

    def check_settings(self, config: Config, first: dict[str, Any]) -> None:
        """Compare with the settings of the run's first attempt.

        Raises:
            ConfigError: some that decide the result differ; it lists them.
        """
        now = json.loads(json.dumps(config.fingerprint_fields()))
        changed = [f"{name} was {first.get(name)!r}, is {now[name]!r}" for name in now if first.get(name) != now[name]]
        if changed:
            raise ConfigError(
                f"Run {self.run_id} was started with other settings.",
                remedy="Set another TUNE_RUN_ID for the new settings, or restore the old ones.",
                problems=changed,
            )

    def check_inputs(self, pinned: dict[str, Any], inputs: dict[str, Any]) -> None:
        """Compare two `inputs.json` bodies: the run's, and what would be read now.

        Raises:
            ConfigError: a file was added, removed or changed.
        """
        changed = changed_inputs(pinned, inputs)
        if changed:
            shown = ", ".join(changed[:SHOWN]) + (f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else "")
            raise ConfigError(
                f"The inputs of run {self.run_id} changed since its first attempt: {shown}.",
                remedy="Set another TUNE_RUN_ID to train on the new inputs, or restore the old ones.",
            )

    def note(self, entry: dict[str, Any]) -> None:
        """Add a line to the history that becomes `metrics.jsonl`."""
        self.history.append({**entry, "attempt": self.attempt})

    def write_metrics(self) -> None:
        """Rewrite `metrics.jsonl` whole."""
        lines = [logs.redact(json.dumps(entry, ensure_ascii=False, default=str)) for entry in self.history]
        self.store.write(f"{self.run_id}/metrics.jsonl", "".join(f"{line}\n" for line in lines).encode())

    def finish(self, done: dict[str, Any]) -> None:
        """Create `done.json`, last of all, and point `latest.json` at this run. Its content has no clock and no host,
        so that a late attempt writes the same bytes."""
        self.write_metrics()
        body = {"layout": LAYOUT, "run_id": self.run_id, **done}
        self._create("done.json", body)
        self._write_latest(body)

    def end_attempt(self, outcome: dict[str, Any]) -> None:
        """Write how this attempt ended."""
        if self.attempt:
            self._write(f"attempts/{self.attempt:04d}.end.json", {"attempt": self.attempt, "ended": _now(), **outcome})

    def fail(self, error: BaseException) -> None:
        """Write `failure.json` and end the attempt."""
        known = isinstance(error, JobError)
        body = {
            "attempt": self.attempt,
            "kind": error.kind if isinstance(error, JobError) else "unknown",
            "exit_code": error.exit_code if isinstance(error, JobError) else 1,
            "message": error.message if isinstance(error, JobError) else f"{type(error).__name__}: {error}",
            "remedy": error.remedy if isinstance(error, JobError) else "",
        }
        if self.history:
            self.write_metrics()
        self._write("failure.json", body | {"time": _now(), "foreseen": known})
        self.end_attempt({"outcome": body["kind"], "exit_code": body["exit_code"]})

    def _write_latest(self, done: dict[str, Any]) -> None:
        body = {"run_id": self.run_id, "uri": self.uri, "artifacts": done["artifacts"]}
        self.store.write("latest.json", _encode(body).encode())

    def _read(self, name: str) -> dict[str, Any] | None:
        data = self.store.read(f"{self.run_id}/{name}")
        if data is None:
            return None
        try:
            body: dict[str, Any] = json.loads(data)
        except ValueError as error:
            raise StorageError(f"{self.uri}/{name} is damaged: {error}.", remedy="Restore or remove it.") from None
        return body

    def _create(self, name: str, body: dict[str, Any]) -> bool:
        return self.store.create(f"{self.run_id}/{name}", _encode(body).encode())

    def _write(self, name: str, body: dict[str, Any]) -> None:
        # Messages of errors are free text, which may quote anything; settings, inputs and artefacts are addresses and
        # numbers, and are compared later.
        self.store.write(f"{self.run_id}/{name}", logs.redact(_encode(body)).encode())


def changed_inputs(pinned: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the files that differ between two `inputs.json` bodies: added, removed or with other content."""
    before, after = ({file["name"]: file for file in body.get("files", [])} for body in (pinned, now))
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _encode(body: dict[str, Any]) -> str:
    return json.dumps(body, indent=2, ensure_ascii=False, default=str) + "\n"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
