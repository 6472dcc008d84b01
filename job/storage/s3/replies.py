"""What the replies of a store mean: rows of the table of causes, for what S3 and its relatives answer."""

from __future__ import annotations

import re
from http import HTTPStatus

from job.runtime.errors import AccessDeniedError, ConfigError, DataError, StorageError
from job.storage.causes import Cause, Patience
from job.storage.s3.failures import Failed, When, may_get_better

_WRITES = {"PutObject", "UploadPart", "CreateMultipartUpload", "CompleteMultipartUpload", "CopyObject"}
_CHECKSUMS = re.compile(
    r"x-amz-(sdk-)?checksum|x-amz-trailer|checksum algorithm|aws-chunked|unsigned-payload|x-amz-content-sha256",
    re.IGNORECASE,
)
_QUOTA = re.compile(r"quota|\bcap exceeded|insufficient storage|storage (is )?full|disk full", re.IGNORECASE)
_DENIED = {"AccessDenied", "AccessDeniedException", "Forbidden", "InvalidIdentityToken"}
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")


def _codes(*codes: str) -> When:
    return lambda it: it.code in codes


def _message(pattern: str) -> When:
    """Whether a reply of 300 to 499 says this besides its code."""
    compiled = re.compile(pattern, re.IGNORECASE)
    return lambda it: _refused(it) and compiled.search(it.message) is not None


def _refused(it: Failed) -> bool:
    return it.answer is not None and HTTPStatus.MULTIPLE_CHOICES <= it.status < HTTPStatus.INTERNAL_SERVER_ERROR


def _of_checksums(it: Failed) -> bool:
    """A write that is refused for its checksum header, by name; or by a signature, where others were accepted
    (boto3#4398: the store signs the body although the header says that it is not signed)."""
    if not (it.checksums and it.operation in _WRITES and it.answer):
        return False
    if it.code == "XAmzContentSHA256Mismatch":  # with checksums no hash is sent in that header: a store that needs one
        return True
    named = _CHECKSUMS.search(it.message) is not None and it.code != "BadDigest"
    return named or (it.worked and it.code == "SignatureDoesNotMatch")


def _is_elsewhere(it: Failed) -> bool:
    """The bucket is in another region."""
    moved = it.status in {HTTPStatus.MOVED_PERMANENTLY, HTTPStatus.BAD_REQUEST}
    named = it.reply is not None and "x-amz-bucket-region" in it.reply.headers
    codes = {"PermanentRedirect", "IllegalLocationConstraintException", "AuthorizationHeaderMalformed", "301"}
    return it.code in codes or (moved and named and it.answer is not None)


def _is_quota(it: Failed) -> bool:
    if it.answer is None or may_get_better(it):  # a limit of requests is no quota
        return it.status == HTTPStatus.INSUFFICIENT_STORAGE
    return _QUOTA.search(f"{it.code} {it.message}") is not None


def _is_denied(it: Failed) -> bool:
    """Also a HEAD with 400, if a GET gives no reason either: an expired token looks like this."""
    head = it.operation == "HeadObject" and it.status == HTTPStatus.BAD_REQUEST and it.code == "400"
    denied = it.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
    return it.answer is not None and (it.code in _DENIED or head or denied)


REPLIES: tuple[Cause, ...] = (
    Cause(
        when=_codes("NoSuchBucket"),
        kind=DataError,
        patience=Patience.NONE,
        says="The bucket {it.bucket!r} does not exist at {it.endpoint}",
        remedy="Correct its name, or the endpoint in AWS_ENDPOINT_URL_S3.",
    ),
    Cause(
        when=lambda it: (
            _codes("RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture")(it)
            or _message("signature (expired|not yet current)")(it)
        ),
        kind=StorageError,
        patience=Patience.BRIEF,
        says="{it.what} was denied for its time: {it.skew}",
        remedy="Correct the clock of this machine (NTP) or of the store.",
    ),
    Cause(
        when=lambda it: it.code in _EXPIRED and "`env`" in it.source,
        kind=AccessDeniedError,
        patience=Patience.BRIEF,
        says="{it.what} was denied: the token in AWS_SESSION_TOKEN has expired",
        remedy="Set new keys with a new token. For runs that last longer than a token, use keys without one or a "
        "workload "
        "identity.",
    ),
    Cause(
        when=_codes(*_EXPIRED),
        kind=AccessDeniedError,
        patience=Patience.LONG,
        renew=True,
        says="{it.what} was denied for {it.seconds:.0f} s: the session token from {it.source} has expired",
        remedy="Renew what gives the credentials: it was asked again before each try.",
    ),
    Cause(
        when=_is_elsewhere,
        kind=ConfigError,
        patience=Patience.NONE,
        says="{it.what}: the bucket is in another region: {it.reason}",
        remedy="Set AWS_DEFAULT_REGION={it.region}, and an endpoint of that region if AWS_ENDPOINT_URL_S3 is set.",
    ),
    Cause(
        when=_codes("SecondLevelDomainForbidden", "InvalidPathAccess", "VirtualHostDomainRequired"),
        kind=ConfigError,
        patience=Patience.NONE,
        says="{it.what}: the store wants the bucket's name before its own (virtual-hosted style): {it.reason}",
        remedy="Set addressing_style = virtual below s3 = in the file that AWS_CONFIG_FILE names.",
    ),
    Cause(
        when=_codes("InvalidObjectState"),
        kind=DataError,
        patience=Patience.NONE,
        says="s3://{it.bucket}/{it.key} is archived, and has to be restored before it can be read",
        remedy="Restore it (aws s3api restore-object), which takes minutes to days, or copy it to another storage "
        "class.",
    ),
    Cause(
        when=_message("using a form of server.side encryption"),
        kind=DataError,
        patience=Patience.NONE,
        says="s3://{it.bucket}/{it.key} is encrypted with a customer's key (SSE-C), which the job cannot send",
        remedy="Copy it with the encryption of the bucket, or with SSE-KMS.",
    ),
    Cause(
        when=lambda it: it.code.startswith("KMS"),
        kind=AccessDeniedError,
        patience=Patience.BRIEF,
        says="{it.what}: the KMS key of the bucket or object cannot be used: {it.reason}",
        remedy="Enable the key, or restore it if it is to be deleted; it must be in the region of the bucket.",
    ),
    Cause(
        when=lambda it: _message("content-md5")(it) and not may_get_better(it),
        # Buckets with object lock ask for it, so this row is before theirs.
        kind=ConfigError,
        patience=Patience.NONE,
        says="{it.what}: the bucket accepts only uploads with a checksum: {it.reason}",
        remedy="Unset AWS_REQUEST_CHECKSUM_CALCULATION (or request_checksum_calculation in the AWS configuration).",
    ),
    Cause(
        when=_message("object lock|retention|worm|immutable"),
        kind=AccessDeniedError,
        patience=Patience.NONE,
        says="s3://{it.bucket}/{it.key} is locked by the store: {it.reason}",
        remedy="Use an output without object lock or retention: a run replaces latest.json and deletes old "
        "checkpoints.",
    ),
    Cause(
        when=_of_checksums,
        kind=ConfigError,
        patience=Patience.NONE,
        says="{it.what}: the store does not accept uploads with checksums: {it.reason}",
        remedy="Set AWS_REQUEST_CHECKSUM_CALCULATION=when_required.",
    ),
    Cause(
        when=_is_quota,
        kind=StorageError,
        patience=Patience.BRIEF,
        says="{it.what}: the store has no room, or its quota is used up: {it.reason}",
        remedy="Raise the quota or delete objects, then start the run again: it resumes.",
    ),
    Cause(
        when=lambda it: it.code == "EntityTooLarge" or it.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        kind=ConfigError,
        patience=Patience.NONE,
        says="{it.what} is too large for the store, or for a proxy before it: {it.answered}",
        remedy="Allow requests of 16 MiB and more there (nginx: client_max_body_size).",
    ),
    Cause(
        when=_message("http request .{0,20}to (an )?https"),
        kind=ConfigError,
        patience=Patience.NONE,
        says="{it.what}: the server speaks only TLS on this port",
        remedy="Write AWS_ENDPOINT_URL_S3 with https://.",
    ),
    Cause(
        when=lambda it: it.status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED,
        kind=AccessDeniedError,
        patience=Patience.BRIEF,
        says="{it.what}: the proxy asks for a user and a password",
        remedy="Write them into HTTP_PROXY (http://user:password@host:port), or list the host in NO_PROXY.",
    ),
    Cause(
        when=_codes("InvalidAccessKeyId", "InvalidClientTokenId", "UnrecognizedClientException", "InvalidToken"),
        kind=AccessDeniedError,
        patience=Patience.BRIEF,
        renew=True,
        says="{it.what} was denied for {it.seconds:.0f} s: {it.endpoint} does not know the credentials: {it.reason}. "
        "Credentials tried: {it.source}",
        remedy="Use keys of this very store (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY; AWS_SESSION_TOKEN only with "
        "the keys "
        "that it belongs to), or correct AWS_ENDPOINT_URL_S3.",
    ),
    Cause(
        when=_codes("SignatureDoesNotMatch", "AuthFailure"),
        kind=AccessDeniedError,
        patience=Patience.BRIEF,
        renew=True,
        says="{it.what} was denied for {it.seconds:.0f} s: the signature is wrong: {it.reason}. "
        "Credentials tried: {it.source}",
        remedy="Correct AWS_SECRET_ACCESS_KEY and AWS_DEFAULT_REGION; a proxy before the store must not change the "
        "host "
        "or the path.",
    ),
    Cause(
        when=_codes("AllAccessDisabled", "AccountProblem", "NotSignedUp", "UserDisable", "UserSuspended"),
        kind=AccessDeniedError,
        patience=Patience.NONE,
        says="{it.what} was denied: the account is not active: {it.reason}",
        remedy="Look at the account's bills and messages.",
    ),
    Cause(
        when=_message("explicit deny"),
        kind=AccessDeniedError,
        patience=Patience.BRIEF,
        renew=True,
        says="{it.what} was denied for {it.seconds:.0f} s: a policy forbids it: {it.reason}. Credentials tried: "
        "{it.source}",
        remedy="Remove the deny of {it.permission} from the policy that the message names, or use another identity.",
    ),
    Cause(
        when=lambda it: _is_denied(it) and it.is_page,
        kind=AccessDeniedError,
        patience=Patience.BRIEF,
        says="{it.what} was denied for {it.seconds:.0f} s by something that is not S3: {it.answered}",
        remedy="Allow it in the proxy, gateway or firewall that answered, or list the host in NO_PROXY.",
    ),
    Cause(
        when=_is_denied,
        kind=AccessDeniedError,
        patience=Patience.BRIEF,
        renew=True,
        says="{it.what} was denied for {it.seconds:.0f} s: {it.reason}. Credentials tried: {it.source}",
        remedy="Give this identity {it.permission}, or other credentials.",
    ),
    Cause(
        when=lambda it: it.answer is not None and may_get_better(it),
        kind=StorageError,
        patience=Patience.LONG,
        says="{it.what} failed, retried for {it.seconds:.0f} s: {it.reason}",
        remedy="Run again when the store answers; TUNE_STORAGE_PATIENCE_MINUTES waits longer.",
    ),
    Cause(
        when=lambda it: it.answer is not None and it.status == HTTPStatus.NOT_FOUND,
        kind=ConfigError,
        patience=Patience.BRIEF,
        says="{it.what}: there is no such place at {it.endpoint}: {it.answered}",
        remedy="Correct AWS_ENDPOINT_URL_S3: it names the store alone, without a bucket or another path.",
    ),
    Cause(
        when=lambda it: it.answer is not None,
        kind=ConfigError,
        patience=Patience.BRIEF,
        says="{it.what} was rejected: {it.reason}; {it.answered}",
        remedy="Look the code up in the store's documentation: the store does not accept what the job asks of it.",
    ),
)
