"""The training process's side of the uploads: hands checkpoints to another process, and never waits for the network.

The other side is `job.state.upload_worker`; the messages between the two are defined here.
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from job.runtime import libraries
from job.runtime.child import Child, Failed, Message
from job.runtime.errors import JobError, StorageError

log = structlog.get_logger()
MOST_DEATHS = 5
CLOSE_SECONDS = 4.0


@dataclass(frozen=True, kw_only=True)
class Setup(Message):
    """The first message to the worker: what it needs to know once."""

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
    """How many checkpoints keep their files."""
    kept: list[str]
    """Prefixes of the checkpoints that have their files so far, oldest first."""


@dataclass(frozen=True, kw_only=True)
class Upload(Message):
    """A request to the worker: upload a checkpoint and commit it."""

    nonce: str
    step: int
    directory: str
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Committed(Message):
    """The worker's answer: the checkpoint exists, and its local directory is not needed any more."""

    nonce: str
    number: int
    """Of its ledger record."""
    prefix: str
    bytes: int
    upload_seconds: float


@dataclass(frozen=True, kw_only=True)
class Idle(Message):
    """The worker's last answer to a request: old checkpoints are deleted too, or the upload has failed (`Failed`)."""

    nonce: str


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint on the local disk. The uploader deletes the directory when it is committed or superseded."""

    step: int
    directory: Path
    stall_seconds: float
    """How long training waited for the files to be written."""
    facts: dict[str, Any]
    """For its ledger record."""
    nonce: str = field(default_factory=lambda: uuid.uuid4().hex)

    def request(self) -> Upload:
        """What to send to the worker."""
        return Upload(nonce=self.nonce, step=self.step, directory=str(self.directory), facts=self.facts)


class Uploader:
    """One upload in flight and one pending, of which the newest wins.

    The worker is started at once, so that the first checkpoint need not wait for it, and again if it dies.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._changed = threading.Condition(threading.RLock())
        self._worker: Child | None = None
        self._in_flight: Saved | None = None
        self._pending: Saved | None = None
        self._cleaning_up: str | None = None  # after which checkpoint, by nonce; from the request until it is idle
        self._error: JobError | None = None
        self._deaths = 0
        self.last = setup.last
        self.kept = list(setup.kept)
        self.upload_seconds: float | None = None
        """How long the last upload took, with its commit."""
        with self._changed:
            self._start()

    def submit(self, saved: Saved) -> None:
        """Take over a checkpoint. Returns at once.

        Raises:
            JobError: an earlier upload failed for good.
        """
        self.check()
        with self._changed:
            superseded, self._pending = self._pending, saved
            if superseded is not None:
                log.info("checkpoint_superseded", step=superseded.step, by_step=saved.step)
                shutil.rmtree(superseded.directory, ignore_errors=True)
            self._send_pending()

    def check(self) -> None:
        """Raise the error that ended the uploads for good: outage or refusal past the patience, or fenced."""
        with self._changed:
            if self._error is not None:
                raise self._error

    def drain(self, timeout_seconds: float | None = None) -> bool:
        """Wait until everything that was submitted is committed.

        Args:
            timeout_seconds: None waits as long as the uploads are patient, and for the deletion of old checkpoints.

        Returns:
            False after the timeout.

        Raises:
            JobError: an upload failed for good.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        with self._changed:
            while self._in_flight or self._pending or (deadline is None and self._cleaning_up):
                self.check()
                left = 1.0 if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(1.0, left))
            self.check()
            return True

    def close(self) -> None:
        """End the worker; an upload in flight is aborted."""
        with self._changed:
            worker, self._worker, self._pending = self._worker, None, None
        if worker is not None:
            worker.close(CLOSE_SECONDS)

    def _send_pending(self) -> None:
        """Send the pending checkpoint unless another is in flight. The lock is held."""
        if self._in_flight is None and self._pending is not None:
            self._in_flight, self._pending = self._pending, None
            self._cleaning_up = self._in_flight.nonce
            if self._worker is None:
                self._start()
            else:
                self._worker.send(self._in_flight.request())

    def _start(self) -> None:
        """Start the worker, and send it what is in flight. The lock is held."""
        self._worker = Child(
            "job.state.upload_worker",
            environment=libraries.child_environment(),
            receives=(Committed, Failed, Idle),
        )
        self._worker.send(replace(self._setup, last=self.last, kept=self.kept))
        if self._in_flight is not None:
            self._worker.send(self._in_flight.request())
        threading.Thread(target=self._listen, args=(self._worker,), name="uploader", daemon=True).start()

    def _listen(self, worker: Child) -> None:
        """In a thread of its own: handle what a worker sends, until it ends."""
        try:
            for message in worker:
                self._handle(message)
            status = worker.wait()
            with self._changed:
                if self._worker is worker:  # else it was closed
                    self._worker = None
                    self._on_death(status)
        except Exception as error:  # noqa: BLE001 - raised where the uploads are waited for
            self._fail(
                StorageError(
                    f"The uploads stopped with an unexpected error: {error!r}.",
                    remedy="Start the run again: it resumes from the last commit.",
                )
            )

    def _handle(self, message: Message) -> None:
        match message:
            case Committed():
                self._on_committed(message)
            case Failed():
                self._fail(message.error())
            case Idle(nonce=nonce):
                with self._changed:
                    if self._cleaning_up == nonce:
                        self._cleaning_up = None
                    self._changed.notify_all()

    def _on_committed(self, done: Committed) -> None:
        with self._changed:
            self.last, self._deaths = done.number, 0
            self.upload_seconds = done.upload_seconds
            self.kept = [*self.kept, done.prefix][-self._setup.keep :]
            saved = self._in_flight
            if saved is None or saved.nonce != done.nonce:
                return
            log.info(
                "checkpoint_committed",
                step=saved.step,
                bytes=done.bytes,
                stall_seconds=round(saved.stall_seconds, 3),
                upload_seconds=done.upload_seconds,
                commit=done.number,
            )
            self._in_flight = None
            self._send_pending()
            self._changed.notify_all()
        shutil.rmtree(saved.directory, ignore_errors=True)

    def _fail(self, error: JobError) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _on_death(self, status: int) -> None:
        """Start the worker again for what was in flight. The lock is held."""
        self._deaths += 1
        if self._in_flight is None:
            self._cleaning_up = None
        log.warning("uploader_died", status=status, deaths=self._deaths)
        if self._deaths >= MOST_DEATHS and self._error is None:
            self._error = StorageError(
                f"The process that uploads checkpoints died {self._deaths} times, the last time with status {status}.",
                remedy="Give the job more memory, and look in the log for what the process printed.",
            )
        if self._in_flight is not None and self._error is None:
            self._start()
        self._changed.notify_all()
