"""The training process's side of the uploads: hands checkpoints over, hears how they fared, never waits in between."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import structlog

from job.runtime import libraries
from job.runtime.errors import KINDS, JobError, StorageError

log = structlog.get_logger()
MOST_DEATHS = 5
CLOSE_SECONDS = 4.0
_ENDING = {kind.kind: kind for kind in KINDS}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the uploading process needs to know once."""

    uri: str
    run_id: str
    attempt: int
    patience_seconds: float
    owner: str
    life: int
    conditional: bool
    last: int
    """The number of the attempt's newest ledger record."""
    keep: int
    kept: list[str]
    """Prefixes of the checkpoints that are kept so far, oldest first."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint on the local disk. The uploader deletes the directory when it is done with it."""

    step: int
    directory: Path
    stall_seconds: float
    """How long training waited for the files to be written."""
    facts: dict[str, Any]
    """For its ledger record."""
    nonce: str = field(default_factory=lambda: uuid.uuid4().hex)


class Uploader:
    """One upload in flight and one pending, of which the newest wins.

    The process is started at once, so that the first checkpoint need not wait for it, and again if it dies.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._changed = threading.Condition(threading.RLock())
        self._child: subprocess.Popen[str] | None = None
        self._flying: Saved | None = None
        self._pending: Saved | None = None
        self._tidying: str | None = None  # the nonce of what was sent last, until the process says that it is idle
        self._error: JobError | None = None
        self._deaths = 0
        self._closed = False
        self.last = setup.last
        self.kept = list(setup.kept)
        self.upload_seconds: float | None = None
        """How long the last upload took, with its commit."""
        with self._changed:
            self._start()

    def submit(self, saved: Saved) -> None:
        """Take a checkpoint over. Returns at once.

        Raises:
            JobError: an earlier upload failed for good.
        """
        self.check()
        with self._changed:
            superseded, self._pending = self._pending, saved
            if superseded is not None:
                log.info("checkpoint_superseded", step=superseded.step, by_step=saved.step)
                shutil.rmtree(superseded.directory, ignore_errors=True)
            self._send()

    def check(self) -> None:
        """Raise what ended the uploads for good: patience used up, refused, fenced."""
        with self._changed:
            if self._error is not None:
                raise self._error

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until everything handed over is committed.

        Args:
            seconds: how long at most; None waits as long as the uploads are patient.

        Returns:
            whether everything is.

        Raises:
            JobError: an upload failed for good.
        """
        end = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            while self._flying or self._pending or (seconds is None and self._tidying):
                self.check()
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(min(1.0, left) if left is not None else 1.0)
            self.check()
            return True

    def close(self) -> None:
        """End the process; an upload under way is broken off."""
        with self._changed:
            self._closed = True
            child = self._child
        if child is None:
            return
        with contextlib.suppress(OSError):
            if child.stdin:
                child.stdin.close()
        try:
            child.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def _send(self) -> None:
        """Send the pending checkpoint off if nothing is in flight. The lock is held."""
        if self._flying is None and self._pending is not None:
            self._flying, self._pending = self._pending, None
            self._tidying = self._flying.nonce
            if self._child is None:
                self._start()
            else:
                self._write(_request(self._flying))

    def _start(self) -> None:
        """Start the process and hand it what is in flight. The lock is held."""
        child = subprocess.Popen(
            [sys.executable, "-m", "job.state.upload_worker"],
            cwd=Path(__file__).parents[2],
            env=libraries.child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C at a terminal reaches the job, which decides
        )
        self._child = child
        self._write(asdict(self._setup) | {"last": self.last, "kept": self.kept})
        if self._flying is not None:
            self._write(_request(self._flying))
        threading.Thread(target=self._listen, args=(child,), name="uploader", daemon=True).start()

    def _write(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it died: the listener notices and starts another
            if self._child and self._child.stdin:
                self._child.stdin.write(json.dumps(message, default=str) + "\n")
                self._child.stdin.flush()

    def _listen(self, child: subprocess.Popen[str]) -> None:
        """In a thread of its own: what the process says, until it ends."""
        heard: dict[str, Callable[[dict[str, Any]], None]] = {
            "log": _say,
            "committed": self._on_committed,
            "failed": self._on_failed,
            "idle": self._on_idle,
        }
        try:
            for line in child.stdout or ():
                message = _understood(line)
                for name in heard.keys() & message.keys():
                    heard[name](message)
            status = child.wait()
            with self._changed:
                if self._child is child:
                    self._child = None
                if not self._closed:
                    self._on_death(status)
        except Exception as error:  # noqa: BLE001 - nobody else would tell those who wait
            with self._changed:
                self._error = self._error or StorageError(
                    f"The uploads cannot go on: {error!r}.", remedy="Start it again: it resumes from the last commit."
                )
                self._changed.notify_all()

    def _on_committed(self, message: dict[str, Any]) -> None:
        done = message["committed"]
        with self._changed:
            self.last, self._deaths = done["number"], 0
            self.upload_seconds = done["upload_seconds"]
            self.kept = [*self.kept, message["prefix"]][-self._setup.keep :]
            saved = self._flying
            if saved is None or saved.nonce != done["nonce"]:
                return
            log.info(
                "checkpoint_committed",
                step=saved.step,
                bytes=done["bytes"],
                stall_seconds=round(saved.stall_seconds, 3),
                upload_seconds=done["upload_seconds"],
                commit=done["number"],
            )
        self._landed(saved)

    def _on_failed(self, message: dict[str, Any]) -> None:
        failed = message["failed"]
        with self._changed:
            self._error = _ENDING.get(failed["kind"], JobError)(failed["message"], remedy=failed["remedy"])
            self._changed.notify_all()

    def _on_idle(self, message: dict[str, Any]) -> None:
        with self._changed:
            if self._tidying == message["idle"]:
                self._tidying = None
            self._changed.notify_all()

    def _landed(self, saved: Saved) -> None:
        with self._changed:
            self._flying = None
            self._send()
            self._changed.notify_all()
        shutil.rmtree(saved.directory, ignore_errors=True)

    def _on_death(self, status: int) -> None:
        """Start again for what was in flight. The lock is held."""
        self._deaths += 1
        if self._flying is None:
            self._tidying = None
        log.warning("uploader_died", status=status, deaths=self._deaths)
        if self._deaths >= MOST_DEATHS and self._error is None:
            self._error = StorageError(
                f"The process that uploads checkpoints died {self._deaths} times, the last time with status {status}.",
                remedy="Give the job more memory, and look in the log for what it printed.",
            )
        if self._flying is not None and self._error is None:
            self._start()
        self._changed.notify_all()


def _understood(line: str) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        return {}  # a library printed something
    return message if isinstance(message, dict) else {}


def _request(saved: Saved) -> dict[str, Any]:
    return {"step": saved.step, "directory": str(saved.directory), "nonce": saved.nonce, "facts": saved.facts}


def _say(message: dict[str, Any]) -> None:
    fields = dict(message["log"])
    level: Literal["info"] = fields.pop("level", "info")
    getattr(log, level)(fields.pop("event", "library_output"), **fields)
