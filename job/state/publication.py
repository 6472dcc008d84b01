"""The end of a run: the right to publish, the published files, and the objects that say so (docs/resume.md).

What is published lies under `results/<number>/`, a prefix that belongs to one `final` record and so to one
attempt: nobody else writes there. The run is finished when the ledger has a `published` record. `done.json` and
`latest.json` are copies of it for other programs; `adapter/`, `metrics.jsonl` and `report.html` are copies of files,
for convenience.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from job.runtime.errors import ConfigError, FencedError, JobError, StorageError
from job.runtime.hashing import hashes
from job.state import copies
from job.state.json_object import decode, now, read
from job.state.ledger import Entry, Ledger, are_artifacts, results_prefix
from job.storage.base import Store

log = structlog.get_logger()
FACTS = ("steps", "plan", "fingerprint", "results", "versions")
"""Of a `final` record; every attempt that publishes the same checkpoint publishes the same ones."""
SHOWN = 3
LAST = "README.md"
"""The file of an artifact that is uploaded last: where it is, the others are."""
_OF_THE_LEDGER = ("layout", "kind", "owner", "life", "nonce")


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One published file."""

    name: str
    """Relative to the results, e.g. `adapter/adapter_model.safetensors`."""
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Published:
    """A finished run, as one `published` record describes it."""

    number: int
    """Of the record; 0 for a run that was finished by a version of the job without such records."""
    attempt: int
    body: dict[str, Any]
    """The content of `done.json`."""

    @property
    def prefix(self) -> str:
        """Where the artifacts are, relative to the run; empty if they are in the run's own prefix."""
        return str(self.body.get("prefix", ""))

    @property
    def artifacts(self) -> list[Artifact]:
        """The published files."""
        return [Artifact(name=it["name"], size=it["size"], sha256=it["sha256"]) for it in self.body["artifacts"]]

    @property
    def names(self) -> list[str]:
        """The artifacts' names, relative to the prefix."""
        return [artifact.name for artifact in self.artifacts]


@dataclass(kw_only=True)
class Publication:
    """The results of one run, as one attempt reads and writes them."""

    ledger: Ledger
    _final: int = 0
    """The number of this attempt's `final` record."""

    @property
    def store(self) -> Store:
        """Where the run writes."""
        return self.ledger.store

    def published(self) -> Published | None:
        """What the run has published since it last started over; None while it is not finished.

        Raises:
            ConfigError: an earlier version of the job, whose records do not say enough, started it over; or somebody
                deleted the records of a run that was finished.
        """
        progress = self.ledger.progress()
        if progress.published is not None:
            return self._published(progress.published)
        if progress.newest is None:
            return self._without_ledger()
        if progress.newest.layout > 1:
            return None
        before = self._published_before() if progress.newest.kind == "final" else None
        if before is not None:
            self.ledger.life = 0  # that version pinned the inputs of every life in the same place
        if before is None and self.ledger.life:
            raise ConfigError(
                f"Run {self.ledger.run_id} was started over by an earlier version of the job, and is not finished.",
                remedy="Finish it with that version, or start over with TUNE_RESUME=fresh, or set another TUNE_RUN_ID.",
            )
        return before

    def _published_before(self) -> Published | None:
        """A run that was finished before there were `published` records: `done.json` said so."""
        body = decode(read(self.store, self._key("done.json")))
        if not body or "record" in body or not isinstance(body.get("fingerprint"), dict):
            return None
        if not are_artifacts(body.get("artifacts")):
            return None
        return Published(number=0, attempt=0, body={**body, "uri": self._uri("")})

    def _without_ledger(self) -> Published | None:
        """A run of which there is no record: new, or finished before there were `published` records and tidied up."""
        before = self._published_before()
        if before is None and "record" in (decode(read(self.store, self._key("done.json"))) or {}):
            if self.ledger.progress().newest is not None:
                return self.published()  # another attempt has finished the run in the meantime
            raise ConfigError(
                f"{self._uri('done.json')} says that run {self.ledger.run_id} is finished, and the records in "
                "checkpoints/commits/ that would prove it are gone.",
                remedy="Restore them, or set another TUNE_RUN_ID, or start over with TUNE_RESUME=fresh.",
            )
        return before

    def check_results(self, published: Published) -> None:
        """Check that the published files are still there, by names and sizes.

        Raises:
            ConfigError: some are not: somebody deleted or replaced them.
        """
        lost = [it for it in self._unlisted(published.prefix, published.artifacts) if not self._is_there(published, it)]
        if lost:
            names = ", ".join(self._uri(_below(published.prefix, artifact.name)) for artifact in lost[:SHOWN])
            raise ConfigError(
                f"Run {self.ledger.run_id} is finished, but {len(lost)} of the {len(published.names)} files that it "
                f"published are gone, or others: {names}{', ...' if len(lost) > SHOWN else ''}.",
                remedy="Restore them from the bucket's versions or a backup, or train again: set another TUNE_RUN_ID, "
                "or start over with TUNE_RESUME=fresh.",
            )

    def _is_there(self, published: Published, artifact: Artifact) -> bool:
        found = self.store.head(self._key(_below(published.prefix, artifact.name)))
        return found is not None and found.size == artifact.size

    def _unlisted(self, prefix: str, artifacts: Sequence[Artifact]) -> list[Artifact]:
        """Those files that a listing of the results does not show with their size."""
        sizes = {entry.key: entry.size for entry in self.store.list_objects(self._key(_below(prefix, "")))}
        return [it for it in artifacts if sizes.get(self._key(_below(prefix, it.name))) != it.size]

    def win(self, facts: dict[str, Any], *, checkpoint: int) -> dict[str, Any]:
        """Append the ledger's `final` record, which gives the right to upload results, under a prefix of its own.

        Args:
            facts: `FACTS`, of this attempt.
            checkpoint: the number of the record of the run's last checkpoint, if it was restored; else 0.

        Returns:
            the facts that everything published depends on; those of an earlier attempt where one had won the right with
            this very checkpoint.

        Raises:
            FencedError: another attempt has taken over.
        """
        ledger = self.ledger
        found = ledger.newest("final", below=ledger.last, above=checkpoint) if checkpoint else None
        if found is not None and found.body is not None and _same_result(found.body, facts):
            facts = {name: found.body[name] for name in FACTS}
        self._final = ledger.append("final", **facts)
        return facts

    @property
    def prefix(self) -> str:
        """Where this attempt's results go, relative to the run."""
        return results_prefix(self._final)

    @property
    def uri(self) -> str:
        """The same, in full."""
        return self._uri(self.prefix)

    def upload(self, directory: Path, *, name: str = "") -> list[Artifact]:
        """Upload files to the results of this attempt, and log `artifact_uploaded`.

        Args:
            directory: all its files, at any depth.
            name: the folder in the results.

        Returns:
            the files, in the order of their upload.
        """
        started = time.monotonic()
        files = sorted(
            (path for path in directory.rglob("*") if path.is_file()), key=lambda path: (path.name == LAST, path)
        )
        found = hashes(files)
        uploaded = []
        for path in files:
            key = (Path(name) / path.relative_to(directory)).as_posix()
            self.store.upload(path, self._key(f"{self.prefix}/{key}"), sha256=found[path])
            uploaded.append(Artifact(name=key, size=path.stat().st_size, sha256=found[path]))
        log.info(
            "artifact_uploaded",
            name=name,
            uri=f"{self.uri}/{name}",
            files=len(uploaded),
            bytes=sum(artifact.size for artifact in uploaded),
            upload_seconds=round(time.monotonic() - started, 3),
        )
        return uploaded

    def publish(self, facts: dict[str, Any], artifacts: Sequence[Artifact]) -> Published:
        """Check that all uploaded files are there, and append the `published` record: the run is finished.

        Raises:
            FencedError: another attempt has taken over; nothing is published.
            StorageError: the store has lost a file.
        """
        self._check_uploads(artifacts)
        number = self.ledger.append(
            "published",
            final=self._final,
            prefix=self.prefix,
            **facts,
            artifacts=[vars(artifact) for artifact in artifacts],
            promoted=True,
            published_at=now(),
        )
        found = self.ledger.read(number)
        if found is None or found.body is None:
            raise StorageError(f"{self._uri('')} lost a record that it had shown.", remedy="Start the run again.")
        return self._published(found)

    def _check_uploads(self, artifacts: Sequence[Artifact]) -> None:
        """Compare the listing of the results with what was uploaded."""
        lost = [artifact.name for artifact in self._unlisted(self.prefix, artifacts)]
        if lost:
            self.ledger.check()  # an attempt that has published deletes the results of those that it replaced
            raise StorageError(
                f"{self.uri} does not have {', '.join(lost[:3])} as uploaded, although the store had confirmed the "
                "write.",
                remedy="Start the run again: it publishes from the last checkpoint. If it recurs, check the store.",
            )

    def proclaim(self, published: Published) -> None:
        """Write `done.json` and `latest.json`, read both back, and make the convenience copies.

        Also for a start that finds a run finished whose attempt was lost before it could do so.

        Raises:
            FencedError: another attempt has taken over. What was published stays.
            StorageError: the store does not keep what it confirmed.
        """
        self._write(published)
        if self.ledger.attempt:
            try:
                self.ledger.check()
            except FencedError:
                self._put_back_newer(published)
                raise
        if published.number:
            newest = self._copy_newest(published)
            copies.remove_unpublished(self.ledger, newest.number, newest.prefix)

    def restore(self, published: Published) -> None:
        """Write `done.json` and `latest.json` again where they are missing. `latest.json` stays if it names any run:
        this run has been the latest one, and what came after it is not this run's business."""
        self._write(published, latest=False)
        copies.restore_latest(self.ledger, published.body)

    def _put_back_newer(self, published: Published) -> None:
        """Where a store does not compare and write in one step, this attempt may have replaced its successor's."""
        newest = self.ledger.progress().published
        if newest is not None and newest.number > published.number:
            self._write(self._published(newest))

    def _write(self, published: Published, *, latest: bool = True) -> None:
        if published.number:
            copies.write_done(self.ledger, published.body)
        if latest:
            copies.write_latest(self.ledger, published.body)

    def _copy_newest(self, published: Published) -> Published:
        """Copy for convenience; again if the run was published once more meanwhile, so that copies are never mixed."""
        while True:
            copies.copy(self.ledger, published.prefix, published.names)
            try:
                newest = self.ledger.progress().published
            except JobError as error:
                log.warning("convenience_copy_failed", uri=published.body["uri"], reason=error.message)
                return published
            if newest is None or newest.number <= published.number:
                return published
            published = self._published(newest)

    def _key(self, name: str) -> str:
        return f"{self.ledger.run_id}/{name}"

    def _uri(self, name: str) -> str:
        return f"{self.store.uri.rstrip('/')}/{self._key(name)}"

    def _published(self, entry: Entry) -> Published:
        body = {name: value for name, value in (entry.body or {}).items() if name not in _OF_THE_LEDGER}
        uri = f"{self._uri(body['prefix'])}/"
        body = {"run_id": self.ledger.run_id, "record": entry.number, "uri": uri, **body}
        return Published(number=entry.number, attempt=entry.attempt, body=body)


def _below(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name


def _same_result(earlier: dict[str, Any], facts: dict[str, Any]) -> bool:
    return all(earlier[name] == facts[name] for name in ("steps", "fingerprint"))
