"""The order of events in a run: numbered records that are created once and never changed, `checkpoints/commits/`.

Exactly one attempt can create a number, so the records of all attempts have one order without clocks or leases. An
attempt fences earlier ones by creating a record: an attempt that finds the record of a later one where its own should
go knows that it has been replaced.
"""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import structlog

from job.observability.json_text import encoded
from job.runtime.errors import ConfigError, FencedError, StorageError
from job.state.json_object import LAYOUT, decode, put, read
from job.storage.base import Store

Kind = Literal["checkpoint", "fence", "fresh", "final", "published"]
TRIES = 10_000
RESULTS = "results"
SHAPES: dict[str, dict[str, type]] = {
    "fence": {},
    "fresh": {},
    "checkpoint": {"step": int, "data": str, "files": list, "fingerprint": dict, "plan": dict},
    "final": {"steps": int, "plan": dict, "fingerprint": dict, "results": dict, "versions": dict},
    "published": {"final": int, "prefix": str, "artifacts": list, "fingerprint": dict, "promoted": bool},
}
PLAN: dict[str, Any] = {
    "micro_batch": int,
    "tokens_in_pass": int | None,
    "gradient_checkpointing": str,
    "cuda_graphs": bool,
    "batching": str,
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One record of the ledger."""

    number: int
    body: dict[str, Any] | None
    """None if the object is not a valid record."""

    @property
    def kind(self) -> str | None:
        """Its kind, or None if it is damaged."""
        return None if self.body is None else str(self.body["kind"])

    @property
    def attempt(self) -> int:
        """The attempt that wrote it; 0 if it is damaged."""
        return 0 if self.body is None else int(self.body["attempt"])

    @property
    def layout(self) -> int:
        """The version of its format; 0 if it is damaged."""
        return 0 if self.body is None else int(self.body["layout"])


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come, as its records say."""

    attempt: int = 0
    """The highest attempt number of a record; 0 if there is none."""
    checkpoint: Entry | None = None
    """The newest checkpoint of this life."""
    published: Entry | None = None
    """The newest `published` record of this life: then the run is finished."""
    newest: Entry | None = None
    """The newest readable record that is not a fence."""


@dataclass(kw_only=True)
class Ledger:
    """One run's records, as one attempt reads and writes them."""

    store: Store
    run_id: str
    attempt: int = 0
    owner: str = ""
    """The nonce of the attempt's claim: it differs even if a store let two attempts claim the same number."""
    life: int = 0
    """The attempt that last started the run over (`TUNE_RESUME=fresh`); 0 if none did. Its records are one life."""
    conditional: bool = True
    """Whether the store honours conditional writes. If not, each record is checked before it is created and read back
    afterwards, which leaves a moment in which two writers may both seem to have won."""
    last: int = 0
    """The number of this attempt's last record. The next one has the number after it, whatever a new listing shows."""

    def fence(self) -> int:
        """Create this attempt's first record, after all existing ones; from here on earlier attempts cannot commit.

        Returns:
            its number. This attempt reads only records below it.

        Raises:
            FencedError: a later attempt was faster.
        """
        self.last = max([0, *self._numbers(), *self._numbers_of_results()])
        number = self.append("fence")
        if (newest := self.check_all(below=number)) is not None:
            self.life = _life(newest)
        return number

    def progress(self) -> Progress:
        """How far the run has come by now.

        Without a fence before, another attempt may change all of it at any moment, and `life` is what the run's is now.
        An attempt that has its fence stays in its own: a later one may have begun another since, and owns all of that.
        """
        attempt, found = 0, dict.fromkeys(("checkpoint", "published"))
        newest = None
        for entry in self._backwards(below=None):
            attempt = max(attempt, entry.attempt)
            if entry.body is None or entry.kind == "fence":
                continue
            newest = newest or entry
            if entry.kind == "fresh":
                break
            if entry.kind in found and found[entry.kind] is None:
                found[entry.kind] = entry
            if all(found.values()) or entry.kind == "checkpoint":
                break  # a `published` record comes after the last checkpoint of its life
        if not self.last:
            self.life = _life(newest) if newest else 0
        return Progress(attempt=attempt, newest=newest, **found)

    def start_over(self) -> None:
        """Begin a new life of the run, which ignores all records so far. Only after the attempt's own fence.

        Raises:
            FencedError: a later attempt has taken over.
        """
        self.append("fresh")
        self.life = self.attempt

    def check(self) -> None:
        """Check that no later attempt has taken over since the last record.

        Raises:
            FencedError: one has.
        """
        found = self.read(self.last + 1)
        if found is not None:
            self._yield_to(found)

    def check_all(self, *, below: int | None = None) -> Entry | None:
        """Check all records. Fences may stand in another order than their attempts; every other record was written by
        the latest attempt so far, so that nothing before it has to be read.

        Returns:
            the newest readable record but fences.

        Raises:
            FencedError: it, or a fence after it, is of a later attempt.
        """
        for entry in self._backwards(below=below):
            if entry.body is not None:
                self._yield_to(entry)
                if entry.kind != "fence":
                    return entry
        return None

    def append(self, kind: Kind, *, nonce: str | None = None, **facts: Any) -> int:
        """Create the next record.

        Args:
            kind: of record.
            nonce: the same one again, after an append whose outcome was lost, finds the record if it was created.
            facts: further fields.

        Returns:
            its number.

        Raises:
            FencedError: a later attempt has written a record where this one should go.
        """
        nonce = nonce or uuid.uuid4().hex
        body = {"layout": LAYOUT, "kind": kind, "attempt": self.attempt, "owner": self.owner, "life": self.life}
        body |= {"nonce": nonce, **facts}
        data = encoded(body, indent=1)
        for number in range(self.last + 1, self.last + 1 + TRIES):
            if self._take(number, data):
                self.last = number
                return number
        raise StorageError(f"No free number after {self.last} at {self._uri(0)}.", remedy="Use another TUNE_RUN_ID.")

    def _take(self, number: int, data: bytes) -> bool:
        """Create the record with this number; returns whether it is this attempt's."""
        found = self._entry(number, put(self.store, self._key(number), data, conditional=self.conditional))
        if found.body is not None and found.body["nonce"] == json.loads(data)["nonce"]:
            return True
        self._yield_to(found)
        return False

    def _yield_to(self, entry: Entry) -> None:
        if entry.body is None:
            raise StorageError(
                f"{self._uri(entry.number)} is in the place of this attempt's next record and is not readable: another "
                "attempt may have written it, or the store damaged it.",
                remedy="Start the run again: it continues after this record.",
            )
        same_number = entry.attempt == self.attempt and entry.body["owner"] != self.owner
        if entry.attempt > self.attempt or same_number:
            raise FencedError(
                f"Attempt {entry.attempt} of run {self.run_id} has taken over; this is attempt {self.attempt}.",
                remedy="Nothing is lost: the newer attempt continues. Do not run one run id twice at the same time.",
            )

    def read(self, number: int) -> Entry | None:
        """One record, or None if there is none.

        Raises:
            ConfigError: a newer version of the job wrote it.
        """
        data = read(self.store, self._key(number))
        return None if data is None else self._entry(number, data)

    def _entry(self, number: int, data: bytes) -> Entry:
        body = decode(data)
        if body and isinstance(body.get("layout"), int) and body["layout"] > LAYOUT:
            raise ConfigError(
                f"{self._uri(number)} has layout {body['layout']}, this version reads up to {LAYOUT}: a newer "
                "version of the job has worked on this run.",
                remedy="Use that version again, or another TUNE_RUN_ID.",
            )
        return Entry(number=number, body=body if _is_record(body) else None)

    def newest_first(self, *, below: int | None = None) -> Iterator[Entry]:
        """The records since the run last started over.

        Args:
            below: only records with lower numbers.
        """
        return itertools.takewhile(lambda entry: entry.kind != "fresh", self._backwards(below=below))

    def _backwards(self, *, below: int | None) -> Iterator[Entry]:
        for number in sorted(self._numbers(), reverse=True):
            found = self.read(number) if below is None or number < below else None
            if found is not None:
                yield found

    def newest(self, kind: Kind, *, below: int | None = None, above: int = 0) -> Entry | None:
        """The newest record of a kind between two numbers."""
        within = itertools.takewhile(lambda entry: entry.number > above, self.newest_first(below=below))
        return next((entry for entry in within if entry.kind == kind), None)

    def _numbers(self) -> list[int]:
        stems = [
            PurePosixPath(entry.key).stem for entry in self.store.list_objects(f"{self.run_id}/checkpoints/commits/")
        ]
        unexpected = [stem for stem in stems if not stem.isdecimal()]
        if unexpected:
            structlog.get_logger().warning("ledger_unexpected_objects", names=unexpected[:10])
        return [int(stem) for stem in stems if stem.isdecimal()]

    def _numbers_of_results(self) -> Iterator[int]:
        """Those that results were uploaded for: taken for good, even if somebody deleted the records."""
        stems = (PurePosixPath(name).name for name in self.store.names(f"{self.run_id}/{RESULTS}/"))
        return (int(stem) for stem in stems if stem.isdecimal())

    def _key(self, number: int) -> str:
        return f"{self.run_id}/checkpoints/commits/{number:06d}.json"

    def _uri(self, number: int) -> str:
        return f"{self.store.uri.rstrip('/')}/{self._key(number)}"


def _life(entry: Entry) -> int:
    """The life that a readable record belongs to; a `fresh` record begins one."""
    body = entry.body or {}
    return int(body["attempt" if entry.kind == "fresh" else "life"])


def _is_record(body: Any) -> bool:
    """Whether all fields that are read exist and have the right types."""
    if not isinstance(body, dict) or not isinstance(body.get("kind"), str) or body["kind"] not in SHAPES:
        return False
    shape = {"layout": int, "attempt": int, "owner": str, "life": int, "nonce": str} | SHAPES[body["kind"]]
    if not all(isinstance(body.get(name), wanted) for name, wanted in shape.items()):
        return False
    if not is_plan(body.get("plan", {})):
        return False
    return body["kind"] != "published" or (
        body["prefix"] == results_prefix(body["final"]) and are_artifacts(body["artifacts"])
    )


def is_plan(found: Any) -> bool:
    """Whether all that a later attempt reads of a plan has the right type; an older layout may lack fields."""
    if not isinstance(found, dict) or ("micro_batch" in found and "batching" not in found):
        return False
    return all(isinstance(found[name], PLAN[name]) for name in PLAN.keys() & found.keys())


def are_artifacts(found: Any) -> bool:
    """Whether this is a list of published files, each with a name inside the results, a size and a hash."""
    return isinstance(found, list) and all(
        isinstance(file, dict)
        and isinstance(name := file.get("name"), str)
        and not {"", ".", ".."} & set(name.split("/"))
        and type(file.get("size")) is int
        and isinstance(file.get("sha256"), str)
        for file in found
    )


def results_prefix(final: int) -> str:
    """Where the results of a `final` record are, relative to the run: nobody else writes there."""
    return f"{RESULTS}/{final:06d}"
