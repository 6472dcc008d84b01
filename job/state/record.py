"""What a run leaves behind besides its artefacts: run.json, inputs.json, metrics, and done.json last.

Everything here is small JSON, without secrets, written through the store. The attempts are in `attempts`, the
checkpoints' records in `ledger`.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import structlog

from job.config.schema import Config
from job.observability import logs
from job.runtime import libraries
from job.runtime.errors import AccessDeniedError, ConfigError, FencedError, StorageError
from job.storage.base import Store, create

log = structlog.get_logger()
LAYOUT = 1
PACKAGES = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
SHOWN = 5
STAYS = ("checkpoints/", "attempts/", "aside/")  # when a run is set aside; the ledger says where a new life begins


@functools.cache
def versions() -> dict[str, str]:
    """The installed versions of the training stack; looked up once, since every checkpoint names them."""
    return libraries.installed(PACKAGES)


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
    """The history as it is written, made line by line: a long run has a hundred thousand."""

    @property
    def uri(self) -> str:
        """Where the run's files lie."""
        return f"{self.store.uri.rstrip('/')}/{self.run_id}"

    def finished(self) -> dict[str, Any] | None:
        """`done.json`, or None while the run is not whole."""
        return self._read("done.json")

    def latest_is_whole(self) -> bool:
        """Whether `<output>/latest.json` names a run."""
        data = self.store.read("latest.json")
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return data is not None and bool(json.loads(data)["run_id"])
        return False

    def write_latest(self, done: dict[str, Any]) -> None:
        """Let `<output>/latest.json` name this run."""
        body = {"layout": LAYOUT, "run_id": self.run_id, "uri": self.uri, "artifacts": done["artifacts"]}
        self.store.write("latest.json", _encode(body).encode())

    def first(self) -> dict[str, Any] | None:
        """`run.json`: what the run was when its training first began, or None before that."""
        return self._read("run.json")

    def inputs(self) -> dict[str, Any] | None:
        """`inputs.json`: what the first attempt that got as far as training read."""
        return self._read("inputs.json")

    def pin(
        self,
        config: Config,
        *,
        inputs: dict[str, Any],
        fingerprint: dict[str, Any],
        reproducibility_facts: dict[str, Any],
    ) -> bool:
        """Create `run.json` and `inputs.json`, when all is checked and training is about to begin: from here on the
        run is what it is, and a mistake that was found before leaves no trace.

        Args:
            reproducibility_facts: the plan and the device, for an attempt that finds no checkpoint.

        Returns:
            Whether the inputs are now pinned to these, not to what another attempt read.
        """
        body = {
            "layout": LAYOUT,
            "run_id": self.run_id,
            "config": config.as_variables(),
            "fingerprint": fingerprint,
            "versions": versions(),
            **reproducibility_facts,
        }
        self._create("run.json", body)
        return self._create("inputs.json", {"layout": LAYOUT, **inputs})

    def check_inputs(self, pinned: dict[str, Any], inputs: dict[str, Any], *, added_too: bool = False) -> None:
        """Compare two `inputs.json` bodies: the run's, and what would be read now.

        Args:
            added_too: whether a file that was added counts. A run in progress reads what it began with.

        Raises:
            ConfigError: a file was removed or changed.
        """
        changed = changed_inputs(pinned, inputs, added_too=added_too)
        if changed:
            shown = ", ".join(changed[:SHOWN]) + (f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else "")
            raise ConfigError(
                f"The inputs of run {self.run_id} changed since its first attempt: {shown}.",
                remedy="Set another TUNE_RUN_ID to train on the new inputs, or TUNE_RESUME=fresh to set the old run "
                "aside, or restore the old inputs.",
            )

    def note(self, entry: dict[str, Any]) -> None:
        """Add a line to the history that becomes `metrics.jsonl`."""
        entry = {**entry, "attempt": self.attempt}
        self._history.append(entry)
        self._lines.append(json.dumps(logs.redact(entry), ensure_ascii=False, default=str).encode() + b"\n")

    def resume(self, history: bytes) -> None:
        """Take the history up to a checkpoint over."""
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
        """Create `done.json`, last of all, and point `latest.json` at this run. Its content has no clock and no host,
        so that a late attempt writes the same bytes.

        Raises:
            FencedError: there is one already, and it tells of something else.
        """
        self.store.write(f"{self.run_id}/metrics.jsonl", self.history_text())
        body = {"layout": LAYOUT, "run_id": self.run_id, **done}
        if not self._create("done.json", body) and self.finished() != json.loads(_encode(body)):
            raise FencedError(
                f"{self.uri}/done.json exists and tells of another result.",
                remedy="Another attempt has published this run: use what it lists, or start over with another run id.",
            )
        self.write_latest(body)

    def set_aside(self) -> str | None:
        """Copy what an older life of this run has published to `aside/<attempt>/`, then take it away from where a new
        life puts its own. Checkpoints stay where they are.

        Returns:
            where to, or None if there was nothing.
        """
        prefix = f"{self.run_id}/"
        keys = [e.key for e in self.store.list_objects(prefix) if not e.key.removeprefix(prefix).startswith(STAYS)]
        aside = f"{prefix}aside/{self.attempt:04d}/"
        for key in keys:
            self.store.copy(key, aside + key.removeprefix(prefix))
        for key in sorted(keys, key=lambda key: not key.endswith("/done.json")):  # what says "whole" goes first
            self.store.delete(key)
        return f"{self.store.uri.rstrip('/')}/{aside}" if keys else None

    def sweep(self) -> None:
        """Remove what broken-off uploads of this run have left. Only for the attempt that publishes."""
        try:
            swept = self.store.sweep(f"{self.run_id}/")
        except (AccessDeniedError, StorageError) as error:
            log.warning("unfinished_uploads_not_removed", reason=error.message)
        else:
            if swept:
                log.info("unfinished_uploads_removed", count=swept)

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
        data = _encode(body).encode()
        return create(self.store, f"{self.run_id}/{name}", data, conditional=self.conditional)


def changed_inputs(pinned: dict[str, Any], now: dict[str, Any], *, added_too: bool) -> list[str]:
    """Names of the files that differ between two `inputs.json` bodies: removed, with other content, or added."""
    before, after = ({file["name"]: file for file in body.get("files", [])} for body in (pinned, now))
    names = before.keys() | after.keys() if added_too else before.keys()
    return sorted(name for name in names if before.get(name) != after.get(name))


def _encode(body: dict[str, Any]) -> str:
    return json.dumps(body, indent=2, ensure_ascii=False, default=str) + "\n"
