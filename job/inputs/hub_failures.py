"""What a failed download from the hub means: rows of the table of causes for the hub's replies and for its library.

It knows exceptions, not downloads.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import httpx
from huggingface_hub import constants, errors, get_token

from job.inputs.hub import Request, Unreachable
from job.runtime import process
from job.runtime.child import Failed, Message
from job.runtime.errors import AccessDeniedError, ConfigError, DataError, StorageError, as_job_error, known
from job.storage.causes import NETWORK, Cause, Evidence, Names, Patience, any_of, find

NAMES = Names(endpoint="HF_ENDPOINT", ca="SSL_CERT_FILE")
SHOWN_BYTES = 200
_LIMITS = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.CONFLICT}


@dataclass(frozen=True, kw_only=True)
class HubFailed(Evidence):
    """What is known of one failed download."""

    names: Names = NAMES
    request: Request

    @property
    def page(self) -> str:
        """Where a person finds the repository."""
        return f"{constants.ENDPOINT}/{'datasets/' if self.request.kind == 'dataset' else ''}{self.request.repo}"

    @property
    def reply(self) -> httpx.Response | None:
        """The hub's reply, if there was one."""
        return next((found for error in self.chain if (found := getattr(error, "response", None)) is not None), None)

    @property
    def status(self) -> int:
        """Its HTTP status; 0 without one."""
        return self.reply.status_code if self.reply is not None else 0

    @property
    def is_page(self) -> bool:
        """Whether the reply is a web page, as a proxy or a login sends it, instead of the hub's."""
        kind = self.reply.headers.get("content-type", "") if self.reply is not None else ""
        return "html" in kind and "x-error-code" not in (self.reply.headers if self.reply is not None else {})

    @property
    def token(self) -> str:
        """Which token was found, without its value."""
        token, file = get_token(), Path(constants.HF_TOKEN_PATH)
        if token is None:
            return f"No token was found: looked at HF_TOKEN and {file}"
        with contextlib.suppress(OSError):
            if file.read_text(encoding="utf-8").strip() == token:
                return f"The token in {file} was used"
        return "The token in HF_TOKEN was used"


def _may_get_better(it: HubFailed) -> bool:
    lasting = it.status == HTTPStatus.NOT_IMPLEMENTED
    return it.status in _LIMITS or (it.status >= HTTPStatus.INTERNAL_SERVER_ERROR and not lasting)


def _outage(it: HubFailed) -> bool:
    """A connection that broke, or the words of the library for one; also a file that came with another size."""
    plain = isinstance(it.error, OSError) and it.error.errno is None
    return (
        plain
        or it.first(httpx.TransportError, ConnectionError, TimeoutError, errors.LocalEntryNotFoundError) is not None
    )


CAUSES: tuple[Cause, ...] = (
    Cause(
        when=lambda it: it.first(httpx.UnsupportedProtocol, httpx.InvalidURL) is not None,
        kind=ConfigError,
        patience=Patience.NONE,
        says="The hub's address is not a URL: {it.reason}",
        remedy="Write HF_ENDPOINT as https://host, or unset it.",
    ),
    Cause(
        when=lambda it: it.first(httpx.LocalProtocolError, UnicodeEncodeError) is not None,
        kind=ConfigError,
        patience=Patience.NONE,
        says="The request for {it.what} has a header that HTTP does not allow: the token has a character that none has",
        remedy="Write HF_TOKEN again, without quotes, spaces and line breaks.",
    ),
    *NETWORK,
    Cause(
        when=any_of(errors.GatedRepoError),
        kind=AccessDeniedError,
        patience=Patience.NONE,
        says="{it.what} is gated (HTTP {it.status}). {it.token}",
        remedy="Accept its licence at {it.page} with the token's account, or set HF_TOKEN to one that has access.",
    ),
    Cause(
        when=any_of(errors.RevisionNotFoundError),
        kind=DataError,
        patience=Patience.NONE,
        says="{it.request.repo} has no revision {it.request.revision!r}",
        remedy="{it.page}/tree/main shows those it has.",
    ),
    Cause(
        when=lambda it: it.status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED,
        kind=AccessDeniedError,
        patience=Patience.NONE,
        says="{it.what}: the proxy asks for a user and a password",
        remedy="Write them into HTTPS_PROXY (http://user:password@host:port), or list the hub in NO_PROXY.",
    ),
    Cause(
        when=lambda it: it.status == HTTPStatus.FORBIDDEN and it.is_page,
        kind=AccessDeniedError,
        patience=Patience.NONE,
        says="{it.what} was denied by something that is not the hub (HTTP {it.status}, a web page)",
        remedy="Allow it in the proxy or firewall, list the hub in NO_PROXY, or give the address of a copy in S3 or "
        "on disk.",
    ),
    Cause(
        when=lambda it: (
            it.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN} or any_of(errors.DisabledRepoError)(it)
        ),
        kind=AccessDeniedError,
        patience=Patience.NONE,
        says="{it.what} was denied (HTTP {it.status}): it does not exist or is private. {it.token}",
        remedy="Correct its name, or set HF_TOKEN to one that has access.",
    ),
    Cause(
        when=any_of(errors.RepositoryNotFoundError),
        kind=DataError,
        patience=Patience.NONE,
        says="{it.what} does not exist. {it.token}",
        remedy="Correct its name.",
    ),
    Cause(
        when=any_of(errors.HFValidationError),
        kind=DataError,
        patience=Patience.NONE,
        says="{it.what} does not have a valid name: {it.reason}",
        remedy="Correct its name.",
    ),
    Cause(
        when=lambda it: any_of(errors.EntryNotFoundError)(it) and not any_of(errors.LocalEntryNotFoundError)(it),
        kind=DataError,
        patience=Patience.NONE,
        says="{it.what} lists a file that it does not have: {it.reason}",
        remedy="Name a revision that is whole (@revision), or give the address of a copy in S3 or on disk.",
    ),
    Cause(
        when=_may_get_better,
        kind=StorageError,
        patience=Patience.LONG,
        says="{it.reason}",
        remedy="Run again when the hub answers.",
    ),
    Cause(
        when=lambda it: it.status >= HTTPStatus.MULTIPLE_CHOICES,
        kind=ConfigError,
        patience=Patience.BRIEF,
        says="{it.what} was rejected: {it.reason}",
        remedy="Correct HF_ENDPOINT: it names the hub alone (https://huggingface.co), or a mirror that serves its API.",
    ),
    Cause(
        when=_outage,
        kind=StorageError,
        patience=Patience.LONG,
        says="{it.reason}",
        remedy="Run again when the hub answers.",
    ),
    Cause(
        when=any_of(ValueError, KeyError, TypeError, AttributeError),
        kind=ConfigError,
        patience=Patience.BRIEF,
        says="{it.what} was answered by something that is not a hub: {it.reason}",
        remedy="Correct HF_ENDPOINT, and look for a proxy or a login page before it.",
    ),
)


def answer(request: Request, error: Exception) -> Message:
    """What to send to the parent of a process that failed with this error."""
    it = HubFailed(error=error, what="", request=request)
    it = HubFailed(error=error, what=f"{request.repo} at {it.page}", request=request)
    if (failure := known(error)) is not None:
        return Failed.of(failure)
    cause = find(CAUSES, it)
    if cause is None:
        return Failed.of(as_job_error(error))
    failure = cause.failure(it)
    if cause.patience is Patience.NONE:
        return Failed.of(failure)
    brief = cause.patience is Patience.BRIEF
    return Unreachable(reason=it.reason, brief=brief, kind=failure.kind, message=failure.message, remedy=failure.remedy)


def check_ca() -> None:
    """Check the file with trusted CAs that the hub's library reads.

    Raises:
        ConfigError: it is not there.
    """
    path = process.variables().get(NAMES.ca)
    if path and not Path(path).is_file():
        raise ConfigError(
            f"{NAMES.ca}={path} is not a file.",
            remedy="Correct it, mount the file, or unset it: it names trusted CAs in PEM.",
        )
