"""S3 object to file: ranges in parallel, written directly to their offsets, then verified, then renamed.

A range is read from the socket into one buffer per thread and written with pwrite: memory stays at a few megabytes
whatever the object's size, and no byte is copied twice in Python.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from botocore.exceptions import ClientError

from job.storage.base import Entry
from job.storage.disk import disk_errors, require_free, temporary
from job.storage.faults import ChangedError, DamagedError, MissingError
from job.storage.parallel import Stopped, each
from job.storage.progress import Progress
from job.storage.s3.bucket import Bucket
from job.storage.s3.checksum import Checksum, of_whole_object
from job.storage.s3.client import WORKERS
from job.storage.s3.failures import describe, head, is_missing, is_precondition_failed, is_range_gone

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

RANGE_BYTES = 32 << 20
BUFFER_BYTES = 1 << 20
DAMAGED_ATTEMPTS = 3


def download(bucket: Bucket, key: str, entry: Entry, path: Path) -> None:
    """See `Store.download`. `key` is the object's in the bucket, `entry` what it must be."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        require_free(path.parent, entry.size)
        again_if_damaged(lambda: _once(bucket, key, entry, path))


def _once(bucket: Bucket, key: str, entry: Entry, path: Path) -> None:
    # A new file for every try: a thread of the last one may still be writing.
    with temporary(path) as part:
        _Download(bucket, key, entry, part).run()
        part.replace(path)


def again_if_damaged(act: Callable[[], T]) -> T:
    """What `act` returns. Damage during a transfer is rare and does not repeat; damage in the store does."""
    for attempt in range(1, DAMAGED_ATTEMPTS):
        try:
            return act()
        except DamagedError as error:
            structlog.get_logger().warning("download_damaged", error=error.message, tries=attempt)
    return act()


@dataclass(frozen=True, kw_only=True)
class _Range:
    start: int
    size: int

    @property
    def header(self) -> str:
        return f"bytes={self.start}-{self.start + self.size - 1}"


class _Download:
    """One try to download one object."""

    def __init__(self, bucket: Bucket, key: str, entry: Entry, part: Path) -> None:
        self.bucket, self.key, self.entry, self.part = bucket, key, entry, part
        self.uri = f"s3://{bucket.name}/{key}"
        self.progress = Progress(self.uri, "download", entry.size)
        self.checksum: Checksum | None = None
        self.buffers = threading.local()

    def run(self) -> None:
        with _explained(self.uri):
            if self.entry.size <= RANGE_BYTES:
                crcs = [self.bucket.call("GetObject", self.key, self._whole, expected=_is_other)]
            else:
                crcs = self._ranges()
        if self.checksum and not self.checksum.matches(self.part, crcs):
            raise DamagedError(
                f"{self.uri} does not have the {self.checksum.algorithm} checksum that the store keeps for it.",
                remedy="Upload it again.",
            )

    def _whole(self, client: S3Client) -> tuple[int, int]:
        reply = client.get_object(Bucket=self.bucket.name, Key=self.key, **self._condition())
        self._require_same(reply, reply["ContentLength"])
        self.checksum = of_whole_object(reply)
        with contextlib.closing(_Reader(reply["Body"])) as reader:
            return self._copy(reader, _Range(start=0, size=self.entry.size), None)

    def _ranges(self) -> list[tuple[int, int]]:
        self.checksum = self.bucket.call("HeadObject", self.key, self._head, expected=_is_other)
        os.truncate(self.part, self.entry.size)
        starts = range(0, self.entry.size, RANGE_BYTES)
        ranges = [_Range(start=start, size=min(RANGE_BYTES, self.entry.size - start)) for start in starts]
        return each(self._range, ranges, workers=WORKERS)

    def _head(self, client: S3Client) -> Checksum | None:
        validates = getattr(client.meta.config, "response_checksum_validation", "") == "when_supported"
        mode: Any = {"ChecksumMode": "ENABLED"} if validates else {}  # boto3 adds it to a GET only
        reply = head(client, Bucket=self.bucket.name, Key=self.key, **mode, **self._condition())
        self._require_same(reply, reply["ContentLength"])
        return of_whole_object(reply)

    def _range(self, piece: _Range, stop: threading.Event) -> tuple[int, int]:
        def act(client: S3Client) -> tuple[int, int]:
            reply = client.get_object(Bucket=self.bucket.name, Key=self.key, Range=piece.header, **self._condition())
            total = reply.get("ContentRange", "").rpartition("/")[2]
            self._require_same(reply, int(total) if total.isdecimal() else self.entry.size)
            if reply["ContentLength"] != piece.size:
                raise DamagedError(
                    f"{self.uri}: the store does not honour {piece.header}.", remedy="Use another store."
                )
            with contextlib.closing(_Reader(reply["Body"])) as reader:
                return self._copy(reader, piece, stop)

        return self.bucket.call("GetObject", self.key, act, expected=_is_other, stop=stop)

    def _copy(self, body: _Reader, piece: _Range, stop: threading.Event | None) -> tuple[int, int]:
        """Read a reply's body to its offset in the file; returns its CRC and size."""
        view, done, crc = self._buffer(), 0, 0
        with self.part.open("r+b", buffering=0) as file:
            try:
                while count := body.readinto(view):
                    os.pwrite(file.fileno(), view[:count], piece.start + done)
                    done += count
                    self.progress.add(count)
                    crc = self.checksum.update(view[:count], crc) if self.checksum else 0
                    _continue(stop)
                _require_all(done, piece)
            except Exception:
                self.progress.add(-done)
                raise
        return crc, done

    def _buffer(self) -> memoryview:
        if not hasattr(self.buffers, "view"):
            self.buffers.view = memoryview(bytearray(BUFFER_BYTES))
        view: memoryview = self.buffers.view
        return view

    def _condition(self) -> dict[str, Any]:
        if self.entry.version:
            return {"VersionId": self.entry.version}
        return {"IfMatch": f'"{self.entry.etag}"'} if self.entry.etag else {}

    def _require_same(self, reply: Any, size: int) -> None:
        """Check the reply as well, since some stores ignore the condition."""
        etag = reply.get("ETag", "").strip('"')
        if size != self.entry.size or (self.entry.etag and etag and etag != self.entry.etag):
            raise _changed(self.uri)


def _continue(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Stopped


def _require_all(count: int, piece: _Range) -> None:
    """boto3 would check the length of a body itself, the reader below it does not."""
    if count != piece.size:
        raise ConnectionError(f"received {count} of {piece.size} bytes")


class _Reader:
    """The HTTP client's own reader below boto3's and urllib3's, which copy every buffer: twice as fast.

    Where a later version does not expose it, boto3's is used.
    """

    def __init__(self, body: Any) -> None:
        self._body = body
        self._raw = getattr(body, "_raw_stream", None)
        self._reader = getattr(self._raw, "_fp", None) or body

    def readinto(self, view: memoryview) -> int:
        return int(self._reader.readinto(view))

    def close(self) -> None:
        """Return the connection to the pool when everything was read, else close it."""
        if self._reader is not self._body and self._reader.isclosed():
            self._raw.release_conn()  # type: ignore[union-attr]
        self._body.close()


def _is_other(error: ClientError) -> bool:
    """Whether the reply says that the object is gone, or is another one."""
    return is_missing(error) or is_precondition_failed(error) or is_range_gone(error)


def _changed(uri: str) -> ChangedError:
    return ChangedError(f"{uri} changed while it was read.", remedy="Run again when it is complete.")


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        if not is_missing(error):
            raise _changed(uri) from error
        raise MissingError(f"{uri} does not exist any more: {describe(error)}.", remedy="Restore it.") from error
