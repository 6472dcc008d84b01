"""Failed calls by kind: an outage, a refusal, or neither. Knows exceptions only; `bucket` retries."""

from __future__ import annotations

import enum
import http.client
import ssl
from dataclasses import dataclass

import urllib3.exceptions
from botocore import exceptions as aws
from botocore.parsers import ResponseParserError

from job.runtime.credentials import shown
from job.runtime.errors import JobError

_MISSING_STATUS = 404
_TOO_MANY_REQUESTS = 429
_SERVER_ERRORS = 500

_RENEW = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "RequestTimeTooSkewed"}
_WAIT = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "TooManyRequestsException",
    "RequestLimitExceeded",
    "BandwidthLimitExceeded",
    "RequestTimeout",
    "RequestTimeoutException",
    "PriorRequestNotComplete",
    "ConditionalRequestConflict",
    "OperationAborted",
    "InternalError",
    "ServiceUnavailable",
    "IDPCommunicationError",
}
_DENIED = {
    "AccessDenied",
    "AccessDeniedException",
    "AllAccessDisabled",
    "AccountProblem",
    "AuthFailure",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidIdentityToken",
    "InvalidObjectState",
    "InvalidToken",
    "NotSignedUp",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
    "400",  # a HEAD reply has no body with a reason; an expired token looks like this
    "401",
    "403",
}
_NO_CREDENTIALS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.MetadataRetrievalError,
    aws.TokenRetrievalError,
    aws.NoAuthTokenError,
    aws.SSOError,
    aws.RefreshWithMFAUnsupportedError,
    aws.UnauthorizedSSOTokenError,
)
_BROKEN_CONNECTION = (
    aws.HTTPClientError,
    aws.ConnectionError,
    aws.IncompleteReadError,
    aws.ResponseStreamingError,
    ResponseParserError,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)


class Kind(enum.Enum):
    """How a failure is treated."""

    WAIT = "wait"
    """An outage or a limit: retried for the patience, then StorageError."""
    DENIED = "denied"
    """A refusal: retried for the denied patience, then AccessDeniedError."""
    UNTRUSTED = "untrusted"
    """A certificate that is not trusted: retried for the denied patience, then StorageError."""
    NO_BUCKET = "no_bucket"
    """The bucket does not exist: DataError at once."""
    OTHER = "other"
    """Raised at once, as StorageError where it is the store's or boto3's."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How one failed call is treated."""

    kind: Kind
    renew: bool = False
    """Whether new credentials and a new client may help."""


def classify(error: BaseException) -> Failure:
    """The kind of failure that an exception of a call stands for."""
    if isinstance(error, JobError):
        return Failure(kind=Kind.OTHER)
    if isinstance(error, aws.ClientError):
        return _classify_reply(error)
    if isinstance(error, _NO_CREDENTIALS):
        return Failure(kind=Kind.DENIED, renew=True)
    if _untrusted(error):
        return Failure(kind=Kind.UNTRUSTED)
    if isinstance(error, _BROKEN_CONNECTION):
        return Failure(kind=Kind.WAIT)
    return Failure(kind=Kind.OTHER)


def _classify_reply(error: aws.ClientError) -> Failure:
    code, status = error_code(error), status_code(error)
    if code in _RENEW:
        return Failure(kind=Kind.WAIT, renew=True)
    if code == "NoSuchBucket":
        return Failure(kind=Kind.NO_BUCKET)
    if code in _WAIT or status == _TOO_MANY_REQUESTS or (status >= _SERVER_ERRORS and code != "NotImplemented"):
        return Failure(kind=Kind.WAIT)
    if code in _DENIED or status in {401, 403}:
        return Failure(kind=Kind.DENIED, renew=True)
    return Failure(kind=Kind.OTHER)


def _untrusted(error: BaseException) -> bool:
    return isinstance(error, (aws.SSLError, ssl.SSLError)) and "CERTIFICATE_VERIFY_FAILED" in str(error)


def error_code(error: aws.ClientError) -> str:
    """The store's error code; for a reply without a body the HTTP status as text."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_code(error: aws.ClientError) -> int:
    """The HTTP status of the reply."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_missing(error: aws.ClientError) -> bool:
    """Whether the reply says that the key does not exist."""
    return error_code(error) in {"NoSuchKey", "404", "NotFound", "NoSuchVersion"} or (
        status_code(error) == _MISSING_STATUS and error_code(error) not in {"NoSuchBucket", "NoSuchUpload"}
    )


def is_precondition_failed(error: aws.ClientError) -> bool:
    """Whether the reply says that `If-Match` or `If-None-Match` did not hold, or that a range is gone."""
    return error_code(error) in {"PreconditionFailed", "412", "InvalidRange", "416"}


def is_not_implemented(error: aws.ClientError) -> bool:
    """Whether the store does not know a header of the request, such as `If-Match`."""
    return error_code(error) in {"NotImplemented", "InvalidArgument", "InvalidRequest"}


def is_upload_lost(error: aws.ClientError) -> bool:
    """Whether the store no longer knows a multipart upload: aborted by a rule, or complete and its reply was lost."""
    return error_code(error) == "NoSuchUpload"


def has_meaning(error: aws.ClientError) -> bool:
    """Whether a reply is about the object itself, so that callers handle it, rather than a failure of the store."""
    return is_missing(error) or is_precondition_failed(error) or is_upload_lost(error)


def in_words(error: BaseException) -> str:
    """A failure as one short line, without the request, which has signatures in it."""
    if isinstance(error, aws.ClientError):
        details = error.response.get("Error", {})
        return f"{details.get('Code', '')} ({details.get('Message', 'no message')})"
    return shown(f"{type(error).__name__}: {error}")[:500]
