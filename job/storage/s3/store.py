"""The store in a bucket: the small operations. Large transfers are in `upload` and `download`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError, FlexibleChecksumError

from job.runtime.errors import DataError, JobError
from job.storage.base import Entry
from job.storage.faults import DamagedError, MissingError
from job.storage.s3.bucket import Bucket
from job.storage.s3.checksum import algorithm_argument, upload_arguments
from job.storage.s3.client import Connection
from job.storage.s3.download import again_if_damaged, download
from job.storage.s3.failures import (
    ForeignReplyError,
    error_code,
    head,
    is_missing,
    is_precondition_failed,
    is_range_gone,
    is_unknown_condition,
    is_upload_lost,
    status_code,
)
from job.storage.s3.upload import upload
from job.storage.uri import S3Address, checked_key

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_LISTING = {"Name", "IsTruncated", "KeyCount", "MaxKeys", "Contents", "CommonPrefixes"}
"""What a listing has at least one of, also of an empty bucket."""
_COPIED_IN_ONE_REQUEST = 5 << 30  # bytes; S3's limit for CopyObject


class S3Store:
    """Objects of a bucket under one prefix."""

    def __init__(
        self,
        address: S3Address,
        *,
        patience_seconds: float,
        denied_patience_seconds: float,
        reply_seconds: float,
    ) -> None:
        self.uri = address.uri
        prefix = address.key.strip("/")
        self._root = f"{prefix}/" if prefix else ""
        self._bucket = Bucket(
            address.bucket,
            Connection(reply_seconds=reply_seconds),
            patience_seconds=patience_seconds,
            denied_patience_seconds=denied_patience_seconds,
        )

    def list_objects(self, prefix: str = "") -> list[Entry]:
        """See `Store.list_objects`, without the empty objects that consoles create for folders (`/` at the end)."""
        found = [self._listed(item) for item in self._pages(self._root + prefix) if not _is_folder(item)]
        return sorted(found, key=lambda entry: entry.key)

    def _pages(self, prefix: str) -> Iterator[Any]:
        token: dict[str, str] = {}
        while True:
            page = self._page(prefix, token)
            yield from page.get("Contents", [])
            if not page.get("NextContinuationToken"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, prefix: str, extra: dict[str, str]) -> Any:
        def act(client: S3Client) -> Any:
            page: Any = client.list_objects_v2(Bucket=self._bucket.name, Prefix=prefix, **extra)  # type: ignore[arg-type]
            if not _LISTING & page.keys():  # nothing, or a page of HTML, would count as an empty bucket
                raise ForeignReplyError("the reply is no listing")
            for item in page.get("Contents", ()):
                item["Key"], item["Size"]
            return page

        return self._bucket.call("ListObjectsV2", prefix, act)

    def _listed(self, item: Any) -> Entry:
        try:
            key = checked_key(item["Key"].removeprefix(self._root))
        except DataError as error:
            raise DataError(f"s3://{self._bucket.name}/{item['Key']}: {error.message}", remedy=error.remedy) from None
        return Entry(key=key, size=item["Size"], etag=_etag(item), version=None)

    def names(self, prefix: str) -> list[str]:
        """See `Store.names`."""
        page = self._page(self._root + prefix, {"Delimiter": "/"})
        keys = [item["Key"] for item in page.get("Contents", [])]
        folders = [item["Prefix"] for item in page.get("CommonPrefixes", [])]
        return sorted(name.removeprefix(self._root) for name in keys + folders)

    def head(self, key: str) -> Entry | None:
        """See `Store.head`."""
        name = self._key(key)

        def act(client: S3Client) -> Entry:
            reply = head(client, Bucket=self._bucket.name, Key=name)
            version = reply.get("VersionId", "null")  # "null": written before versioning was enabled
            return Entry(
                key=key,
                size=reply["ContentLength"],
                etag=_etag(reply),
                version=None if version == "null" else version,
            )

        with _absent():
            return self._bucket.call("HeadObject", name, act, expected=is_missing)
        return None

    def read(self, key: str) -> bytes | None:
        """See `Store.read`."""
        name = self._key(key)

        def act(client: S3Client) -> bytes:
            return self._body(client.get_object(Bucket=self._bucket.name, Key=name), name)

        with _absent():
            return again_if_damaged(lambda: self._bucket.call("GetObject", name, act, expected=is_missing))
        return None

    def _body(self, reply: Any, name: str) -> bytes:
        try:
            body: bytes = reply["Body"].read()
        except FlexibleChecksumError as error:
            raise DamagedError(
                f"s3://{self._bucket.name}/{name} is damaged: {error}.", remedy="Write it again."
            ) from error
        return body

    def read_start(self, key: str, size: int) -> bytes | None:
        """See `Store.read_start`."""
        name = self._key(key)

        def act(client: S3Client) -> bytes:
            reply = client.get_object(Bucket=self._bucket.name, Key=name, Range=f"bytes=0-{size - 1}")
            with contextlib.closing(reply["Body"]) as body:
                # Not to the end: some stores send the whole object's checksum, which boto3 would then compare.
                return body.read(min(size, reply["ContentLength"]))

        try:
            return self._bucket.call(
                "GetObject", name, act, expected=lambda error: is_missing(error) or is_range_gone(error)
            )
        except ClientError as error:
            return b"" if is_range_gone(error) else None  # an empty object has no range

    def write(self, key: str, data: bytes) -> None:
        """See `Store.write`."""
        name = self._key(key)

        def act(client: S3Client) -> None:
            client.put_object(Bucket=self._bucket.name, Key=name, Body=data, **upload_arguments(client, [data]))

        self._bucket.call("PutObject", name, act)

    def create(self, key: str, data: bytes) -> bool:
        """See `Store.create`. Atomic where the store honours `If-None-Match: *`; one that does not know it behaves like
        one that ignores it: the object is replaced."""
        try:
            return self._put_if(key, data, IfNoneMatch="*")
        except ClientError:
            self.write(key, data)
            return True

    def replace(self, key: str, data: bytes, *, expected: bytes) -> bool:
        """See `Store.replace`."""
        name = self._key(key)

        def act(client: S3Client) -> tuple[bytes, str]:
            reply = client.get_object(Bucket=self._bucket.name, Key=name)
            return self._body(reply, name), reply.get("ETag", "")

        with _absent():
            found, etag = self._bucket.call("GetObject", name, act, expected=is_missing)
            if found != expected:
                return False
            with contextlib.suppress(ClientError):  # the store knows `If-None-Match` at most
                if etag:  # else there is nothing that a condition could name
                    return self._put_if(key, data, IfMatch=etag)
            self.write(key, data)
            return True
        return False

    def _put_if(self, key: str, data: bytes, **condition: str) -> bool:
        """Write under a condition. When a reply was lost, "the condition is not met" may mean an earlier try of this
        call: then the content decides.

        Raises:
            ClientError: the store does not know the condition, and has written nothing.
        """
        name = self._key(key)
        lost = False

        def act(client: S3Client) -> None:
            nonlocal lost
            try:
                extra = upload_arguments(client, [data])
                client.put_object(Bucket=self._bucket.name, Key=name, Body=data, **condition, **extra)  # type: ignore[arg-type]
            except Exception as error:
                lost = lost or _may_have_succeeded(error)
                raise

        def expected(error: ClientError) -> bool:
            return is_precondition_failed(error) or is_missing(error) or is_unknown_condition(error)

        try:
            self._bucket.call("PutObject", name, act, expected=expected)
        except ClientError as error:
            if is_unknown_condition(error):
                raise
            return lost and self.read(key) == data
        return True

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        """See `Store.upload`."""
        upload(self._bucket, self._key(key), path, sha256=sha256)

    def download(self, entry: Entry, path: Path) -> None:
        """See `Store.download`."""
        download(self._bucket, self._key(entry.key), entry, path)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        name = self._key(key)
        with _absent():
            self._bucket.call(
                "DeleteObject",
                name,
                lambda client: client.delete_object(Bucket=self._bucket.name, Key=name),
                expected=is_missing,
            )

    def copy(self, key: str, target: str) -> None:
        """See `Store.copy`. The server copies, in parts where the object is too large for one request."""
        source: Any = {"Bucket": self._bucket.name, "Key": self._key(key)}
        name = self._key(target)
        entry = self.head(key)

        def act(client: S3Client) -> None:
            if entry and entry.size > _COPIED_IN_ONE_REQUEST:
                client.copy(source, self._bucket.name, name)  # needs an ETag, which not every store gives
            else:
                client.copy_object(CopySource=source, Bucket=self._bucket.name, Key=name, **algorithm_argument(client))

        try:
            self._bucket.call("CopyObject", name, act, expected=is_missing)
        except ClientError:
            raise MissingError(f"{self.uri}/{key} does not exist any more.", remedy="Restore it.") from None

    def remove_unfinished(self, prefix: str) -> int:
        """See `Store.remove_unfinished`."""
        found = self._unfinished(self._root + prefix)
        for name, upload_id in found:

            def act(client: S3Client, name: str = name, upload_id: str = upload_id) -> None:
                client.abort_multipart_upload(Bucket=self._bucket.name, Key=name, UploadId=upload_id)

            with contextlib.suppress(ClientError):  # somebody else has removed it
                self._bucket.call("AbortMultipartUpload", name, act, expected=_is_gone)
        return len(found)

    def _unfinished(self, prefix: str) -> list[tuple[str, str]]:
        """Key and upload id of every unfinished multipart upload under a prefix."""

        def act(client: S3Client) -> list[tuple[str, str]]:
            pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket.name, Prefix=prefix)
            return [(item["Key"], item["UploadId"]) for page in pages for item in page.get("Uploads", [])]

        try:
            return self._bucket.call("ListMultipartUploads", prefix, act, expected=_is_gone)
        except ClientError:  # some stores answer "no such upload" where there are none
            return []

    def _key(self, key: str) -> str:
        return self._root + checked_key(key)


@contextlib.contextmanager
def _absent() -> Iterator[None]:
    """Leave the block when the key does not exist."""
    try:
        yield
    except ClientError as error:
        if not is_missing(error):
            raise


def _is_gone(error: ClientError) -> bool:
    return is_missing(error) or is_upload_lost(error)


def _may_have_succeeded(error: Exception) -> bool:
    """A request whose connection broke, or that got a server error, may have been executed; not so one that was
    refused or limited."""
    if isinstance(error, ClientError):
        refused = (
            status_code(error) < HTTPStatus.INTERNAL_SERVER_ERROR and status_code(error) != HTTPStatus.REQUEST_TIMEOUT
        )
        return not refused and error_code(error) not in {"SlowDown", "NotImplemented", "501"}
    return not isinstance(error, JobError)


def _is_folder(item: Any) -> bool:
    return bool(item["Key"].endswith("/") and item["Size"] == 0)


def _etag(item: Any) -> str | None:
    etag: str = item.get("ETag", "")
    return etag.strip('"') or None
