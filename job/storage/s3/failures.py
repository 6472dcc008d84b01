"""A failed call of S3 as evidence: what the exception says, what was replied, whose credentials they were.

It knows how to read replies; what they mean for a run is in the table of `causes`, retries are in `bucket`.
"""

from __future__ import annotations

import configparser
import datetime
import email.utils
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol

from botocore.exceptions import ClientError

from job.runtime import process
from job.runtime.credentials import shown
from job.storage.causes import Evidence, Names, in_words

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

NAMES = Names(endpoint="AWS_ENDPOINT_URL_S3", ca="AWS_CA_BUNDLE")
SHOWN_BYTES = 200
_NOT_FOUND = {"NoSuchKey", "404", "NotFound", "NoSuchVersion"}
_WAIT = {
    *("SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "TooManyRequestsException"),
    *("RequestLimitExceeded", "BandwidthLimitExceeded", "RequestTimeout", "RequestTimeoutException"),
    *(
        "PriorRequestNotComplete",
        "ConditionalRequestConflict",
        "OperationAborted",
        "InternalError",
        "ServiceUnavailable",
    ),
    *("IDPCommunicationError", "TemporaryRedirect"),
    *("BadDigest", "IncompleteBody", "InvalidDigest", "XAmzContentSHA256Mismatch"),  # damaged on the way
}
_MAY_WAIT = {
    HTTPStatus.TEMPORARY_REDIRECT,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.CONFLICT,
    HTTPStatus.TOO_EARLY,
    HTTPStatus.TOO_MANY_REQUESTS,
}
_ACTION = re.compile(r"not authorized to perform: ([\w:*-]+)")
_PERMISSIONS = {
    "GetObject": "s3:GetObject (and s3:GetObjectVersion where the bucket keeps versions,"
    " kms:Decrypt where it encrypts with a KMS key)",
    "HeadObject": "s3:GetObject and s3:ListBucket (without the second a missing object looks like a denied one)",
    "ListObjectsV2": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
    "CopyObject": "s3:GetObject, s3:GetObjectTagging and s3:PutObject",
}
_WRITE_PERMISSION = "s3:PutObject (and kms:GenerateDataKey where the bucket encrypts with a KMS key)"


class ConfigurationError(Exception):
    """boto3 does not make a client: the reason is its `__cause__`."""


class CredentialsError(Exception):
    """There are no credentials; the reason, if there is any, is its `__cause__`."""


class ForeignReplyError(Exception):
    """What answered does not speak S3."""


class Connection(Protocol):
    """What is asked of a connection (`job.storage.s3.client`)."""

    @property
    def checksums(self) -> bool:
        """Whether uploads carry checksums in headers."""
        ...

    def credentials(self) -> str:
        """Where the credentials came from."""
        ...


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The last reply to a thread's requests, as far as it was read."""

    status: int
    headers: dict[str, str]
    """By name in lower case."""
    start: str
    """Of the body, on one line; empty where the body is a stream."""


@dataclass(frozen=True, kw_only=True)
class Failed(Evidence):
    """What is known of one failed call of S3."""

    names: Names = NAMES
    operation: str
    bucket: str
    key: str
    endpoint: str
    connection: Connection
    reply: Reply | None
    seconds: float
    """How long it was retried."""

    @functools.cached_property
    def source(self) -> str:
        """Where the credentials came from; never their value."""
        return self.connection.credentials()

    @property
    def checksums(self) -> bool:
        """Whether uploads carry checksums in headers."""
        return self.connection.checksums

    @property
    def answer(self) -> ClientError | None:
        """The store's answer, or that of the service for credentials."""
        return self.first(ClientError)

    @property
    def code(self) -> str:
        """The error code of the reply; empty without one."""
        return error_code(self.answer) if self.answer else ""

    @property
    def status(self) -> int:
        """The HTTP status of the reply; 0 without one."""
        if self.answer:
            return self.reply.status if self.reply else status_code(self.answer)
        return self.reply.status if self.reply else 0

    @property
    def message(self) -> str:
        """What the reply says besides its code, without names of ours in it; the body's start where it has no code."""
        details = self.answer.response.get("Error", {}) if self.answer else {}
        parts = [str(details.get(name, "")) for name in ("Message", "Header", "ArgumentName", "Region", "Endpoint")]
        if self.reply and (not self.code or self.code.isdecimal()):
            parts.append(self.reply.start)
        said = re.sub(r"\barn:\S+", "", " ".join(parts))
        for name in filter(None, (self.key, self.bucket)):
            said = said.replace(name, "")
        return said

    @property
    def reason(self) -> str:
        """See `Evidence.reason`."""
        if not isinstance(self.error, ConfigurationError | CredentialsError):
            return describe(self.error)
        said = in_words(self.error.__cause__ or self.error)
        parsing = self.first(configparser.Error)  # quotes the line, which may hold a key
        if parsing is None:
            return said
        several = getattr(parsing, "errors", None)
        line = several[0][0] if several else getattr(parsing, "lineno", None)
        return f"{said} ({type(parsing).__name__}, line {line})"

    @property
    def succeeded(self) -> bool:
        """Whether the reply's own status is one of success, whatever botocore made of it."""
        return self.reply is not None and HTTPStatus.OK <= self.reply.status < HTTPStatus.MULTIPLE_CHOICES

    @property
    def is_page(self) -> bool:
        """Whether the reply is a web page."""
        return self.reply is not None and "html" in self.reply.headers.get("content-type", "")

    @property
    def permission(self) -> str:
        """The permission that is missing, as the reply names it, else as the operation needs it."""
        found = _ACTION.search(self.message)
        return found[1] if found else _PERMISSIONS.get(self.operation, _WRITE_PERMISSION)

    @property
    def region(self) -> str:
        """The region that the reply says the bucket is in; empty if it does not."""
        found = re.search(r"expecting '([\w-]+)'", self.message) or re.search(r"s3[.-]([a-z]+-[\w-]+)\.", self.message)
        named = self.reply.headers.get("x-amz-bucket-region", "") if self.reply else ""
        return named or (found[1] if found else "")

    @property
    def skew(self) -> str:
        """How far this machine's clock is from the store's, in words."""
        try:
            theirs = email.utils.parsedate_to_datetime(self.reply.headers["date"]) if self.reply else None
        except (KeyError, ValueError):
            theirs = None
        now = datetime.datetime.now(datetime.UTC)
        if theirs is None:
            return f"this machine's clock says {now.isoformat(timespec='seconds')}, and the store disagrees"
        seconds = round((now - theirs.replace(tzinfo=theirs.tzinfo or datetime.UTC)).total_seconds())
        apart = datetime.timedelta(seconds=abs(seconds))
        return f"this machine's clock is {apart} {'ahead of' if seconds > 0 else 'behind'} the store's"

    @property
    def variable(self) -> str:
        """The variable that names the file which cannot be read."""
        named = process.variables().items()
        names = [name for name, value in named if name.startswith("AWS_") and value and value == self.file]
        return names[0] if names else "the AWS configuration"

    @property
    def answered(self) -> str:
        """What answered, in words."""
        if self.reply is None:
            return self.reason
        kind = self.reply.headers.get("content-type", "no content type")
        server = self.reply.headers.get("server", "")
        said = f", beginning with {shown(self.reply.start)[:SHOWN_BYTES]!r}" if self.reply.start else ", empty"
        return f"HTTP {self.reply.status}, {kind}{f' from {server!r}' if server else ''}{said}"


When = Callable[[Failed], bool]


def may_get_better(it: Failed) -> bool:
    """Whether a reply is about an outage, a limit, or damage on the way."""
    lacks = it.code in {"NotImplemented", "501"} or it.status == HTTPStatus.NOT_IMPLEMENTED
    return it.code in _WAIT or it.status in _MAY_WAIT or (it.status >= HTTPStatus.INTERNAL_SERVER_ERROR and not lacks)


def error_code(error: ClientError) -> str:
    """The store's error code; for a reply without a body the HTTP status as text."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_code(error: ClientError) -> int:
    """The HTTP status of the reply."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_missing(error: ClientError) -> bool:
    """Whether the reply says that the key does not exist; for a version, that it is a delete marker."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    marker = status_code(error) == HTTPStatus.METHOD_NOT_ALLOWED and headers.get("x-amz-delete-marker") == "true"
    absent = status_code(error) == HTTPStatus.NOT_FOUND and error_code(error) not in {"NoSuchBucket", "NoSuchUpload"}
    return error_code(error) in _NOT_FOUND or absent or marker


def is_precondition_failed(error: ClientError) -> bool:
    """Whether the reply says that `If-Match` or `If-None-Match` did not hold."""
    return error_code(error) in {"PreconditionFailed", "412"}


def is_range_gone(error: ClientError) -> bool:
    """Whether the reply says that the object is shorter than the range that was asked for."""
    return error_code(error) in {"InvalidRange", "416"}


def is_unknown_condition(error: ClientError) -> bool:
    """Whether a conditional write was refused for the condition itself: 501, or 400 with a code that a store uses for
    headers which it does not know (Alibaba OSS: 400 NotImplemented)."""
    codes = {"NotImplemented", "501", "InvalidArgument", "InvalidRequest"}
    return error_code(error) in codes and not is_precondition_failed(error)


def is_upload_lost(error: ClientError) -> bool:
    """Whether the store no longer knows a multipart upload: aborted by a rule, or complete and its reply was lost."""
    return error_code(error) == "NoSuchUpload"


def nothing(_: ClientError) -> bool:
    """No reply is expected but success."""
    return False


def describe(error: BaseException) -> str:
    """A failure as one short line, without the request, which has signatures in it."""
    if isinstance(error, ClientError):
        details = error.response.get("Error", {})
        code = details.get("Code") or f"HTTP {status_code(error)}"
        return shown(f"{code} ({details.get('Message') or 'no message'})")
    return in_words(error)


def head(client: S3Client, **where: Any) -> Any:
    """The reply of HeadObject. A refusal has no body: what the reason is, a GET of one byte says.

    Raises:
        ClientError: of the GET where it has a reason, else of the HEAD.
    """
    try:
        return client.head_object(**where)
    except ClientError as error:
        if is_missing(error) or is_precondition_failed(error) or status_code(error) >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise
        try:
            client.get_object(**{**where, "Range": "bytes=0-0"})["Body"].close()
        except ClientError as reason:
            if error_code(reason) and not error_code(reason).isdecimal() and not is_range_gone(reason):
                raise reason from None
        raise
