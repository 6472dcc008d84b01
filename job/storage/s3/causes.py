"""Why a call of S3 fails, whether a retry may help, and which exit code and remedy fit: the whole table.

The first row that applies counts. A row is here for a reply or an error that was seen: from a real store, in a public
report, or in botocore's source. Each has a test against a server that behaves so (tests/storage/test_causes.py).
"""

from __future__ import annotations

import errno
import http.client
import ssl
from http import HTTPStatus

import urllib3.exceptions
from botocore import exceptions as aws
from botocore.parsers import ResponseParserError

from job.runtime.errors import ConfigError, JobError, StorageError
from job.storage.causes import NETWORK, Cause, Patience, any_of, find
from job.storage.s3.failures import Failed, ForeignReplyError
from job.storage.s3.replies import REPLIES
from job.storage.s3.setup import CONFIGURATION, CREDENTIALS

_UNREACHABLE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.EPIPE}
_BROKEN_CONNECTION = (
    aws.HTTPClientError,
    aws.ConnectionError,
    aws.IncompleteReadError,
    aws.ResponseStreamingError,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)
_REDIRECTS = {HTTPStatus.FOUND, HTTPStatus.SEE_OTHER, HTTPStatus.PERMANENT_REDIRECT}
_SHAPE = (ForeignReplyError, ResponseParserError, KeyError, TypeError, ValueError, AttributeError, RecursionError)
"""What is raised while a reply of another shape is read, by botocore and by the code that calls it."""


def _is_foreign(it: Failed) -> bool:
    """Whether the reply is none of S3's: it cannot be parsed, lacks a field, or is a page where XML should be."""
    parsed = it.reply is not None and isinstance(it.error, _SHAPE) and not it.first(*_BROKEN_CONNECTION)
    coded = it.code and not it.code.isdecimal()
    return parsed or (it.answer is not None and not coded and (it.succeeded or it.status in _REDIRECTS))


def _is_broken(it: Failed) -> bool:
    error = it.first(OSError)
    return it.first(*_BROKEN_CONNECTION) is not None or (error is not None and error.errno in _UNREACHABLE)


_FOREIGN = (
    Cause(
        when=lambda it: _is_foreign(it) and it.worked,
        kind=StorageError,
        patience=Patience.LONG,
        says="{it.what} was answered by something that is not S3, for {it.seconds:.0f} s: {it.answered}",
        remedy="Run again when the store answers. Check the proxies and load balancers before it.",
    ),
    Cause(
        when=_is_foreign,
        kind=ConfigError,
        patience=Patience.BRIEF,
        says="{it.what} was answered by something that is not S3: {it.answered}",
        remedy="Correct AWS_ENDPOINT_URL_S3: a console has another port than its store (MinIO: 9001 and 9000). Check "
        "for a "
        "proxy or a login page before it.",
    ),
)
_OTHERS = (
    Cause(
        when=any_of(aws.ParamValidationError),
        kind=ConfigError,
        patience=Patience.NONE,
        says="{it.what} is not a valid request: {it.reason}",
        remedy="Correct the address.",
    ),
    Cause(
        when=_is_broken,
        kind=StorageError,
        patience=Patience.LONG,
        says="{it.what} failed, retried for {it.seconds:.0f} s: {it.reason}",
        remedy="Run again when the store answers; TUNE_STORAGE_PATIENCE_MINUTES waits longer.",
    ),
    Cause(
        when=any_of(aws.BotoCoreError),
        kind=ConfigError,
        patience=Patience.NONE,
        says="boto3 does not send {it.what}: {it.reason}",
        remedy="Correct the AWS_* variables and the address.",
    ),
)
CAUSES: tuple[Cause, ...] = (*CONFIGURATION, *NETWORK, *CREDENTIALS, *_FOREIGN, *REPLIES, *_OTHERS)


def cause_of(it: Failed) -> Cause | None:
    """The row that applies; None for an error that is not the store's, the network's or boto3's."""
    return None if isinstance(it.error, JobError) else find(CAUSES, it)
