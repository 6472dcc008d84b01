"""The data files of a folder or a prefix: listed, and chosen by the rule of `job.inputs.data_files`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from job.inputs.data_files import Choice, LeftOut, Side, choose, file_type, is_working
from job.inputs.dataset_card import LONGEST, README, declared_splits
from job.storage.fetch import Resolved, find
from job.storage.folder import Rule

_RULE = Rule(
    enters=lambda name: not is_working(name), reads=lambda name: bool(file_type(name).type) and not is_working(name)
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is read of a place, and what is not."""

    resolved: Resolved
    """With the entries that are read, on either side."""
    choice: Choice
    """By keys."""

    def left_out(self) -> tuple[LeftOut, ...]:
        """By full name."""
        place = self.resolved.store.uri.rstrip("/")
        return tuple(replace(one, name=f"{place}/{one.name}") for one in self.choice.left_out)


def find_data(
    uri: str, *, side: Side, hold_out: bool, patience_seconds: float, names: Collection[str] | None = None
) -> Found:
    """List a place and choose its data files. A file that the URI itself names is read, whatever its name says.

    Args:
        uri: `s3://`, `file://` or an absolute path.
        side: see `choose`.
        hold_out: see `choose`.
        patience_seconds: how long an outage is retried.
        names: the only files to choose from, by full name; others were added later, and are logged.

    Raises: see `choose` and `job.storage.fetch.find`.
    """
    resolved = find(uri, _RULE, patience_seconds=patience_seconds)
    if resolved.named:
        choice = Choice(files=tuple(entry.key for entry in resolved.entries))
        return Found(resolved=resolved, choice=choice)
    choice = _chosen(uri, resolved, side=side, hold_out=hold_out)
    if names is not None:
        _of(resolved, choice).only(names)  # for the log
        pinned = replace(resolved, entries=[entry for entry in resolved.entries if resolved.name(entry) in names])
        now = _chosen(uri, pinned, side=side, hold_out=hold_out) if pinned.entries else Choice(files=())
        choice = replace(now, left_out=choice.left_out)
    return Found(resolved=_of(resolved, choice), choice=choice)


def _chosen(uri: str, resolved: Resolved, *, side: Side, hold_out: bool) -> Choice:
    keys = [entry.key for entry in resolved.entries]
    readme = (resolved.store.read_start(README, LONGEST) if README in keys else None) or b""
    declared = declared_splits(uri, readme, keys)
    choice = choose(uri, [*keys, *resolved.folders], side=side, hold_out=hold_out, declared=declared)
    links = (
        LeftOut(name=link, reason=f"a link to {target or 'the folder itself'}, which is read under that name")
        for link, target in resolved.repeated.items()
    )
    return replace(choice, left_out=(*choice.left_out, *links))


def _of(resolved: Resolved, choice: Choice) -> Resolved:
    """The entries that are read."""
    read = {*choice.files, *choice.held_out}
    return replace(resolved, entries=[entry for entry in resolved.entries if entry.key in read])
