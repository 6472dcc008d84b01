"""Which files of a place are data, and which of them are held out: one rule for a folder, a prefix and a hub.

Knows names, and what a README declares; opens and downloads nothing. Sources: the words and patterns by which Hugging
Face's `datasets` finds splits (`datasets/data_files.py`), and the names that Hadoop and Spark hide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from job.inputs.table_formats import check_no_table
from job.runtime.errors import DataError
from job.storage.faults import MissingError

Side = Literal["training", "evaluation"]
Splits = Mapping[str, Sequence[str]]
"""The names of the files of each split."""

TYPES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
CODECS = {".gz": "gzip", ".zst": "zstd"}
METADATA = frozenset({"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json"})
"""Files that dataset libraries store next to the data."""
HIDDEN = (".", "_", "~")
"""How names begin that Hadoop, Spark, editors and operating systems give to what is not data."""
WORKING_FOLDERS = frozenset({"lost+found", "$RECYCLE.BIN", "System Volume Information", "@eaDir", "#recycle"})
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "holdout", "heldout", "held[-_. ]out", "hold[-_. ]out"),
}
"""The words of `datasets`, and those that say it in English."""
_LETTER = r"[^\W\d_]"
_NAMES = {
    split: re.compile(rf"(?<!{_LETTER})(?:{'|'.join(words)})(?!{_LETTER})", re.IGNORECASE)
    for split, words in WORDS.items()
}
_SHARD = re.compile(r"(?:.*/)?(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_NUMBERED = re.compile(r"(?P<before>.*)(?P<number>\d{5})-of-(?P<count>\d{5})(?P<after>[^/]*)")
_LISTED = 12

HUB = "hf://datasets/"
NAME_FILES = "Name the files that are meant, separated by commas."
COPY_FILES = "Copy the files that are meant to S3 or a directory."
NO_TYPE = "the name has no known file type"
HIDDEN_NAME = "hidden, or a working file or folder"
LIBRARY = "metadata of a dataset library"
NO_SPLIT = "the name says no split, and others do"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileType:
    """A file's type (one of `TYPES`, or empty if unknown) and its compression, both by its name."""

    type: str
    compression: str
    stem: str
    """The name without both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """A file that is not read, or a folder (its name ends with `/`) of which none is."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What is read of a place."""

    files: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    """Files that become the evaluation set, if there is no other."""
    left_out: tuple[LeftOut, ...] = ()
    """Data files first."""


def file_type(name: str) -> FileType:
    """The type by suffix, in upper or lower case."""
    base = PurePosixPath(name).name
    compression = next((suffix for suffix in CODECS if base.lower().endswith(suffix)), "")
    stem = base[: len(base) - len(compression)]
    known = next((suffix for suffix in TYPES if stem.lower().endswith(suffix)), "")
    return FileType(type=known, compression=compression, stem=stem[: len(stem) - len(known)])


def is_working(name: str) -> bool:
    """Whether a file or folder of this name (without those above it) is not data: hidden, temporary, or a system's.

    A name with `=` is a partition of a table (`_date=2026-11-01`), as in Spark.
    """
    return (name.startswith(HIDDEN) and "=" not in name) or name.endswith("_$folder$") or name in WORKING_FOLDERS


def choose(
    place: str,
    names: Iterable[str],
    *,
    side: Side = "training",
    hold_out: bool = False,
    split: str | None = None,
    declared: Splits | None = None,
) -> Choice:
    """The files to read of a place with several.

    Where names say splits, `train` is learned, and `validation`, or else `test`, can be held out; the rest is left out.
    Files whose names say nothing are learned if none says `train`.

    Args:
        place: for messages.
        names: of its files, relative to it; a name that ends with `/` is a folder that was not entered.
        side: what the files are for; for `evaluation`, `validation` is taken, or else `test`.
        hold_out: whether the training data may bring an evaluation set.
        split: the one split that is asked for; nothing is held out then.
        declared: the splits that the place itself declares, instead of those that the names say.

    Raises:
        MissingError: no data files.
        DataError: no such split, a table format that is more than its Parquet files, the same data
            twice, or it is not clear which files are meant.
    """
    names = sorted(names)
    data, others = _sorted_out(names)
    check_no_table(place, [*data, *(one.name for one in others)])
    if not data:
        raise MissingError(
            f"{place} has no data files. It has: {listed([one.name for one in others])}.",
            remedy=f"Correct the address, or give files that end in {', '.join(TYPES)}, also with "
            f"{' or '.join(CODECS)}.",
        )
    splits = _declared(declared or {}, data) or _splits(data, asked=split)
    chosen = _wanted(place, splits, side, split)
    files = _of(splits, chosen)
    held = _held_out(splits, chosen) if hold_out and not split and side == "training" else []
    held_out = [name for name in _of(splits, held) if name not in set(files)]
    _check_once(place, [*files, *held_out])
    for one in filter(None, (*chosen, *held)):
        _check_one_type(place, one, splits[one])
    return Choice(
        files=tuple(files),
        held_out=tuple(held_out),
        left_out=(
            *_missing([*files, *held_out]),
            *(() if split else (*_rest(data, splits, {*files, *held_out}), *others)),
        ),
    )


def by_reason(left_out: Iterable[LeftOut]) -> dict[str, list[str]]:
    """The names for each reason."""
    found: dict[str, list[str]] = {}
    for one in left_out:
        found.setdefault(one.reason, []).append(one.name)
    return found


def held_out_reason(split: str) -> str:
    """Why a file of another split is not read."""
    return f"held out: {split}" if _side_of(split) != "train" else f"of the split {split}"


def split_of(name: str) -> str:
    """The split that a path says: its file name, or else the nearest folder that says one; empty if none does.

    A name that says two (`train_test.jsonl`) says none.
    """
    path = PurePosixPath(name)
    for part in (file_type(name).stem, *(folder.name for folder in path.parents)):
        found = [split for split, pattern in _NAMES.items() if pattern.search(part)]
        if len(found) == 1:
            return found[0]
    return ""


def _side_of(split: str) -> str:
    return split if split in WORDS else split_of(split)


def _declared(declared: Splits, data: list[str]) -> dict[str, list[str]]:
    splits = {split: [name for name in data if name in set(files)] for split, files in declared.items()}
    return {split: files for split, files in splits.items() if files}


def _splits(data: list[str], *, asked: str | None) -> dict[str, list[str]]:
    """By the words in the names; the files that say none are under the empty name.

    Of shards (`train_sft-00000-of-00003.parquet`) what stands before the number is a split of its own, if it says
    which side it is, or is asked for.
    """
    splits: dict[str, list[str]] = {}
    for name in data:
        shard = _SHARD.fullmatch(name)
        own = shard["split"] if shard and (shard["split"] == asked or split_of(shard["split"])) else split_of(name)
        splits.setdefault(own, []).append(name)
    return splits


def _wanted(place: str, splits: dict[str, list[str]], side: Side, asked: str | None) -> list[str]:
    """The splits that are read."""
    if asked is not None:
        found = [asked] if splits.get(asked) else []
    elif side == "evaluation":
        found = _held_out(splits, []) or _training(splits)
    else:
        found = _training(splits)
    if found:
        return found
    named = {name or "no split": files for name, files in sorted(splits.items())}
    there = "; ".join(f"{name}: {listed(files)}" for name, files in named.items())
    raise DataError(
        f"{place} has no split {asked or 'train'!r}. It has {there}.",
        remedy=f"Name one: {place}:{next(iter(named))}" if place.startswith(HUB) else NAME_FILES,
    )


def _training(splits: dict[str, list[str]]) -> list[str]:
    """`train`, or the only split that says so; else the files that say nothing; else the only split there is."""
    if "train" in splits:
        return ["train"]
    training = [split for split in splits if _side_of(split) == "train"]
    if training or "" in splits:
        return training if len(training) == 1 else [""] if not training else []
    return list(splits) if len(splits) == 1 else []


def _held_out(splits: dict[str, list[str]], chosen: list[str]) -> list[str]:
    """All splits that are called `validation`, or else all that are called `test`."""
    for side in ("validation", "test"):
        if found := [split for split in splits if _side_of(split) == side and split not in chosen]:
            return found
    return []


def _of(splits: dict[str, list[str]], chosen: list[str]) -> list[str]:
    return sorted({name for split in chosen for name in splits[split]})


def _rest(data: list[str], splits: dict[str, list[str]], read: set[str]) -> list[LeftOut]:
    of = {name: split for split, files in splits.items() for name in files}
    return [
        LeftOut(name=name, reason=held_out_reason(of[name]) if of.get(name) else NO_SPLIT)
        for name in data
        if name not in read
    ]


def _missing(names: list[str]) -> Iterator[LeftOut]:
    """The first of the shards of each set (`train-00000-of-00003.parquet`) that are not there."""
    sets: dict[tuple[str, int, str], set[int]] = {}
    for name in names:
        if shard := _NUMBERED.fullmatch(name):
            sets.setdefault((shard["before"], int(shard["count"]), shard["after"]), set()).add(int(shard["number"]))
    for (before, count, after), numbers in sets.items():
        if len(numbers) < count:
            first = next(number for number in range(count in numbers, count + 1) if number not in numbers)
            name = f"{before}{first:05}-of-{count:05}{after}"
            yield LeftOut(name=name, reason=f"not there, like {count - len(numbers):,} of its {count:,} parts")


def _sorted_out(names: list[str]) -> tuple[list[str], list[LeftOut]]:
    """The data files, and the others with the reason; of a working folder only the folder."""
    data: list[str] = []
    others: dict[str, str] = {}
    for name in names:
        parts = name.rstrip("/").split("/")
        working = next((number for number, part in enumerate(parts, 1) if is_working(part)), 0)
        kind = file_type(name)
        if working:
            others["/".join(parts[:working]) + "/" * (working < len(parts) or name.endswith("/"))] = HIDDEN_NAME
        elif parts[-1].lower().removesuffix(kind.compression) in METADATA:
            others[name] = LIBRARY
        elif not kind.type:
            others[name] = NO_TYPE
        else:
            data.append(name)
    return data, [LeftOut(name=_shown(name), reason=reason) for name, reason in others.items()]


def _shown(name: str) -> str:
    """The name as text that can be written, also where a disk has one that is not UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def _check_once(place: str, names: list[str]) -> None:
    """Raise DataError for two files of a folder that differ only in type or compression."""
    seen: dict[str, str] = {}
    for name in names:
        stem = f"{name.rpartition('/')[0]}/{file_type(name).stem}"
        if stem in seen:
            raise DataError(
                f"{place} has {seen[stem]} and {name}, perhaps the same data twice.",
                remedy=COPY_FILES if place.startswith(HUB) else f"Remove one of them. {NAME_FILES}",
            )
        seen[stem] = name


def _check_one_type(place: str, split: str, names: list[str]) -> None:
    """Raise DataError for a split in several formats, as in repositories with a converted copy of their data."""
    if len({file_type(name).type.replace("ndjson", "json").replace("jsonl", "json") for name in names}) > 1:
        raise DataError(
            f"{place} has files of several formats for {split!r}, perhaps the same data twice: {listed(names)}.",
            remedy=COPY_FILES if place.startswith(HUB) else NAME_FILES,
        )


def listed(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) + more) or "nothing"
