"""Sources -> local files: the base model, the data and the template, and which versions of them were read.

Knows places, not contents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.config.addresses import HUB_NAME
from job.config.schema import Config
from job.inputs import hub, model_files, safetensors_stub
from job.inputs.data_files import LeftOut, Side
from job.inputs.files import DataFiles, File, fetched_file, identified, identity, repository_files
from job.inputs.places import Found, find_data
from job.runtime.errors import DataError
from job.storage.base import Entry
from job.storage.faults import MissingError
from job.storage.fetch import Fetched, Resolved, again_if_changed, download, fetch, list_objects, resolve

NAMED_TEMPLATE = ("s3://", "/")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a run's inputs are, as its settings name them, and how long an outage is retried."""

    model: str
    dataset: tuple[str, ...]
    eval_dataset: tuple[str, ...]
    chat_template: str
    patience_seconds: float
    hold_out: bool
    """Whether the dataset may bring the evaluation set."""

    @classmethod
    def of(cls, config: Config) -> Sources:
        """Those of a run."""
        return cls(
            model=config.model,
            dataset=config.dataset,
            eval_dataset=config.eval_dataset,
            chat_template=config.chat_template,
            patience_seconds=config.storage_patience_minutes * 60,
            hold_out=config.eval_fraction > 0 and not config.eval_dataset,
        )

    def find(self, uri: str, side: Side, *, names: frozenset[str] | None = None) -> Found:
        """The data files of a folder or a prefix; `names` are the only ones to choose from."""
        return find_data(uri, side=side, hold_out=self.hold_out, patience_seconds=self.patience_seconds, names=names)

    def find_model(self, uri: str, *, names: frozenset[str] | None = None) -> Resolved:
        """The files of a model (`model_files.choose`) in a folder or under a prefix, of those with these names."""
        found = resolve(uri, model_files.RULE, patience_seconds=self.patience_seconds)
        entries = {one.key: one for one in found.entries if names is None or found.name(one) in names}
        sizes = {key: entry.size for key, entry in entries.items()}
        chosen = model_files.choose(uri, sizes, lambda key: found.store.read(key) or b"")
        return dataclasses.replace(found, entries=[entries[key] for key in chosen])


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
    left_out: tuple[LeftOut, ...] = ()
    """What lies beside the data and is not read."""

    def with_data(self, training: DataFiles, evaluation: DataFiles) -> Inputs:
        """These data files; what only the other side reads is not left out."""
        sides = {file.name for file in (*training.files, *training.held_out, *evaluation.files)}
        left_out = {one.name: one for one in (*training.left_out, *evaluation.left_out) if one.name not in sides}
        return dataclasses.replace(
            self,
            dataset=training.files,
            eval_dataset=training.held_out + evaluation.files,
            left_out=tuple(left_out.values()),
        )

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
    for uri in filter(_is_address, template):
        found = list_objects(uri, patience_seconds=sources.patience_seconds)
        files += [_listed(name, entry, Path(name)) for name, entry in found.items()]
    with contextlib.suppress(DataError):  # what is not a model any more is not listed
        if _is_address(sources.model):
            model = sources.find_model(sources.model)
            files += [_listed(model.name(one), one, None) for one in model.entries]
    sides: tuple[tuple[Side, tuple[str, ...]], ...] = (
        ("training", sources.dataset),
        ("evaluation", sources.eval_dataset),
    )
    for side, uris in sides:
        for uri in filter(_is_address, uris):
            with contextlib.suppress(MissingError):
                data = sources.find(uri, side).resolved
                files += [_listed(data.name(one), one, Path(data.name(one))) for one in data.entries]
    return {**pinned, "files": list({file["name"]: file for file in files}.values())}


def _is_address(uri: str) -> bool:
    """Whether it is a place in a bucket or on this disk, not a name on the hub or of a template."""
    return uri.startswith(NAMED_TEMPLATE)


def _listed(name: str, entry: Entry, path: Path | None) -> dict[str, Any]:
    """An entry as `File.as_json` has it."""
    return {"name": name, "size": entry.size, "etag": identity(name, entry.etag, path), "version": entry.version}


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
        pulled = Inputs(
            model=model.path,
            model_files=model.files,
            model_revision=model.revision,
            dataset=(),
            eval_dataset=(),
            template_text=text,
            template_files=template_files,
            date=day(date),
        )
        return pulled.with_data(self.data("training"), self.data("evaluation"))

    def model(self, name: str) -> ModelFiles:
        """The base model."""
        place = self._place(name if self.weights else f"{name} without weights")
        if HUB_NAME.fullmatch(name):
            patience = self.sources.patience_seconds
            found = hub.fetch_model(name, place, patience_seconds=patience, weights=self.weights)
            path = model_files.folder_of({file: found.path / file for file in found.files}, self.directory)
            return ModelFiles(path=path, files=repository_files(found), revision=found.commit)
        files = again_if_changed(lambda: self._model(name, place))
        read = map(fetched_file, files)
        identified = tuple(dataclasses.replace(f, etag=identity(f.name, f.etag, None)) for f in read)
        path = model_files.folder_of({file.key: file.path for file in files}, self.directory)
        return ModelFiles(path=path, files=identified, revision=None)

    def _model(self, name: str, place: Path) -> list[Fetched]:
        found = self.sources.find_model(name, names=self.names)
        stubs = [entry for entry in found.entries if not self.weights and entry.key.endswith(model_files.SUFFIX)]
        whole = [entry for entry in found.entries if entry not in stubs]
        files = download(dataclasses.replace(found, entries=whole), place)
        return files + safetensors_stub.download_headers(dataclasses.replace(found, entries=stubs), place)

    def template(self, name: str) -> tuple[str | None, tuple[File, ...]]:
        """The text of a chat template that is a file, and the file; None for one that has a name."""
        if not _is_address(name):
            return None, ()
        files = tuple(identified(file) for file in self._fetch(name, self._place(name)))
        return _text(files[0]), files

    def data(self, side: Side) -> DataFiles:
        """The data files of one side; the training data may bring held-out ones."""
        uris = self.sources.dataset if side == "training" else self.sources.eval_dataset
        return sum(((self._data if _is_address(uri) else self._hub_data)(uri, side) for uri in uris), DataFiles())

    def _hub_data(self, uri: str, side: Side) -> DataFiles:
        found = hub.fetch_dataset(
            uri,
            self._place(uri),
            patience_seconds=self.sources.patience_seconds,
            side=side,
            hold_out=self.sources.hold_out,
        )
        held_out = repository_files(dataclasses.replace(found, files=found.held_out))
        left_out = tuple(LeftOut(name=f"{found.name}/{one.name}", reason=one.reason) for one in found.left_out)
        return DataFiles(files=repository_files(found), held_out=held_out, left_out=left_out)

    def _data(self, uri: str, side: Side) -> DataFiles:
        def once() -> DataFiles:
            found = self.sources.find(uri, side, names=self.names)
            files = {file.key: identified(file) for file in download(found.resolved, self._place(uri))}
            return DataFiles(
                files=tuple(files[name] for name in found.choice.files),
                held_out=tuple(files[name] for name in found.choice.held_out),
                left_out=found.left_out(),
            )

        return again_if_changed(once)

    def _fetch(self, uri: str, place: Path) -> list[Fetched]:
        return fetch(uri, place, patience_seconds=self.sources.patience_seconds, names=self.names)

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
