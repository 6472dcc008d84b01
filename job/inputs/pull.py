"""Sources -> local files: the base model, the data and the template, and which versions of them were read.

Knows places, not contents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.config.schema import HUB_NAME, Config
from job.inputs import hub, model_files, safetensors_stub
from job.runtime.errors import DataError
from job.runtime.hashing import sha256
from job.storage.base import Entry
from job.storage.fetch import Fetched, Resolved, fetch, list_objects, resolve

NAMED_TEMPLATE = ("s3://", "/")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a run's inputs are, as its settings name them, and how long an outage is retried."""

    model: str
    dataset: tuple[str, ...]
    eval_dataset: tuple[str, ...]
    chat_template: str
    patience_seconds: float

    @classmethod
    def of(cls, config: Config) -> Sources:
        """Those of a run."""
        return cls(
            model=config.model,
            dataset=config.dataset,
            eval_dataset=config.eval_dataset,
            chat_template=config.chat_template,
            patience_seconds=config.storage_patience_minutes * 60,
        )


@dataclass(frozen=True, kw_only=True)
class File:
    """One file that was read."""

    name: str
    """As the user knows it."""
    path: Path
    size: int
    etag: str | None
    version: str | None
    named: bool
    """Whether the user named this file itself, rather than a directory or prefix."""

    def as_json(self) -> dict[str, Any]:
        """For `inputs.json`: what identifies the content, not the local path."""
        return {"name": self.name, "size": self.size, "etag": self.etag, "version": self.version}


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The base model on this disk."""

    path: Path
    """A directory with a neutral name, in which there is nothing but these files (`model_files.folder_of`)."""
    files: tuple[File, ...]
    revision: str | None
    """The commit of a model from the hub."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that a run reads."""

    model: Path
    """A directory with a neutral name: Unsloth decides by parts of the path."""
    model_files: tuple[File, ...]
    model_revision: str | None
    dataset: tuple[File, ...]
    eval_dataset: tuple[File, ...]
    template_text: str | None
    template_files: tuple[File, ...]
    date: datetime.date
    """The date that templates may print: the day of the run's first attempt."""

    def with_model(self, model: ModelFiles) -> Inputs:
        """The same data with this model."""
        return dataclasses.replace(self, model=model.path, model_files=model.files, model_revision=model.revision)

    def as_json(self) -> dict[str, Any]:
        """The body of `inputs.json`."""
        files = (*self.model_files, *self.dataset, *self.eval_dataset, *self.template_files)
        return {
            "date": self.date.isoformat(),
            "model_revision": self.model_revision,
            "files": [file.as_json() for file in files],
        }


def day(date: str | None) -> datetime.date:
    """The date that templates may print: that of the run's first attempt, or today."""
    return datetime.date.fromisoformat(date) if date else datetime.datetime.now(datetime.UTC).date()


def listing(sources: Sources, *, pinned: dict[str, Any]) -> dict[str, Any]:
    """The body that `inputs.json` would have now, without downloading anything.

    Args:
        sources: what to list.
        pinned: `inputs.json` of the run; files from the hub are taken from it, since a commit never changes.
    """
    template = [sources.chat_template] if sources.chat_template.startswith(NAMED_TEMPLATE) else []
    files = [file for file in pinned.get("files", []) if not file["name"].startswith(NAMED_TEMPLATE)]
    uris = dict.fromkeys((*sources.dataset, *sources.eval_dataset, *template))
    for uri in uris:
        if uri.startswith(NAMED_TEMPLATE):
            found = list_objects(uri, patience_seconds=sources.patience_seconds)
            files += [_listed(name, entry, Path(name)) for name, entry in found.items()]
    with contextlib.suppress(DataError):  # what is not a model any more is not listed
        if sources.model.startswith(NAMED_TEMPLATE):
            resolved = resolve(sources.model, sources.patience_seconds, None)
            chosen = _chosen(sources.model, resolved, names=None)
            files += [_listed(resolved.name(one), one, None) for one in resolved.entries if one.key in chosen]
    return {**pinned, "files": files}


def _listed(name: str, entry: Entry, path: Path | None) -> dict[str, Any]:
    etag = _identity(name, entry.etag, path)
    return {"name": name, "size": entry.size, "etag": etag, "version": entry.version}


def _identity(name: str, etag: str | None, path: Path | None) -> str | None:
    """What distinguishes a file's content: the store's ETag, or the SHA-256 of a data file on this disk. Its time does
    not: a volume that is filled for every pod has other times and the same content."""
    if not name.startswith("/"):
        return etag
    return None if path is None else f"sha256:{sha256(path)}"


def _chosen(model: str, resolved: Resolved, *, names: frozenset[str] | None) -> frozenset[str]:
    """The keys of the objects that are a model (`model_files.choose`), of those with these names."""
    entries = [entry for entry in resolved.entries if names is None or resolved.name(entry) in names]

    def read(key: str) -> bytes:
        return resolved.store.read(key) or b""

    return frozenset(model_files.choose(model, {entry.key: entry.size for entry in entries}, read))


@dataclass(frozen=True, kw_only=True)
class Puller:
    """Downloads inputs, one kind after the other. What is on this disk already is used again.

    Each method may raise DataError (something is missing), AccessDeniedError (credentials or a licence) and
    StorageError (unreachable past the patience, or the disk is full).
    """

    sources: Sources
    directory: Path
    names: frozenset[str] | None
    """The only files to read, by full name; None for all."""
    weights: bool
    """False makes stubs of remote weights, with their headers and sizes."""

    @classmethod
    def of(cls, sources: Sources, *, scratch: Path, pinned: dict[str, Any] | None, weights: bool = True) -> Puller:
        """A puller of these sources.

        Args:
            sources: what to read.
            scratch: the directory above the downloads.
            pinned: `inputs.json` of an earlier attempt, whose files alone are read.
            weights: see the class.
        """
        return cls(
            sources=sources,
            directory=scratch / "inputs",
            names=None if pinned is None else frozenset(file["name"] for file in pinned["files"]),
            weights=weights,
        )

    def rest(self, model: ModelFiles, *, date: str | None) -> Inputs:
        """All inputs: the data and the template, together with a model that has been downloaded.

        Args:
            model: what `model` returned.
            date: of the run's first attempt (ISO 8601); today where None.
        """
        text, template_files = self.template(self.sources.chat_template)
        return Inputs(
            model=model.path,
            model_files=model.files,
            model_revision=model.revision,
            dataset=self.data(self.sources.dataset),
            eval_dataset=self.data(self.sources.eval_dataset),
            template_text=text,
            template_files=template_files,
            date=day(date),
        )

    def model(self, name: str) -> ModelFiles:
        """The base model."""
        place = self._place(name if self.weights else f"{name} without weights")
        if HUB_NAME.fullmatch(name):
            patience = self.sources.patience_seconds
            found = hub.fetch_model(name, place, patience_seconds=patience, weights=self.weights)
            path = model_files.folder_of({file: found.path / file for file in found.files}, self.directory)
            return ModelFiles(path=path, files=_hub_files(found), revision=found.commit)
        chosen = _chosen(name, resolve(name, self.sources.patience_seconds, None), names=self.names)
        small = {key for key in chosen if self.weights or not key.endswith(model_files.SUFFIX)}
        files = self._fetch(name, place, wanted=small.__contains__)
        if small != chosen:
            weights, patience = chosen - small, self.sources.patience_seconds
            files += safetensors_stub.fetch_headers(name, place, wanted=weights, patience_seconds=patience)
        read = (_file(file, named=False) for file in files)
        identified = tuple(dataclasses.replace(f, etag=_identity(f.name, f.etag, None)) for f in read)
        path = model_files.folder_of({file.key: file.path for file in files}, self.directory)
        return ModelFiles(path=path, files=identified, revision=None)

    def template(self, name: str) -> tuple[str | None, tuple[File, ...]]:
        """The text of a chat template that is a file, and the file; None for one that has a name."""
        if not name.startswith(NAMED_TEMPLATE):
            return None, ()
        files = self.data([name])
        return _text(files[0]), files

    def data(self, uris: Sequence[str]) -> tuple[File, ...]:
        """All files of these places."""
        found: list[File] = []
        for uri in uris:
            if uri.startswith("hf://"):
                patience = self.sources.patience_seconds
                found += _hub_files(hub.fetch_dataset(uri, self._place(uri), patience_seconds=patience))
            else:
                found += [
                    dataclasses.replace(_file(f, named=f.name == uri), etag=_identity(f.name, f.etag, f.path))
                    for f in self._fetch(uri, self._place(uri))
                ]
        return tuple(found)

    def _fetch(self, uri: str, place: Path, **options: Any) -> list[Fetched]:
        return fetch(uri, place, patience_seconds=self.sources.patience_seconds, names=self.names, **options)

    def _place(self, uri: str) -> Path:
        return self.directory / hashlib.sha256(uri.encode()).hexdigest()[:16]


def _text(file: File) -> str:
    if file.size > model_files.LARGEST_JSON:
        raise DataError(
            f"{file.name} has {file.size:,} bytes, more than any chat template needs.",
            remedy="Set TUNE_CHAT_TEMPLATE to the file with the template.",
        )
    try:
        return file.path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name} is not UTF-8: {error}.", remedy="Save the template as UTF-8.") from None


def _file(fetched: Fetched, *, named: bool) -> File:
    return File(
        name=fetched.name,
        path=fetched.path,
        size=fetched.size,
        etag=fetched.etag,
        version=fetched.version,
        named=named,
    )


def _hub_files(found: hub.HubFetched) -> tuple[File, ...]:
    return tuple(
        File(
            name=f"{found.name}/{name}",
            path=found.path / name,
            size=(found.path / name).stat().st_size,
            etag=None,
            version=found.commit,
            named=False,
        )
        for name in found.files
    )
