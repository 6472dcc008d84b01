"""The process starts of a run: `attempts/<n>.json` when one begins, `<n>.end.json` when it ends, `failure.json` why.

Knows how attempts ended and when to give up; nothing of what they train.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from job.observability import logs
from job.runtime.errors import (
    AccessDeniedError,
    ConfigError,
    FencedError,
    JobError,
    PermanentError,
    StorageError,
    as_job_error,
    known,
)
from job.runtime.process import Process
from job.state.json_object import encode
from job.storage.base import Store

log = structlog.get_logger()
TRIES = 1000
MOST_FAILURES = 3
PATIENCE_SECONDS = 10.0
LAST_PATIENCE_SECONDS = 1.0
_NUMBER = re.compile(r"(\d+)\.")
OWN_ERRORS = frozenset({"unknown"})  # outcomes that are the program's own fault


@dataclass(kw_only=True)
class Attempts:
    """All attempts at one run, and which of them this process is."""

    store: Store
    closing: Callable[[float], Store]
    """The same store with another patience, in seconds: recording the end must not hold a GPU through an outage."""
    run_id: str
    number: int = 0
    owner: str = ""
    """The nonce of the claim."""
    conditional: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    """Further fields for the end of this attempt, such as where it resumed from."""
    _ending: threading.Lock = field(default_factory=threading.Lock)
    _ended: bool = False

    def claim(self, process: Process, *, fencing: str, from_step: int, versions: dict[str, str]) -> int:
        """Create the next `attempts/<n>.json`; the number is this process's alone.

        Args:
            fencing: `require` rejects a store without conditional writes, `auto` warns about it.
            from_step: of the newest checkpoint at this moment.

        Raises:
            ConfigError: the store does not honour conditional writes, and they are required.
        """
        first = max(self._numbers(), default=0) + 1
        body: dict[str, Any] = {"host": process.host, "pod": process.pod, "gpus": list(process.gpus), "started": now()}
        body |= {"versions": versions, "from_step": from_step}
        for number in range(first, first + TRIES):
            nonce = uuid.uuid4().hex
            claim = encode({"attempt": number, "nonce": nonce, **body})
            if not self.store.create(self._key(number), claim):
                continue
            self.number, self.owner = number, nonce
            self._probe(claim, fencing)
            if self.conditional or self.store.read(self._key(number)) == claim:
                return number
        raise StorageError(
            f"No free attempt number from {first} on in {self.store.uri}/{self.run_id}/attempts/.",
            remedy="Another process keeps starting the same run: give each its own TUNE_RUN_ID.",
        )

    def _probe(self, claim: bytes, fencing: str) -> None:
        """Create the own claim a second time: a store that accepts it does not honour conditional writes."""
        key = self._key(self.number)
        again = claim.replace(b'"nonce"', b'"probe"')
        self.conditional = not self.store.create(key, again)
        if self.conditional:
            return
        self.store.write(key, claim)
        if fencing == "require":
            raise unfenced(self.store.uri)
        log.warning(
            "fencing_weak",
            reason="the store ignores If-None-Match: two attempts at the same moment may both act as the run's owner",
        )

    def completed(self) -> bool:
        """Whether an attempt recorded that the run is complete: then nothing is left to repair."""
        ends = (self._read(self._key(number, "end.")) for number in sorted(self._numbers(), reverse=True))
        return any(end and end.get("outcome") == "complete" for end in ends)

    def complete_late(self) -> None:
        """Write the end for the attempt that finished the run and was lost before it could."""
        number = max(self._numbers(), default=0)
        if number:
            body = {"attempt": number, "outcome": "complete", "ended": now(), "noted": "by a later start"}
            self.store.write(self._key(number, "end."), encode(body))

    def _numbers(self) -> set[int]:
        prefix = f"{self.run_id}/attempts/"
        found = (_NUMBER.match(entry.key.removeprefix(prefix)) for entry in self.store.list_objects(prefix))
        return {int(match[1]) for match in found if match}

    def end(self, outcome: str, **facts: Any) -> None:
        """Write how this attempt ended. Only the first call writes; a second one waits until it has.

        Two threads may call it: when a signal arrives, the end is written at once, since there may be no time later.
        """
        self._end(PATIENCE_SECONDS, outcome, **facts)

    def _end(self, patience_seconds: float, outcome: str, **facts: Any) -> None:
        with self._ending:
            if self._ended or not self.number:
                return
            self._ended = True
            body = {"attempt": self.number, "outcome": outcome, "ended": now(), **self.facts, **facts}
            self.closing(patience_seconds).write(self._key(self.number, "end."), encode(logs.redact(body)))

    def fail(self, error: Exception, *, step: int | None) -> JobError | None:
        """Write `failure.json` and end the attempt.

        Args:
            error: what ended it.
            step: the optimizer step that it happened in; None outside training.

        Returns:
            another error to report instead, when too many attempts have failed like this one.
        """
        if isinstance(error, FencedError):  # the run and its failure.json belong to another attempt
            self.end(error.kind, exit_code=error.exit_code)
            return None
        final, expected = None, known(error) is not None
        if not expected and self._failures_before(step) + 1 >= MOST_FAILURES:
            final = PermanentError(
                f"{MOST_FAILURES} attempts in a row ended at the same step ({step or 'before training'}), the last by "
                f"{as_job_error(error).message}",
                remedy="The log has the traceback. Fix the cause, then start the run again: it resumes.",
            )
        reported = final or as_job_error(error)
        body: dict[str, Any] = {
            "attempt": self.number,
            "kind": reported.kind,
            "exit_code": reported.exit_code,
            "message": reported.message,
            "remedy": reported.remedy,
            "step": step,
            "expected": expected,
            "time": now(),
        }
        # The store has just used up its patience: do not wait for it again.
        store_failed = isinstance(reported, StorageError | AccessDeniedError)
        patience = LAST_PATIENCE_SECONDS if store_failed else PATIENCE_SECONDS
        with contextlib.suppress(StorageError, AccessDeniedError):
            self.closing(patience).write(f"{self.run_id}/failure.json", encode(logs.redact(body)))
        self._end(patience, reported.kind, exit_code=reported.exit_code, step=step)
        return final

    def check_progress(self, from_step: int) -> None:
        """Give up when the last attempts were all killed before they could record why, and made no progress.

        Args:
            from_step: of the newest checkpoint.

        Raises:
            PermanentError: the attempts before this one were killed from outside and left no new checkpoint.
        """
        before = [self._read_attempt(number) for number in range(self.number - 1, self.number - 1 - MOST_FAILURES, -1)]
        if all(found and found[1] is None and found[0].get("from_step") == from_step for found in before):
            raise PermanentError(
                f"{MOST_FAILURES} attempts in a row were killed before they could record why, none got past step "
                f"{from_step}.",
                remedy="Most often the kernel killed them for their memory: give the job more, then start it again.",
            )

    def _failures_before(self, step: int | None) -> int:
        """How many attempts just before this one failed with an unexpected error at this step, or were killed there."""
        count, from_step = 0, (self._read_attempt(self.number) or ({}, None))[0].get("from_step")
        for number in range(self.number - 1, 0, -1):
            start, end = self._read_attempt(number) or ({}, {})
            killed = end is None and start.get("from_step") == from_step
            failed = end is not None and end.get("outcome") in OWN_ERRORS and end.get("step") == step
            if not (killed or failed):
                break
            count += 1
        return count

    def _read_attempt(self, number: int) -> tuple[dict[str, Any], dict[str, Any] | None] | None:
        """The start and the end of an attempt, each None where it was not recorded."""
        start = self._read(self._key(number)) if number > 0 else None
        return None if start is None else (start, self._read(self._key(number, "end.")))

    def _read(self, key: str) -> dict[str, Any] | None:
        data = self.store.read(key)
        try:
            body = json.loads(data) if data is not None else None
        except ValueError:
            return {}  # unreadable counts as neither killed nor failed
        return body if isinstance(body, dict) or body is None else {}

    def _key(self, number: int, what: str = "") -> str:
        return f"{self.run_id}/attempts/{number:04d}.{what}json"


def unfenced(uri: str) -> ConfigError:
    """The error for a store that cannot keep two attempts at one run apart, although TUNE_FENCING requires it."""
    return ConfigError(
        f"TUNE_FENCING=require, but {uri} does not honour conditional writes (If-None-Match).",
        remedy="Use a store that does, or TUNE_FENCING=auto, and never run one run id twice at the same time.",
    )


def now() -> str:
    """The time as records show it (RFC 3339, UTC)."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
