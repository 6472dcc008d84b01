"""File to S3 object: one request when small, parts in parallel when large, aborted on failure, verified afterwards.

Every part has a checksum, so that the store rejects bytes that were damaged during the transfer (`checksum`).
"""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from botocore.exceptions import ClientError

from job.runtime.errors import StorageError
from job.runtime.hashing import sha256 as sha256_of
from job.storage.disk import disk_errors
from job.storage.faults import DamagedError
from job.storage.parallel import Stopped, each
from job.storage.progress import Progress
from job.storage.s3.bucket import Bucket
from job.storage.s3.checksum import algorithm_argument, upload_arguments
from job.storage.s3.client import WORKERS
from job.storage.s3.failures import describe, head, is_missing, is_upload_lost

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PART_BYTES = 16 << 20
MOST_PARTS = 10_000  # S3's limit
BLOCK_BYTES = 1 << 20
_LOST_ATTEMPTS = 3


def upload(bucket: Bucket, key: str, path: Path, *, sha256: str | None) -> None:
    """See `Store.upload`. `key` is the object's in the bucket."""
    with disk_errors(path):
        transfer = _Upload(bucket, key, path, sha256)
        if transfer.size <= PART_BYTES:
            transfer.in_one_request()
        else:
            transfer.in_parts()
    transfer.verify()


@dataclass(frozen=True, kw_only=True)
class _Part:
    number: int
    start: int
    size: int


class _Body:
    """A part of a file, as the file object that boto3 sends; one block of it is in memory at a time.

    `read` returns a whole block where urllib3 asks for 16 KiB, which would cost a third of the speed. Every block has
    its own timeout, so that a slow connection does not count as a dead one. `readinto` serves to sign the body where
    no checksum is sent.
    """

    def __init__(self, descriptor: int, part: _Part, stop: threading.Event) -> None:
        self._descriptor, self._part, self._stop, self._position = descriptor, part, stop, 0

    def __len__(self) -> int:
        return self._part.size

    def read(self, _size: int | None = None) -> bytes:
        if self._stop.is_set():
            raise Stopped
        count = min(BLOCK_BYTES, self._part.size - self._position)
        data = os.pread(self._descriptor, count, self._part.start + self._position)
        self._position += len(data)
        return data

    def readinto(self, view: memoryview) -> int:
        count = os.preadv(
            self._descriptor, [view[: self._part.size - self._position]], self._part.start + self._position
        )
        self._position += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self)}[whence]
        return self._position

    def tell(self) -> int:
        return self._position


class _Upload:
    """The upload of one file."""

    def __init__(self, bucket: Bucket, key: str, path: Path, sha256: str | None) -> None:
        self.bucket, self.key, self.path, self.sha256 = bucket, key, path, sha256
        self.uri = f"s3://{bucket.name}/{key}"
        self.size = path.stat().st_size
        self.progress = Progress(self.uri, "upload", self.size)

    def in_one_request(self) -> None:
        data = self.path.read_bytes()
        self._require_hash(hashlib.sha256(data).hexdigest() if self.sha256 else None)

        def act(client: S3Client) -> None:
            client.put_object(Bucket=self.bucket.name, Key=self.key, Body=data, **upload_arguments(client, [data]))

        self.bucket.call("PutObject", self.key, act)

    def in_parts(self) -> None:
        """Upload in parts, again if the store lost the upload: a rule aborted it, or it is complete and the reply was
        lost."""
        for attempt in range(1, _LOST_ATTEMPTS + 1):
            try:
                self._in_parts()
                return
            except ClientError as error:
                if attempt == _LOST_ATTEMPTS:
                    raise StorageError(
                        f"{self.uri} was not uploaded: the store lost the upload {_LOST_ATTEMPTS} times: "
                        f"{describe(error)}.",
                        remedy="Look for a rule of the bucket that aborts uploads (AbortIncompleteMultipartUpload).",
                    ) from error
                structlog.get_logger().warning("upload_lost", key=self.uri, error=describe(error), tries=attempt)

    def _in_parts(self) -> None:
        upload_id = self.bucket.call("CreateMultipartUpload", self.key, self._begin)
        try:
            jobs = [None, *_parts(self.size)]
            sent = each(lambda part, stop: self._send(upload_id, part, stop), jobs, workers=WORKERS)
            self._complete(upload_id, [part for part in sent if part])
        except BaseException:
            self._abort(upload_id)
            raise

    def _begin(self, client: S3Client) -> str:
        return client.create_multipart_upload(Bucket=self.bucket.name, Key=self.key, **algorithm_argument(client))[
            "UploadId"
        ]

    def _send(self, upload_id: str, part: _Part | None, stop: threading.Event) -> dict[str, Any]:
        """Send one part; None instead of a part hashes the whole file, in parallel with the sending."""
        if part is None:
            self._require_hash(sha256_of(self.path) if self.sha256 else None)
            return {}

        def act(client: S3Client) -> dict[str, Any]:
            where: Any = {"Bucket": self.bucket.name, "Key": self.key, "UploadId": upload_id}
            with self.path.open("rb", buffering=0) as file:
                body: Any = _Body(file.fileno(), part, stop)
                checks = upload_arguments(client, iter(body.read, b""))
                body.seek(0)
                reply = client.upload_part(**where, PartNumber=part.number, Body=body, **checks)
            return {"PartNumber": part.number, "ETag": reply["ETag"], **checks}

        sent = self.bucket.call("UploadPart", self.key, act, expected=is_upload_lost, stop=stop)
        self.progress.add(part.size)
        return sent

    def _complete(self, upload_id: str, parts: list[Any]) -> None:
        def act(client: S3Client) -> None:
            client.complete_multipart_upload(
                Bucket=self.bucket.name, Key=self.key, UploadId=upload_id, MultipartUpload={"Parts": parts}
            )

        self.bucket.call("CompleteMultipartUpload", self.key, act, expected=is_upload_lost)

    def _abort(self, upload_id: str) -> None:
        """Try once; parts that are not deleted cost money until the bucket's lifecycle rule deletes them."""
        try:
            client = self.bucket.connection.client()
            client.abort_multipart_upload(Bucket=self.bucket.name, Key=self.key, UploadId=upload_id)
        except Exception as error:  # noqa: BLE001 - the error that led here is the one to report
            structlog.get_logger().warning("upload_not_aborted", key=self.uri, error=describe(error))

    def verify(self) -> None:
        """The store must hold as many bytes as the file."""

        def act(client: S3Client) -> int:
            size: int = head(client, Bucket=self.bucket.name, Key=self.key)["ContentLength"]
            return size

        try:
            held: int | None = self.bucket.call("HeadObject", self.key, act, expected=is_missing)
        except ClientError:
            held = None
        if held != self.size:
            raise StorageError(
                f"{self.uri} was accepted, but the store holds {held} of {self.size} bytes.",
                remedy="Another writer replaced it, or the store lost it: check the bucket.",
            )

    def _require_hash(self, actual: str | None) -> None:
        if actual != self.sha256:
            raise DamagedError(
                f"{self.path} does not have the SHA-256 {self.sha256}.", remedy="It changed: write it again."
            )


def _parts(size: int) -> list[_Part]:
    step = PART_BYTES * -(-size // (PART_BYTES * MOST_PARTS))
    starts = range(0, size, step)
    return [_Part(number=n, start=start, size=min(step, size - start)) for n, start in enumerate(starts, 1)]
