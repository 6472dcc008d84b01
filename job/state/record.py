"""The record of a run in its output: run.json and inputs.json first, metrics.jsonl, and done.json last.

Knows small JSON objects, without secrets. Attempts are in `attempts`, the records of checkpoints in `ledger`.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import structlog

from job.observability import logs
from job.runtime import libraries
from job.runtime.errors import AccessDeniedError, ConfigError, FencedError, StorageError
from job.state.json_object import encode
from job.storage.base import Store, create

log = structlog.get_logger()
PACKAGES = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
SHOWN = 5
NOT_ARCHIVED = ("checkpoints/", "attempts/", "aside/")  # the ledger says where the run started over


@functools.cache
def versions() -> dict[str, str]:
    """The installed versions of the training stack; looked up once, since every checkpoint records them."""
    return libraries.installed_versions(PACKAGES)


@dataclass(kw_only=True)
class Record:
    """One run's record under `<output>/<run id>/`."""

    store: Store
    run_id: str
    attempt: int = 0
    conditional: bool = True
    """Whether the store honours conditional writes (`job.state.ledger`)."""
    _history: list[dict[str, Any]] = field(default_factory=list)
    _lines: list[bytes] = field(default_factory=list)
    """The same, encoded line by line as it grows: a long run has a hundred thousand lines."""

    @property
    def uri(self) -> str:
        """The run's prefix in the output."""
        return f"{self.store.uri.rstrip('/')}/{self.run_id}"

    def finished(self) -> dict[str, Any] | None:
        """`done.json`, or None while the run is not complete."""
        return self._read("done.json")

    def latest_is_whole(self) -> bool:
        """Whether `<output>/latest.json` names a run."""
        data = self.store.read("latest.json")
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return data is not None and bool(json.loads(data)["run_id"])
        return False

    def write_latest(self, done: dict[str, Any]) -> None:
        """Let `<output>/latest.json` name this run."""
        body = {"run_id": self.run_id, "uri": self.uri, "artifacts": done["artifacts"]}
        self.store.write("latest.json", encode(body))

    def first(self) -> dict[str, Any] | None:
        """`run.json`: the run's settings and fingerprint when training first began, or None before that."""
        return self._read("run.json")

    def inputs(self) -> dict[str, Any] | None:
        """`inputs.json`: the files that the first attempt that began training read, or None before that."""
        return self._read("inputs.json")

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
            False if another attempt has pinned the inputs before.
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

    def check_inputs(self, pinned: dict[str, Any], inputs: dict[str, Any], *, added_too: bool = False) -> None:
        """Compare two `inputs.json` bodies: the run's, and that of the inputs as they are now.

        Args:
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
                f"The inputs of run {self.run_id} changed since its first attempt: {shown}.",
                remedy="Set another TUNE_RUN_ID to train on the new inputs, or TUNE_RESUME=fresh to archive the old "
                "run and start over, or restore the old inputs.",
            )

    def note(self, entry: dict[str, Any]) -> None:
        """Add a line to the history that becomes `metrics.jsonl`."""
        entry = {**entry, "attempt": self.attempt}
        self._history.append(entry)
        self._lines.append(json.dumps(logs.redact_data(entry), ensure_ascii=False, default=str).encode() + b"\n")

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

    def finish(self, done: dict[str, Any]) -> None:
        """Create `done.json`, last of all, and point `latest.json` at this run. Its content has no time and no host,
        so that a late attempt writes the same bytes.

        Raises:
            FencedError: it exists and describes a different result.
        """
        self.store.write(f"{self.run_id}/metrics.jsonl", self.history_text())
        body = {"run_id": self.run_id, **done}
        if not self._create("done.json", body) and self.finished() != json.loads(encode(body)):
            raise FencedError(
                f"{self.uri}/done.json exists and describes a different result.",
                remedy="Another attempt has published this run: use what it lists, or start over with another run id.",
            )
        self.write_latest(body)

    def archive(self) -> str | None:
        """Move everything that was published under this run id to `aside/<attempt>/`, so that the run can start over.
        Checkpoints and attempts stay where they are.

        Returns:
            where to, or None if there was nothing.
        """
        prefix = f"{self.run_id}/"
        published = [
            entry.key
            for entry in self.store.list_objects(prefix)
            if not entry.key.removeprefix(prefix).startswith(NOT_ARCHIVED)
        ]
        target = f"{prefix}aside/{self.attempt:04d}/"
        for key in published:
            self.store.copy(key, target + key.removeprefix(prefix))
        for key in sorted(published, key=lambda key: not key.endswith("/done.json")):  # the marker goes first
            self.store.delete(key)
        return f"{self.store.uri.rstrip('/')}/{target}" if published else None

    def remove_unfinished_uploads(self) -> None:
        """Remove what cancelled uploads of this run have left. Only for the attempt that publishes."""
        try:
            count = self.store.remove_unfinished(f"{self.run_id}/")
        except (AccessDeniedError, StorageError) as error:
            log.warning("unfinished_uploads_not_removed", reason=error.message)
        else:
            if count:
                log.info("unfinished_uploads_removed", count=count)

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
        return create(self.store, f"{self.run_id}/{name}", encode(body), conditional=self.conditional)


def changed_inputs(pinned: dict[str, Any], now: dict[str, Any], *, added_too: bool) -> list[str]:
    """Names of the files that differ between two `inputs.json` bodies: removed, changed or added."""
    before, after = ({file["name"]: file for file in body.get("files", [])} for body in (pinned, now))
    names = before.keys() | after.keys() if added_too else before.keys()
    return sorted(name for name in names if before.get(name) != after.get(name))
