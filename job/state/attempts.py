"""The process starts of a run: `attempts/<n>.json` when one begins, `<n>.end.json` when it ends, `failure.json` why.

Knows how attempts ended and when to give up; nothing of what they train.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import structlog

from job.observability import logs
from job.observability.memory import Evidence
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
from job.state.json_object import LAYOUT, decode, encode, now, put
from job.storage.base import Store

log = structlog.get_logger()
TRIES = 1000
MOST_FAILURES = 3
LOOK_BACK = 30
"""How many earlier attempts are looked at: each takes up to three requests."""
PATIENCE_SECONDS = 10.0
LAST_PATIENCE_SECONDS = 1.0
_NUMBER = re.compile(r"(\d+)\.")
GIB = 1 << 30
MOST_BYTES = 1 << 60
"""No machine has more: a larger number is not true."""
OWN_ERROR = "unknown"
"""The outcome that is the program's own fault."""


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

    def claim(self, process: Process, *, fencing: str, from_step: int, versions: dict[str, str], above: int) -> int:
        """Create the next `attempts/<n>.json`; the number is this process's alone.

        Args:
            fencing: `require` rejects a store without conditional writes, `auto` warns about it.
            from_step: of the newest checkpoint at this moment.
            above: the highest attempt number in the ledger, which stays if somebody deletes `attempts/`.

        Raises:
            ConfigError: the store does not honour conditional writes, and they are required.
        """
        first = max([above, *self._numbers()]) + 1
        body: dict[str, Any] = {"host": process.host, "pod": process.pod, "gpus": list(process.gpus), "started": now()}
        body |= {"versions": versions, "from_step": from_step}
        for number in range(first, first + TRIES):
            nonce = uuid.uuid4().hex
            claim = encode({"attempt": number, "nonce": nonce, **body})
            if put(self.store, self._key(number), claim, conditional=True) != claim:
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

    def completed(self, *, since: int) -> bool:
        """Whether an attempt from this number on recorded that the run is complete: then nothing is left to repair."""
        numbers = sorted((number for number in self._numbers() if number >= since), reverse=True)
        ends = (self._read(self._key(number, "end.")) for number in numbers)
        return any(end and end.get("outcome") == "complete" for end in ends)

    def complete_late(self, number: int) -> None:
        """Write the end for the attempt that finished the run and was lost before it could.

        Args:
            number: of that attempt; 0 if it is not known, for a run of an earlier version: then the last one did.
        """
        number = number or max(self._numbers(), default=0)
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
        with contextlib.suppress(JobError):
            self.closing(patience).write(f"{self.run_id}/failure.json", encode(logs.redact(body)))
        self._end(patience, reported.kind, exit_code=reported.exit_code, step=step)
        return final

    def note_memory(self, evidence: Evidence) -> None:
        """Write `<n>.memory.json`: how short this attempt's memory is. If it is killed next, that is why it died.

        Raises:
            StorageError, AccessDeniedError: it could not be written.
        """
        body = {"attempt": self.number, "nonce": self.owner, "time": now(), **asdict(evidence)}
        self.closing(PATIENCE_SECONDS).write(self._key(self.number, "memory."), encode(body))

    def check_progress(self, from_step: int) -> None:
        """Give up when the last attempts all died because memory ran out, and made no progress.

        An attempt that was killed for no known reason says nothing of the run: whatever killed it may not come again.

        Args:
            from_step: of the newest checkpoint.

        Raises:
            PermanentError: too many attempts in a row had too little memory, and left no new checkpoint.
        """
        stuck = itertools.takewhile(lambda past: past.memory and past.from_step == from_step, self._past())
        deaths = list(itertools.islice(stuck, MOST_FAILURES))
        if len(deaths) == MOST_FAILURES:
            raise PermanentError(
                f"{MOST_FAILURES} attempts in a row were killed when memory ran out, none got past step {from_step}: "
                f"{deaths[0].memory}.",
                remedy="Give the job more memory, on Kubernetes by resources.limits.memory, then start it again: it "
                "resumes.",
            )

    def _failures_before(self, step: int | None) -> int:
        """How many attempts just before this one failed with an unexpected error at this step, or ran out of memory
        after the same checkpoint."""
        from_step = (self._read(self._key(self.number)) or {}).get("from_step")

        def same(past: _Past) -> bool:
            failed = past.outcome == OWN_ERROR and past.step == step
            return failed or (past.memory is not None and past.from_step == from_step)

        return sum(1 for _ in itertools.takewhile(same, self._past()))

    def _past(self) -> Iterator[_Past]:
        """The attempts before this one that say something of the run, newest first.

        Those that were preempted do not: neither with a signal, nor killed without evidence that memory ran out.
        """
        for number in range(self.number - 1, max(0, self.number - 1 - LOOK_BACK), -1):
            start, end = self._read(self._key(number)), self._read(self._key(number, "end."))
            if start is None:
                return
            memory = self._memory_of(number, start) if end is None else None
            preempted = memory is None if end is None else end.get("outcome") == "interrupted"
            if not preempted:
                end = end or {}
                yield _Past(
                    from_step=start.get("from_step"), outcome=end.get("outcome"), step=end.get("step"), memory=memory
                )

    def _memory_of(self, number: int, start: dict[str, Any]) -> str | None:
        """What a killed attempt noted of its memory, in words; None if it had enough, or noted nothing valid."""
        body = self._read(self._key(number, "memory.")) or {}
        identity = [body.get(name) for name in ("layout", "attempt", "nonce", "running_out")]
        names = ("peak_in_use_bytes", "limit_bytes", "oom_kills")
        peak, limit, kills = (_size(body.get(name)) for name in names)
        if peak is None or limit is None or kills is None or identity != [LAYOUT, number, start.get("nonce"), True]:
            return None
        killed = f", and the kernel had killed {kills} of its processes" if kills else ""
        return f"attempt {number} used {peak / GIB:.2f} of {limit / GIB:.2f} GiB{killed}"

    def _read(self, key: str) -> dict[str, Any] | None:
        data = self.store.read(key)
        return None if data is None else decode(data) or {}  # unreadable counts as neither killed nor failed

    def _key(self, number: int, what: str = "") -> str:
        return f"{self.run_id}/attempts/{number:04d}.{what}json"


@dataclass(frozen=True, kw_only=True)
class _Past:
    """An earlier attempt; what was not recorded is None."""

    from_step: int | None
    outcome: str | None
    step: int | None
    memory: str | None
    """What it had noted of its memory, if that ran out before it was killed."""


def unfenced(uri: str) -> ConfigError:
    """The error for a store that cannot keep two attempts at one run apart, although TUNE_FENCING requires it."""
    return ConfigError(
        f"TUNE_FENCING=require, but {uri} does not honour conditional writes (If-None-Match).",
        remedy="Use a store that does, or TUNE_FENCING=auto, and never run one run id twice at the same time.",
    )


def _size(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < MOST_BYTES else None
