"""Which files of a dataset on the hub are meant: the data files of one split.

Knows names and the README's header; downloads nothing.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]
from huggingface_hub import DatasetCard

from job.runtime.errors import DataError

_DATA_FILE = re.compile(r"\.(?P<kind>jsonl?|csv|parquet)(\.(gz|zst))?$")
_NOT_DATA_FILES = re.compile(r"(^|/)(dataset_infos?|dataset_dict|state|config)\.json$|(^|/)\.")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # the hub's words: huggingface.co/docs/datasets/repository_structure
_LISTED = 12


def data_files(repo: str, split: str | None, names: list[str], readme: str) -> list[str]:
    """The data files of one split.

    Args:
        repo: the repository's name, for messages.
        split: its name; None is the only split there is, else `train`.
        names: all files of the repository.
        readme: the README's text, whose header may declare which files belong to which split.

    Raises:
        DataError: no data files, no such split, or it is not clear which files are meant.
    """
    data = [name for name in names if _DATA_FILE.search(name) and not _NOT_DATA_FILES.search(name)]
    if not data:
        raise DataError(f"{repo} has no data files. It has: {_list(names)}.", remedy="Correct the name.")
    splits = _declared_splits(repo, readme, data) or _splits_by_name(data)
    chosen = splits[_split(repo, split, splits)]
    kinds = {found["kind"].replace("jsonl", "json") for name in chosen if (found := _DATA_FILE.search(name))}
    if len(kinds) > 1:
        raise DataError(
            f"{repo} has files of several formats, perhaps the same data twice: {_list(chosen)}.",
            remedy="Copy the files that are meant to S3 or a directory.",
        )
    return chosen


def _split(repo: str, asked: str | None, splits: dict[str, list[str]]) -> str:
    """The split that was asked for; without one the only one, else `train`."""
    wanted = asked or (next(iter(splits)) if len(splits) == 1 else "train")
    if splits.get(wanted):
        return wanted
    listed = "; ".join(f"{name}: {_list(files)}" for name, files in sorted(splits.items()))
    raise DataError(
        f"{repo} has no split {wanted!r}. It has {listed}.",
        remedy=f"Name one: hf://datasets/{repo}:{next(iter(sorted(splits)), 'train')}",
    )


def _declared_splits(repo: str, readme: str, data: list[str]) -> dict[str, list[str]]:
    """The `data_files` of the default configuration in the README's header; empty when it declares none."""
    configs = [config for config in _configs(repo, readme) if config.get("data_files")]
    if len(configs) > 1:
        default = [config for config in configs if config.get("default") or config.get("config_name") == "default"]
        configs = default[:1] or _ambiguous(repo, [str(config.get("config_name")) for config in configs])
    splits: dict[str, list[str]] = {}
    for config in configs:
        for split, pattern in _patterns(config["data_files"]):
            found = [name for name in data if _globbed(name, pattern)]
            splits[split] = list(dict.fromkeys(splits.get(split, []) + found))
    return {split: files for split, files in splits.items() if files}


def _configs(repo: str, readme: str) -> list[dict[str, Any]]:
    if not readme.lstrip().startswith("---"):
        return []
    try:
        return DatasetCard(readme).data.get("configs") or []
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise DataError(
            f"The header of README.md in {repo} is not valid: {' '.join(str(error).split())}.",
            remedy="Correct it, or copy the files that are meant to S3 or a directory.",
        ) from None


def _ambiguous(repo: str, names: list[str]) -> NoReturn:
    raise DataError(
        f"{repo} has several configurations and no default: {_list(names)}.",
        remedy="Copy the files that are meant to S3 or a directory.",
    )


def _patterns(declared: Any) -> list[tuple[str, str]]:
    """(split, pattern) of a `data_files`: a pattern, a list of patterns, or a list of splits with paths."""
    if isinstance(declared, str):
        return [("train", declared)]
    found = []
    for item in declared:
        split, paths = (item["split"], item["path"]) if isinstance(item, dict) else ("train", item)
        found += [(str(split), path) for path in ([paths] if isinstance(paths, str) else paths)]
    return found


def _globbed(name: str, pattern: str) -> bool:
    """Whether a path matches, as the hub does it: `*` stays within one directory, unlike in `fnmatch`."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    regex = "".join(
        {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(part, re.escape(part)) for part in parts
    )
    return re.fullmatch(regex, name) is not None


def _splits_by_name(data: list[str]) -> dict[str, list[str]]:
    """By the words in the paths, as the hub does; a repository without such words is all `train`."""
    splits: dict[str, list[str]] = {}
    for name in data:
        for split in _named_in(name):
            splits.setdefault(split, []).append(name)
    return splits or {"train": data}


def _named_in(name: str) -> list[str]:
    words = set(re.split(r"[^a-z]+", name.lower()))
    return [split for split, aliases in _SPLITS.items() if words & set(aliases)][:1]


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
