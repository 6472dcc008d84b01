"""What a run is and what it has measured: `run.json` and `inputs.json`, pinned when training begins, and its history.

Attempts are in `attempts`, the order of events in `ledger`, the end of a run in `publication`.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import structlog

from job.observability import logs
from job.observability.json_text import encoded
from job.runtime import libraries
from job.runtime.errors import ConfigError, JobError, StorageError
from job.state.json_object import decode, encode, put
from job.state.ledger import Ledger, is_plan
from job.storage.base import Store

log = structlog.get_logger()
PACKAGES = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
SHOWN = 5


@functools.cache
def versions() -> dict[str, str]:
    """The installed versions of the training stack; looked up once, since every checkpoint records them."""
    return libraries.installed_versions(PACKAGES)


@dataclass(kw_only=True)
class Record:
    """One run's record under `<output>/<run id>/`."""

    ledger: Ledger
    """Of the same run. It knows the attempt, and the life: a run that starts over pins its settings and inputs again,
    under `lives/<life>/`."""
    _history: list[dict[str, Any]] = field(default_factory=list)
    _lines: list[bytes] = field(default_factory=list)
    """The same, encoded line by line as it grows: a long run has a hundred thousand lines."""

    @property
    def store(self) -> Store:
        """Where the run writes."""
        return self.ledger.store

    @property
    def run_id(self) -> str:
        """The run's name, and the prefix of its objects."""
        return self.ledger.run_id

    @property
    def attempt(self) -> int:
        """The number of this attempt."""
        return self.ledger.attempt

    @property
    def uri(self) -> str:
        """The run's prefix in the output."""
        return f"{self.store.uri.rstrip('/')}/{self.run_id}"

    def first(self) -> dict[str, Any] | None:
        """`run.json`: the run's settings and fingerprint when training first began, or None before that."""
        return self._read(self._pinned("run.json"))

    def inputs(self) -> dict[str, Any] | None:
        """`inputs.json`: the files that the first attempt that began training read, or None before that."""
        return self._read(self._pinned("inputs.json"))

    def pin(
        self,
        *,
        settings: dict[str, Any],
        inputs: dict[str, Any],
        fingerprint: dict[str, Any],
        reproducibility_facts: dict[str, Any],
    ) -> bool:
        """Create `run.json` and `inputs.json`, when everything is checked and training is about to begin. From here on
        the run's settings and inputs are fixed; a mistake that was found before leaves no trace.

        Args:
            settings: all settings by variable name.
            inputs: the body of `inputs.json`.
            fingerprint: see `job.state.fingerprint`.
            reproducibility_facts: the plan and the device, for an attempt that finds no checkpoint.

        Returns:
            False if another attempt has pinned other inputs before.
        """
        body = {
            "run_id": self.run_id,
            "config": logs.redact(settings),
            "fingerprint": fingerprint,
            "versions": versions(),
            **reproducibility_facts,
        }
        self._create("run.json", body)
        return self._create("inputs.json", inputs)

    def note(self, entry: dict[str, Any]) -> None:
        """Add a line to the history that becomes `metrics.jsonl`."""
        entry = {**entry, "attempt": self.attempt}
        self._history.append(entry)
        self._lines.append(encoded(logs.redact_data(entry)) + b"\n")

    def resume(self, history: bytes) -> None:
        """Continue the history of a checkpoint."""
        self._lines = history.splitlines(keepends=True)
        self._history = [json.loads(line) for line in self._lines]

    def noted(self, event: str, **fields: Any) -> Iterable[dict[str, Any]]:
        """The lines of an event that have these fields, newest first."""
        wanted = {"event": event, **fields}.items()
        return (entry for entry in reversed(self._history) if wanted <= entry.items())

    def history_text(self) -> bytes:
        """The history as JSON Lines."""
        return b"".join(self._lines)

    def remove_unfinished_uploads(self) -> None:
        """Remove what cancelled uploads of this run have left. Only for the attempt that publishes."""
        try:
            count = self.store.remove_unfinished(f"{self.run_id}/")
        except JobError as error:
            log.warning("unfinished_uploads_not_removed", reason=error.message)
        else:
            if count:
                log.info("unfinished_uploads_removed", count=count)

    def _create(self, name: str, body: dict[str, Any]) -> bool:
        """Create an object; returns whether its content is this one."""
        key, data = f"{self.run_id}/{self._pinned(name)}", encode(body)
        return put(self.store, key, data, conditional=self.ledger.conditional) == data

    def _pinned(self, name: str) -> str:
        return f"lives/{self.ledger.life:04d}/{name}" if self.ledger.life else name

    def _read(self, name: str) -> dict[str, Any] | None:
        data = self.store.read(f"{self.run_id}/{name}")
        if data is None:
            return None
        body = decode(data)
        if body is None or not _READABLE[name.rpartition("/")[2]](body):
            raise StorageError(f"{self.uri}/{name} is damaged.", remedy="Restore or remove it.")
        return body


def _names_files(body: dict[str, Any]) -> bool:
    """Whether an `inputs.json` has what is read of it."""
    files = body.get("files")
    named = isinstance(files, list) and all(
        isinstance(file, dict) and isinstance(file.get("name"), str) for file in files
    )
    return named and _is_date(body.get("date", "2026-01-01"))


def _is_date(value: Any) -> bool:
    try:
        return bool(datetime.date.fromisoformat(value))
    except (TypeError, ValueError):
        return False


def _describes_a_run(body: dict[str, Any]) -> bool:
    """Whether a `run.json` has what is read of it."""
    asked, plan = body.get("asked", {}), body.get("plan", {})
    return isinstance(body.get("fingerprint"), dict) and is_plan(plan) and isinstance(asked, dict)


_READABLE = {"run.json": _describes_a_run, "inputs.json": _names_files}


def check_inputs(run_id: str, pinned: dict[str, Any], inputs: dict[str, Any], *, added_too: bool = False) -> None:
    """Compare two `inputs.json` bodies: the run's, and that of the inputs as they are now.

    Args:
        run_id: for the message.
        pinned: the run's.
        inputs: the present one.
        added_too: whether a file that was added counts. A run in progress ignores it.

    Raises:
        ConfigError: a file was removed or changed.
    """
    changed = changed_inputs(pinned, inputs, added_too=added_too)
    if changed:
        shown = ", ".join(changed[:SHOWN]) + (f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else "")
        raise ConfigError(
            f"The inputs of run {run_id} changed since its first attempt: {shown}.",
            remedy="Set another TUNE_RUN_ID to train on the new inputs, or TUNE_RESUME=fresh to start this run over, "
            "or restore the old inputs.",
        )


def changed_inputs(pinned: dict[str, Any], now: dict[str, Any], *, added_too: bool) -> list[str]:
    """Names of the files that differ between two `inputs.json` bodies: removed, changed or added."""
    before, after = ({file["name"]: file for file in body.get("files", [])} for body in (pinned, now))
    names = before.keys() | after.keys() if added_too else before.keys()
    return sorted(name for name in names if before.get(name) != after.get(name))
