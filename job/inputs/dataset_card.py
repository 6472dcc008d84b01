"""What a dataset's README declares of its files: the splits in its header.

Source: huggingface.co/docs/hub/datasets-manual-configuration. Knows names and the README's text; opens nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

from job.inputs.data_files import COPY_FILES, HUB, NAME_FILES, listed
from job.runtime.errors import DataError

README = "README.md"
LONGEST = 1 << 20
"""Bytes of a README that are read."""
MOST_MATCHED = 5_000_000
"""Comparisons of a name and a pattern, of which each takes some microseconds."""
_WILDCARD = re.compile(r"(\*\*/|\*\*|\*|\?)")
_HEADER = re.compile(r"\s*---\r?\n([\S\s]*?)\r?\n---(?:\r\n|\n|$)")


def declared_splits(place: str, readme: bytes, names: Sequence[str]) -> dict[str, list[str]]:
    """The `data_files` of the default configuration in a README's header; empty when it declares none.

    Args:
        place: for messages.
        readme: its first `LONGEST` bytes.
        names: of all files of the place.

    Raises:
        DataError: the header is not valid, has several configurations and no default, or names no file that is there.
    """
    configs = [config for config in _configs(place, readme) if config.get("data_files")]
    if len(configs) > 1:
        default = [config for config in configs if _is_default(config)]
        configs = default[:1] or _ambiguous(place, [_text(place, config, "config_name") for config in configs])
    if not configs:
        return {}
    folder = _text(place, configs[0], "data_dir").strip("/")
    patterns = _patterns(place, configs[0]["data_files"])
    if len(patterns) * len(names) > MOST_MATCHED:
        raise _invalid(place, f"it has {len(patterns):,} patterns for {len(names):,} files")
    splits: dict[str, list[str]] = {}
    for split, pattern in patterns:
        whole = f"{folder}/{pattern.removeprefix('./')}" if folder else pattern
        found = [name for name in names if _globbed(name, whole)]
        splits[split] = list(dict.fromkeys(splits.get(split, []) + found))
    if not any(splits.values()):
        raise _invalid(place, f"there is no file of those that it names ({listed([one for _, one in patterns])})")
    return {split: files for split, files in splits.items() if files}


def _is_default(config: dict[str, Any]) -> bool:
    return config.get("default") in {"true", "True", "TRUE"} or config.get("config_name") == "default"


def _text(place: str, config: dict[str, Any], key: str) -> str:
    value = config.get(key, "")
    if not isinstance(value, str):
        raise _invalid(place, f"`{key}` is not a text")
    return value


def _configs(place: str, readme: bytes) -> list[dict[str, Any]]:
    text = readme.decode(errors="replace").removeprefix("\ufeff")
    header = _HEADER.match(text)
    if header is None and len(readme) >= LONGEST and text.lstrip().startswith("---"):
        raise _invalid(place, f"it has more than {LONGEST:,} bytes")
    if header is None:
        return []
    import yaml  # type: ignore[import-untyped]  # noqa: PLC0415 - few data sets have such a header

    try:  # all values as texts: with aliases and merges, a few hundred bytes can make values of any size
        data = yaml.load(header[1], Loader=yaml.BaseLoader)  # noqa: S506 - it makes texts, lists and dicts only
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _invalid(place, f"{type(error).__name__}: {' '.join(str(error).split())}") from None
    if data is None:
        return []  # an empty header
    found = (data.get("configs") or []) if isinstance(data, dict) else None
    if not (isinstance(found, list) and all(isinstance(config, dict) for config in found)):
        raise _invalid(place, "it holds no values by name, or `configs` is not a list of configurations")
    return found


def _invalid(place: str, reason: str) -> DataError:
    return DataError(
        f"The header of README.md in {place} is not valid: {reason}.",
        remedy=f"Correct it. {COPY_FILES if place.startswith(HUB) else NAME_FILES}",
    )


def _ambiguous(place: str, names: list[str]) -> NoReturn:
    raise DataError(
        f"{place} has several configurations and no default: {listed(names)}.",
        remedy=COPY_FILES if place.startswith(HUB) else NAME_FILES,
    )


def _patterns(place: str, declared: Any) -> list[tuple[str, str]]:
    """(split, pattern) of a `data_files`: a pattern, a list of patterns, splits with their patterns, or a list of
    splits with paths."""
    if isinstance(declared, dict):
        declared = [{"split": split, "path": paths} for split, paths in declared.items()]
    found: list[tuple[str, str]] = []
    for item in [declared] if isinstance(declared, str) else declared if isinstance(declared, list) else [None]:
        one = item if isinstance(item, dict) else {"split": "train", "path": item}
        split, paths = one.get("split"), one.get("path")
        listed = [paths] if isinstance(paths, str) else paths
        if not (isinstance(split, str) and isinstance(listed, list) and all(isinstance(path, str) for path in listed)):
            raise _invalid(place, "`data_files` is neither a pattern, nor a list of patterns or of {split, path}")
        found += [(split, path) for path in listed]
    return found


def _globbed(name: str, pattern: str) -> bool:
    """Whether a path matches, as the hub does it: `*` stays within one directory, unlike in `fnmatch`.

    The positions that are reached are kept for each part of the pattern, so that no pattern takes long: a regular
    expression would try them in all combinations.
    """
    reached = {0}
    for part in _WILDCARD.split(pattern.removeprefix("./")):
        if part == "**/":
            first = min(reached, default=len(name))
            reached |= {at + 1 for at in range(first, len(name)) if name[at] == "/"}
        elif part in {"*", "**"}:
            reached = _extended(name, reached, within_folder=part == "*")
        elif part == "?":
            reached = {at + 1 for at in reached if at < len(name) and name[at] != "/"}
        else:
            reached = {at + len(part) for at in reached if name.startswith(part, at)}
    return len(name) in reached


def _extended(name: str, reached: set[int], *, within_folder: bool) -> set[int]:
    found: set[int] = set()
    inside = False
    for at in range(len(name) + 1):
        inside = at in reached or (inside and not (within_folder and name[at - 1] == "/"))
        if inside:
            found.add(at)
    return found
