"""The process starts of a run: `attempts/<n>.json` when one begins, `.end.json` how it ended, `failure.json` why."""

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
from job.runtime.errors import AccessDeniedError, ConfigError, FencedError, JobError, PermanentError, StorageError
from job.runtime.process import Process
from job.storage.base import Store

log = structlog.get_logger()
LAYOUT = 1
TRIES = 1000
MOST_FAILURES = 3
PATIENCE_SECONDS = 10.0
LAST_PATIENCE_SECONDS = 1.0
_NUMBER = re.compile(r"(\d+)\.")
OWN_ERRORS = frozenset({"unknown"})  # kinds of ends that the program itself is to blame for


@dataclass(kw_only=True)
class Attempts:
    """One run's attempts, as one of them sees them."""

    store: Store
    closing: Callable[[float], Store]
    """The same place with so many seconds of patience: how an attempt ended must not hold a GPU through an outage."""
    run_id: str
    number: int = 0
    owner: str = ""
    """The nonce of the claim."""
    conditional: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    """What the end of this attempt will say of it, such as where it resumed from."""
    _ending: threading.Lock = field(default_factory=threading.Lock)
    _ended: bool = False

    def claim(self, process: Process, *, fencing: str, from_step: int, versions: dict[str, str]) -> int:
        """Create the next `attempts/<n>.json`; the number is this process's alone.

        Args:
            fencing: `require` refuses a store without conditional writes, `auto` warns of it.
            from_step: of the newest checkpoint at this moment.

        Raises:
            ConfigError: the store does not honour conditional writes, and they are required.
        """
        first = max(self._numbers(), default=0) + 1
        body: dict[str, Any] = {"host": process.host, "pod": process.pod, "gpus": list(process.gpus), "started": now()}
        body |= {"versions": versions, "from_step": from_step}
        for number in range(first, first + TRIES):
            nonce = uuid.uuid4().hex
            claim = _encode({"attempt": number, "nonce": nonce, **body})
            if not self.store.create(self._key(number), claim):
                continue
            self.number, self.owner = number, nonce
            self._probe(claim, fencing)
            if self.conditional or self.store.read(self._key(number)) == claim:
                return number
        raise StorageError(
            f"No free attempt number from {first} on in {self.store.uri}/{self.run_id}/attempts/.",
            remedy="Another process is starting the same run over and over: give each its own TUNE_RUN_ID.",
        )

    def _probe(self, claim: bytes, fencing: str) -> None:
        """Create the own claim a second time: a store that lets that happen does not honour conditional writes."""
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
            reason="the store ignores If-None-Match: two attempts at the same moment may both believe to own the run",
        )

    def completed(self) -> bool:
        """Whether an attempt came to its very end: then nothing is left to be repaired."""
        ends = (self._read(self._key(number, "end.")) for number in sorted(self._numbers(), reverse=True))
        return any(end and end.get("outcome") == "complete" for end in ends)

    def complete_late(self) -> None:
        """Write the end that the attempt which finished the run could not write any more."""
        number = max(self._numbers(), default=0)
        if number:
            body = {"attempt": number, "outcome": "complete", "ended": now(), "noted": "by a later start"}
            self.store.write(self._key(number, "end."), _encode(body))

    def _numbers(self) -> set[int]:
        prefix = f"{self.run_id}/attempts/"
        found = (_NUMBER.match(entry.key.removeprefix(prefix)) for entry in self.store.list_objects(prefix))
        return {int(match[1]) for match in found if match}

    def end(self, outcome: str, **facts: Any) -> None:
        """Write how this attempt ended; the first word counts.

        It may be called from two threads at once: when a signal comes, the end is written at once, because there may
        be no later. Whoever comes second waits until it is written.
        """
        self._end(PATIENCE_SECONDS, outcome, **facts)

    def _end(self, patience_seconds: float, outcome: str, **facts: Any) -> None:
        with self._ending:
            if self._ended or not self.number:
                return
            self._ended = True
            body = {"attempt": self.number, "outcome": outcome, "ended": now(), **self.facts, **facts}
            self.closing(patience_seconds).write(self._key(self.number, "end."), _encode(logs.redact(body)))

    def fail(self, error: Exception, *, step: int | None) -> JobError | None:
        """Write `failure.json` and end the attempt.

        Args:
            error: what ended it.
            step: the optimizer step that it happened in; None outside training.

        Returns:
            another error to report instead, when this was the last of too many like it.
        """
        if isinstance(error, FencedError):  # the run belongs to somebody else, also its failure.json
            self.end(error.kind, exit_code=error.exit_code)
            return None
        final = None
        if not isinstance(error, JobError) and self._failures_before(step) + 1 >= MOST_FAILURES:
            final = PermanentError(
                f"{MOST_FAILURES} attempts in a row ended at the same step ({step or 'before training'}), the last by "
                f"{type(error).__name__}: {error}",
                remedy="The log has the traceback. Mend the cause, then start the run again: it resumes.",
            )
        shown = final or error
        body: dict[str, Any] = {
            "attempt": self.number,
            "kind": shown.kind if isinstance(shown, JobError) else "unknown",
            "exit_code": shown.exit_code if isinstance(shown, JobError) else 1,
            "message": shown.message if isinstance(shown, JobError) else f"{type(shown).__name__}: {shown}",
            "remedy": shown.remedy if isinstance(shown, JobError) else "",
            "step": step,
            "foreseen": isinstance(error, JobError),
            "time": now(),
        }
        # A store that has just used up all patience gets no more of it.
        patience = LAST_PATIENCE_SECONDS if isinstance(error, StorageError | AccessDeniedError) else PATIENCE_SECONDS
        with contextlib.suppress(StorageError, AccessDeniedError):
            self.closing(patience).write(f"{self.run_id}/failure.json", _encode(logs.redact(body)))
        self._end(patience, body["kind"], exit_code=body["exit_code"], step=step)
        return final

    def check_progress(self, from_step: int) -> None:
        """Refuse to go on where others died without a word, one after the other, and none got any further.

        Args:
            from_step: of the newest checkpoint.

        Raises:
            PermanentError: the attempts before this one were killed from outside and left no new checkpoint.
        """
        before = [self._look(number) for number in range(self.number - 1, self.number - 1 - MOST_FAILURES, -1)]
        if all(found and found[1] is None and found[0].get("from_step") == from_step for found in before):
            raise PermanentError(
                f"{MOST_FAILURES} attempts in a row died without a word, none got past step {from_step}.",
                remedy="Most often the kernel killed them for their memory: give the job more, then start it again.",
            )

    def _failures_before(self, step: int | None) -> int:
        """How many attempts just before this one ended by their own error at this step, or died there."""
        count, from_step = 0, (self._look(self.number) or ({}, None))[0].get("from_step")
        for number in range(self.number - 1, 0, -1):
            start, end = self._look(number) or ({}, {})
            died = end is None and start.get("from_step") == from_step
            failed = end is not None and end.get("outcome") in OWN_ERRORS and end.get("step") == step
            if not (died or failed):
                break
            count += 1
        return count

    def _look(self, number: int) -> tuple[dict[str, Any], dict[str, Any] | None] | None:
        """The start and the end of an attempt; None for what is not there."""
        start = self._read(self._key(number)) if number > 0 else None
        return None if start is None else (start, self._read(self._key(number, "end.")))

    def _read(self, key: str) -> dict[str, Any] | None:
        data = self.store.read(key)
        try:
            body = json.loads(data) if data is not None else None
        except ValueError:
            return {}  # unreadable counts as neither died nor failed
        return body if isinstance(body, dict) or body is None else {}

    def _key(self, number: int, what: str = "") -> str:
        return f"{self.run_id}/attempts/{number:04d}.{what}json"


def unfenced(uri: str) -> ConfigError:
    """The error for a store that cannot keep two attempts at one run apart, where that is required."""
    return ConfigError(
        f"TUNE_FENCING=require, but {uri} does not honour conditional writes (If-None-Match).",
        remedy="Use a store that does, or TUNE_FENCING=auto and never run one run id twice at the same time.",
    )


def now() -> str:
    """The time as records show it (RFC 3339, UTC)."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _encode(body: dict[str, Any]) -> bytes:
    return (json.dumps({"layout": LAYOUT, **body}, indent=2, ensure_ascii=False, default=str) + "\n").encode()
