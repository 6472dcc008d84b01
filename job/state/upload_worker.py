"""The process that brings checkpoints to the output: requests as JSON lines in, what happened as JSON lines out.

It has a store of its own, so that training never waits for the network. It ends when its standard input closes, and
so does not outlive its parent, however that dies: an upload under way is broken off and aborted.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import structlog

from job.runtime.errors import JobError, StorageError
from job.state.checkpoints import HISTORY, prune, upload
from job.state.ledger import Ledger
from job.storage.open import open_store

END_SECONDS = 3.0
TIDY_PATIENCE_SECONDS = 5.0
TIDY_DENIED_SECONDS = 2.0


class _Lines:
    """The parent's requests. Its end is this process's end."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> dict[str, Any]:
        return self._lines.get()

    def _read(self) -> None:
        try:
            for line in sys.stdin:
                self._lines.put(json.loads(line))
        finally:
            # The parent is gone. Raising in the main thread lets an upload abort what it has begun; the clock insists.
            threading.Timer(END_SECONDS, os._exit, (1,)).start()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


class _Gone(BaseException):
    """The parent is gone."""


def _on_gone(*_: object) -> None:
    raise _Gone


def say(message: dict[str, Any]) -> None:
    """Tell the parent."""
    sys.stdout.write(json.dumps(message, default=str) + "\n")
    sys.stdout.flush()


def _relay(_: Any, level: str, event: MutableMapping[str, Any]) -> str:
    """A log line of this process, said by the parent with its run id and its secrets removed."""
    say({"log": {"level": level, **event}})
    raise structlog.DropEvent


class Uploads:
    """Uploads, commits and tidies, one checkpoint at a time."""

    def __init__(self, setup: dict[str, Any]) -> None:
        patience = setup["patience_seconds"]
        # A refusal in mid-run is an outage: tokens expire and roles are edited, and the run is worth waiting for.
        self._store = open_store(setup["uri"], patience_seconds=patience, denied_patience_seconds=patience)
        self._tidying = open_store(
            setup["uri"],
            patience_seconds=min(patience, TIDY_PATIENCE_SECONDS),
            denied_patience_seconds=min(patience, TIDY_DENIED_SECONDS),
        )
        self._run_id, self._attempt = setup["run_id"], setup["attempt"]
        self._ledger = Ledger(
            store=self._store,
            run_id=self._run_id,
            attempt=self._attempt,
            owner=setup["owner"],
            life=setup["life"],
            conditional=setup["conditional"],
            last=setup["last"],
        )
        self._may_delete = True
        self._kept: deque[str] = deque(setup["kept"], maxlen=setup["keep"])

    def commit(self, request: dict[str, Any]) -> None:
        """One checkpoint, from files on this disk to a record in the ledger."""
        started = time.monotonic()
        directory = Path(request["directory"])
        facts = upload(
            self._store, run_id=self._run_id, attempt=self._attempt, step=request["step"], directory=directory
        )
        number = self._ledger.append("checkpoint", nonce=request["nonce"], **facts, **request["facts"])
        history = (directory / HISTORY).read_bytes()  # the directory is the parent's again with the next line
        seconds = time.monotonic() - started
        size = sum(file["size"] for file in facts["files"])
        done = {"nonce": request["nonce"], "number": number, "bytes": size, "upload_seconds": round(seconds, 3)}
        say({"committed": done, "prefix": facts["data"]})
        self._tidy(facts["data"], history)

    def _tidy(self, prefix: str, history: bytes) -> None:
        """What may fail without harm: the metrics for those who watch, and the deletion of what is not needed."""
        if prefix not in self._kept:
            self._kept.append(prefix)
        log = structlog.get_logger()
        try:
            # Under a name of this attempt's own: a write that is late must not replace what a successor published.
            self._tidying.write(f"{self._run_id}/attempts/{self._attempt:04d}.metrics.jsonl", history)
        except JobError as error:
            log.warning("metrics_not_written", reason=error.message)
            if isinstance(error, StorageError):
                return  # the store is down: the next checkpoint needs the time
        try:
            if self._may_delete:
                attempts = range(self._ledger.life, self._attempt + 1)
                prune(self._tidying, run_id=self._run_id, attempts=attempts, kept=self._kept)
        except StorageError as error:
            log.warning("old_checkpoints_not_deleted", reason=error.message)
        except JobError as error:
            log.warning("old_checkpoints_kept", reason=error.message, remedy=error.remedy)
            self._may_delete = False  # it would be refused again


def main() -> None:
    """Serve the parent until it is gone."""
    signal.signal(signal.SIGUSR1, _on_gone)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the parent decides when this ends
    structlog.configure(processors=[structlog.processors.format_exc_info, _relay])
    lines = _Lines()
    try:
        uploads = Uploads(lines.next())
        while True:
            request = lines.next()
            try:
                uploads.commit(request)
            except JobError as error:
                failed = {"kind": error.kind, "message": error.message, "remedy": error.remedy}
                say({"failed": failed, "nonce": request["nonce"]})
            say({"idle": request["nonce"]})
    except _Gone:
        os._exit(0)


if __name__ == "__main__":
    main()
