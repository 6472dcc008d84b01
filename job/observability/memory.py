"""The memory that this process may use, and whether it runs out: its container's limit, or the machine's memory.

It reads what the kernel shows and watches it in a thread; what follows from a shortage is for the caller. Formats:

- cgroup v2: https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
- cgroup v1: https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
- the machine: https://docs.kernel.org/filesystems/proc.html#meminfo
"""

from __future__ import annotations

import contextlib
import resource
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import psutil
import structlog

log = structlog.get_logger()
CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc")
NEAR = 0.95
"""Above this share of the limit, memory counts as running out: the next allocation may be the last one."""
POLL_SECONDS = 0.5
EVERY_SECONDS = 30.0
"""Between two notes that say the same, with a higher peak; and before a note that failed is tried again."""
CALM_SECONDS = 60.0
"""After so long below the limit, memory does not count as running out any more."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Memory under a limit, at one moment."""

    limit_bytes: int
    in_use_bytes: int
    """What the kernel cannot take back: pages of files, which it drops before it kills, are not in it."""
    oom_kills: int = 0
    """How many processes the kernel has killed under this limit, ever."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What an attempt notes of its memory while it still can, for those who wonder later why it died."""

    running_out: bool
    """Use is near the limit, or the kernel has just killed a process for it; false once that was over for a minute."""
    limit_of: str
    """`container`, or `machine` where the container has no limit."""
    limit_bytes: int
    in_use_bytes: int
    peak_in_use_bytes: int
    """Of this attempt; looked at twice a second, so that a short peak may be missing."""
    own_bytes: int
    """Resident memory of this process and its children; what they share counts for each."""
    oom_kills: int
    """Processes that the kernel has killed under this limit since the attempt began."""


class Limit(Protocol):
    """Something that limits memory."""

    @property
    def kind(self) -> str:
        """`container` or `machine`."""
        ...

    def read(self) -> Usage | None:
        """What is in use now; None if the kernel does not show it, or there is no limit."""
        ...


@dataclass(frozen=True, kw_only=True)
class Names:
    """What one version of cgroups calls its files."""

    limit: str
    usage: str
    kills: str
    reclaimable: tuple[str, ...]
    """Entries of `memory.stat` that the kernel takes back when memory is short."""


V1 = Names(
    limit="memory.limit_in_bytes",
    usage="memory.usage_in_bytes",
    kills="memory.oom_control",
    reclaimable=("total_active_file", "total_inactive_file"),
)
V2 = Names(
    limit="memory.max",
    usage="memory.current",
    kills="memory.events",
    reclaimable=("active_file", "inactive_file", "slab_reclaimable"),
)


@dataclass(frozen=True, kw_only=True)
class Group:
    """A control group."""

    directory: Path
    names: Names
    kind: str = "container"

    def read(self) -> Usage | None:
        """What is in use now; None without a limit."""
        try:
            limit, usage = (int((self.directory / name).read_text()) for name in (self.names.limit, self.names.usage))
            stat = _counts(self.directory / "memory.stat")
        except (OSError, ValueError):  # ValueError: `max`
            return None
        kills = 0
        with contextlib.suppress(OSError, ValueError):
            kills = _counts(self.directory / self.names.kills).get("oom_kill", 0)
        reclaimable = sum(stat.get(name, 0) for name in self.names.reclaimable)
        return Usage(limit_bytes=limit, in_use_bytes=max(0, usage - reclaimable), oom_kills=kills)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """All memory of this machine, which others may use as well."""

    kind: str = "machine"

    def read(self) -> Usage | None:
        """What is in use now, by whomever."""
        try:
            found = _counts(PROC / "meminfo")
            total, available = (found[name] << 10 for name in ("MemTotal", "MemAvailable"))
        except (OSError, ValueError, KeyError):
            return None
        return Usage(limit_bytes=total, in_use_bytes=total - available)


def container() -> Group | None:
    """The control group of this process, or one above it, with the lowest limit: memory runs out there first. Of equal
    ones it is the nearest; None if only the machine limits it."""
    machine = Machine().read()
    limits = [(group, usage.limit_bytes) for group in _groups() if (usage := group.read())]
    # Without a limit, v1 shows a number that is larger than any machine.
    limits = [(group, limit) for group, limit in limits if not (machine and limit >= machine.limit_bytes)]
    return min(limits, key=lambda found: found[1])[0] if limits else None


def container_limit() -> int | None:
    """Bytes of memory that the container may use; None without a limit."""
    group = container()
    usage = group.read() if group else None
    return usage.limit_bytes if usage else None


def peak_bytes() -> int:
    """The most memory that this process has had resident since its program began, without its children's.

    `getrusage` would count what the launching process had before this program took its place
    (https://man7.org/linux/man-pages/man2/getrusage.2.html: `ru_maxrss` survives an exec); `VmHWM` does not.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in (PROC / "self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "VmHWM":
                return int(value.split()[0]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # a sandbox that does not show it


@contextlib.contextmanager
def watched(note: Callable[[Evidence], None]) -> Iterator[None]:
    """Inside, call `note` in another thread whenever memory begins to run out, and when that is over.

    As long as there is enough memory nothing happens. A call that fails is made again after `EVERY_SECONDS`.
    """
    ended = threading.Event()
    threading.Thread(target=_watch, args=(note, ended), name="memory", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _watch(note: Callable[[Evidence], None], ended: threading.Event) -> None:
    limit: Limit = container() or Machine()
    judge = Judge(kind=limit.kind)
    untold: Evidence | None = None
    next_try = 0.0
    while not ended.wait(POLL_SECONDS):
        usage, now = limit.read(), time.monotonic()
        news = judge.look(usage, now) if usage else None
        if news and news.running_out:
            log.warning("memory_nearly_full", **asdict(news))
        untold = news or untold
        if untold and (news or now >= next_try):
            next_try = now + EVERY_SECONDS
            with contextlib.suppress(Exception):  # evidence is for later: nothing of it may end a run
                note(untold)
                untold = None


class Judge:
    """Decides when there is something to note."""

    def __init__(self, *, kind: str, own_bytes: Callable[[], int] | None = None) -> None:
        self._kind = kind
        self._own_bytes = own_bytes or _own_bytes
        self._first_kills: int | None = None
        self._kills = self._peak = self._noted_peak = 0
        self._noted = False
        self._noted_at = self._near_at = 0.0

    def look(self, usage: Usage, now: float) -> Evidence | None:
        """What to note of this moment, if anything.

        Args:
            usage: the memory in use.
            now: seconds of a monotonic clock.
        """
        if self._first_kills is None:
            self._first_kills = self._kills = usage.oom_kills
        self._peak = max(self._peak, usage.in_use_bytes)
        near = usage.oom_kills > self._kills or self._near(usage)
        self._kills = usage.oom_kills
        if near:
            self._near_at = now
            higher = self._peak > self._noted_peak and now - self._noted_at >= EVERY_SECONDS
            if self._noted and not higher:
                return None
        elif not self._noted or now - self._near_at < CALM_SECONDS:
            return None
        self._noted, self._noted_at, self._noted_peak = near, now, self._peak
        return Evidence(
            running_out=near,
            limit_of=self._kind,
            limit_bytes=usage.limit_bytes,
            in_use_bytes=usage.in_use_bytes,
            peak_in_use_bytes=self._peak,
            own_bytes=self._own_bytes(),
            oom_kills=usage.oom_kills - self._first_kills,
        )

    def _near(self, usage: Usage) -> bool:
        if usage.in_use_bytes < NEAR * usage.limit_bytes:
            return False
        # A machine may be full of other people's processes: the kernel kills the largest.
        return self._kind == "container" or 2 * self._own_bytes() >= usage.in_use_bytes


def _groups() -> Iterator[Group]:
    """The control groups of this process, from the inside out, as far as its container sees them.

    A line of `/proc/self/cgroup` is `<hierarchy>:<controllers>:<path>`, for v2 `0::<path>`. The path may be that of the
    host, of which the container sees only its own part.
    """
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            top, names = CGROUP / "memory", V1
        elif hierarchy == "0":
            top, names = CGROUP, V2
        else:
            continue
        directory = top / path.lstrip("/")
        if ".." in directory.parts or not directory.is_dir():
            directory = top
        while directory != top:
            yield Group(directory=directory, names=names)
            directory = directory.parent
        yield Group(directory=top, names=names)


def _counts(path: Path) -> dict[str, int]:
    """A file of the kernel's with lines such as `oom_kill 3` or `MemTotal: 16384 kB`."""
    pairs = (line.split()[:2] for line in path.read_text().splitlines())
    return {name.rstrip(":"): int(value) for name, value in pairs}


def _own_bytes() -> int:
    total = 0
    with contextlib.suppress(psutil.Error):
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total
