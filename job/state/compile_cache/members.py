"""The members of a tar stream that this job has written (`job.state.compile_cache.archive`), one after the other.

Not `tarfile.open`, which believes every size that a header has: of long names and of extended headers, which it reads
into memory whole, and of sparse files, whose content it makes up. The job writes plain members, and before some an
extended header with a long name; anything else is rejected before it is read. The format is POSIX pax:
https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

CHUNK = 1 << 20
LONGEST_NAME = 1024
"""In bytes."""
_RECORD = re.compile(rb"(\d{1,4}) path=(.*)\n", re.DOTALL)
"""`<length of the record> path=<name>`, the only record of an extended header."""
_RECORD_SIZE = LONGEST_NAME + len("1034 path=\n")


class Stream(Protocol):
    """What is read, without its compression."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes; fewer only at the end."""
        ...


@dataclass(frozen=True, kw_only=True)
class Member:
    """One member."""

    name: str
    size: int
    """Never negative."""
    regular: bool
    """Whether it is a regular file that is stored as it is."""
    executable: bool
    _of: Members

    def content(self) -> Iterator[bytes]:
        """Its content, piece by piece. Only to be asked for once, before the next member."""
        left = self.size
        while left:
            data = self._of.read(min(left, CHUNK))
            left -= len(data)
            yield data


class Members:
    """All members, to be iterated over once.

    Raises:
        ValueError: the stream ends too early, or has something that the job does not write.
        tarfile.TarError: a header is damaged.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._left = 0
        """Bytes of the present member that were not read, with its padding."""

    def __iter__(self) -> Iterator[Member]:
        while member := self._next():
            if member.type == tarfile.XHDTYPE:
                name = self._long_name(member)
                if not (member := self._next()):
                    raise ValueError("it is cut off")
                member.name = name
            yield Member(
                name=member.name,
                size=member.size,
                regular=member.type == tarfile.REGTYPE,
                executable=bool(member.mode & 0o100),
                _of=self,
            )

    def read(self, size: int) -> bytes:
        """A part of the present member."""
        self._left -= size
        return self._read(size)

    def _next(self) -> tarfile.TarInfo | None:
        """The next header; None at the block of zeros after the last member. What was not read before it is skipped."""
        while self._left:
            self.read(min(self._left, CHUNK))
        block = self._read(tarfile.BLOCKSIZE)
        if not any(block):
            return None
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if member.size < 0:
            raise ValueError(f"{member.name!r} in it has a size of {member.size} bytes")
        self._left = -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return member

    def _long_name(self, header: tarfile.TarInfo) -> str:
        if header.size > _RECORD_SIZE:
            raise ValueError(f"a header in it has {header.size} bytes")
        found = _RECORD.fullmatch(self.read(header.size))
        if not found or int(found[1]) != header.size:
            raise ValueError("a header in it has something else than a name")
        return found[2].decode()

    def _read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise ValueError("it is cut off")
        return data
