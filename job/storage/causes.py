"""Why a request failed, by what is known of it: a table of causes with exit code and remedy, and those of the network.

A row is found by evidence: the exceptions that led to each other, the reply, and whether this address has answered
properly before. `job.storage.s3.causes` has the rows of S3; those here hold for the hub too.
"""

from __future__ import annotations

import datetime
import enum
import functools
import re
import socket
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from job.runtime.credentials import shown
from job.runtime.errors import AccessDeniedError, ConfigError, JobError, StorageError, words

E = TypeVar("E", bound=BaseException)
LONGEST_REASON = 500
_HEADER = re.compile(r"((?:Invalid|Illegal) header value).*")
"""How http.client and h11 quote a header, which may hold a key and a signature."""


class Patience(enum.Enum):
    """How long a failure of one cause is retried."""

    NONE = "none"
    """It cannot get better."""
    BRIEF = "brief"
    """It may be a machine that is just starting: identity, mounts, names, clocks."""
    LONG = "long"
    """An outage or a limit."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """The variables that a user would change."""

    endpoint: str
    ca: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of one failed request."""

    error: BaseException
    what: str
    """The request in words: what was done to which object, where."""
    names: Names
    worked: bool = False
    """Whether the address has answered properly before: then what looks like a mistake is an outage."""

    @functools.cached_property
    def chain(self) -> tuple[BaseException, ...]:
        """The error, and those that led to it: libraries wrap them."""
        found: list[BaseException] = []
        ahead: list[object] = [self.error]
        while ahead:
            error = ahead.pop(0)
            if isinstance(error, BaseException) and error not in found:
                found.append(error)
                kept = getattr(error, "kwargs", None)  # where botocore keeps it
                ahead += [error.__cause__ or error.__context__, getattr(error, "reason", None), *error.args]
                ahead.append(kept.get("error") if isinstance(kept, dict) else None)
        return tuple(found)

    def first(self, *kinds: type[E]) -> E | None:
        """The first error of these kinds."""
        return next((error for error in self.chain if isinstance(error, kinds)), None)

    def says(self, *parts: str) -> bool:
        """Whether an error's words contain one of these."""
        return any(part in words(error) for error in self.chain for part in parts)

    @property
    def reason(self) -> str:
        """The error in one short line, without what was sent, which has credentials in it."""
        return in_words(self.error)

    @property
    def certificate(self) -> int | None:
        """OpenSSL's number for what is wrong with the server's certificate (x509_vfy.h); None if nothing is."""
        error = self.first(ssl.SSLCertVerificationError)
        return None if error is None else error.verify_code

    @property
    def certificate_says(self) -> str:
        """The same in OpenSSL's words."""
        error = self.first(ssl.SSLCertVerificationError)
        return words(self.chain[-1]) if error is None else error.verify_message

    @property
    def file(self) -> str:
        """The file that could not be read."""
        error = self.first(OSError)
        return "" if error is None or error.filename is None else str(error.filename)

    @property
    def clock(self) -> str:
        """This machine's time."""
        return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One row: when it applies, and what it means. `says` and `remedy` may name fields of the evidence (`it`)."""

    when: Callable[..., bool]
    kind: type[JobError]
    patience: Patience
    says: str
    remedy: str
    renew: bool = False
    """Whether new credentials and a new client may help."""

    def failure(self, it: Evidence) -> JobError:
        """The error to report."""
        return self.kind(f"{self.says.format(it=it)}.", remedy=self.remedy.format(it=it))


def find(table: Iterable[Cause], it: Evidence) -> Cause | None:
    """The first row that applies."""
    return next((cause for cause in table if cause.when(it)), None)


def in_words(error: BaseException) -> str:
    """An error in one short line; what was sent is cut off."""
    text = " ".join(f"{type(error).__name__}: {words(error)}".split())
    return shown(_HEADER.sub(r"\1 (not shown)", text))[:LONGEST_REASON]


def any_of(*kinds: type[BaseException]) -> Callable[[Evidence], bool]:
    """Whether an error of these kinds is among those that led to each other."""
    return lambda it: it.first(*kinds) is not None


def _untrusted(*numbers: int) -> Callable[[Evidence], bool]:
    return lambda it: it.certificate in numbers


def _tls(*reasons: str) -> Callable[[Evidence], bool]:
    def applies(it: Evidence) -> bool:
        error = it.first(ssl.SSLError)
        return error is not None and any(reason in str(error) for reason in reasons)

    return applies


def _no_such_host(it: Evidence) -> bool:
    error = it.first(socket.gaierror)
    return error is not None and error.errno in {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}


def _no_ca_file(it: Evidence) -> bool:
    if _tls("NO_CERTIFICATE_OR_CRL_FOUND", "NO_START_LINE", "PEM lib", "BAD_BASE64_DECODE")(it):
        return True
    return any("SSLError" in type(error).__name__ for error in it.chain) and bool(
        it.first(FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
    )


def _proxy_says(*statuses: str) -> Callable[[Evidence], bool]:
    """Whether a proxy answered with a status that begins so: urllib3's words, or httpx's."""

    def applies(it: Evidence) -> bool:
        plain = [words(error) for error in it.chain if type(error).__name__ == "ProxyError"]
        told = it.says(*(f"Tunnel connection failed: {status}" for status in statuses))
        return told or any(text.startswith(statuses) for text in plain)

    return applies


NETWORK: tuple[Cause, ...] = (
    Cause(
        when=_no_ca_file,
        kind=ConfigError,
        patience=Patience.NONE,
        says="The file with the trusted CAs cannot be read: {it.reason}",
        remedy="{it.names.ca} must name a file with certificates in PEM: correct it, or mount the file.",
    ),
    Cause(
        when=lambda it: it.worked and it.certificate is not None,
        kind=StorageError,
        patience=Patience.LONG,
        says="{it.what}: the server's certificate was trusted before, and is not any more: {it.certificate_says}",
        remedy="Look at the server's new certificate; the run resumes when it is trusted.",
    ),
    Cause(
        when=_untrusted(10),
        kind=StorageError,
        patience=Patience.BRIEF,
        says="{it.what}: the server's certificate has expired; this machine's clock says {it.clock}",
        remedy="Renew the server's certificate; if it is newer than that, correct this machine's clock.",
    ),
    Cause(
        when=_untrusted(9),
        kind=StorageError,
        patience=Patience.BRIEF,
        says="{it.what}: the server's certificate is not valid yet; this machine's clock says {it.clock}",
        remedy="Correct this machine's clock; if it is right, the server's certificate has the wrong dates.",
    ),
    Cause(
        when=lambda it: _untrusted(62, 64)(it) or it.says("doesn't match '", "doesn't match either of"),  # urllib3's
        kind=ConfigError,
        patience=Patience.BRIEF,
        says="{it.what}: the server's certificate is for another name: {it.certificate_says}",
        remedy="Write {it.names.endpoint} with a name that the certificate has, or give the server one with this name.",
    ),
    Cause(
        when=_untrusted(18),
        kind=ConfigError,
        patience=Patience.BRIEF,
        says="{it.what}: the server's certificate is not trusted: it is signed by itself",
        remedy="Point {it.names.ca} at a file with this very certificate in PEM, or give the server one from a CA.",
    ),
    Cause(
        when=_untrusted(2, 7, 19, 20, 21, 30),  # 7, 30: another CA of the same name
        kind=ConfigError,
        patience=Patience.BRIEF,
        says="{it.what}: the server's certificate is not trusted: {it.certificate_says}",
        remedy="Point {it.names.ca} at the CA that signed it. If that is set, it names another CA, or the server "
        "does not "
        "send its intermediate certificates.",
    ),
    Cause(
        when=lambda it: it.certificate is not None,
        kind=ConfigError,
        patience=Patience.BRIEF,
        says="{it.what}: the server's certificate is not accepted: {it.certificate_says}",
        remedy="Give the server another certificate.",
    ),
    Cause(
        when=_tls("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"),
        kind=ConfigError,
        patience=Patience.BRIEF,
        says="{it.what}: the server does not speak TLS on this port",
        remedy="Write {it.names.endpoint} with http://, or with the port for https.",
    ),
    Cause(
        when=_tls("HANDSHAKE_FAILURE", "PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "CERTIFICATE_REQUIRED", "NO_SHARED"),
        kind=ConfigError,
        patience=Patience.BRIEF,
        says="{it.what}: server and job do not agree on how to speak TLS: {it.reason}",
        remedy="The server must offer TLS 1.2 or newer, and not ask for a client's certificate.",
    ),
    Cause(
        when=_proxy_says("407"),
        kind=AccessDeniedError,
        patience=Patience.BRIEF,
        says="{it.what}: the proxy asks for a user and a password",
        remedy="Write them into HTTPS_PROXY and HTTP_PROXY (http://user:password@host:port), or list the host in "
        "NO_PROXY.",
    ),
    Cause(
        when=_proxy_says("403"),
        kind=AccessDeniedError,
        patience=Patience.BRIEF,
        says="{it.what}: the proxy does not allow this host",
        remedy="Allow it in the proxy, or list the host in NO_PROXY.",
    ),
    Cause(
        when=_proxy_says("4", "501"),
        kind=ConfigError,
        patience=Patience.BRIEF,
        says="{it.what}: what HTTPS_PROXY names does not work as a proxy: {it.reason}",
        remedy="Correct HTTPS_PROXY, or list the host in NO_PROXY.",
    ),
    Cause(
        when=lambda it: it.says("://socks", "SOCKS proxy", "socksio"),
        kind=ConfigError,
        patience=Patience.NONE,
        says="{it.what}: HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names a SOCKS proxy",
        remedy="Only HTTP proxies work: write http://host:port.",
    ),
    Cause(
        when=lambda it: _no_such_host(it) and not it.worked,
        kind=ConfigError,
        patience=Patience.BRIEF,
        says="{it.what}: there is no host of that name: {it.reason}",
        remedy="Correct {it.names.endpoint} and the proxy's name. In a cluster write the whole name "
        "(service.namespace.svc.cluster.local), and check its DNS.",
    ),
)
"""The first that applies counts. What is missing here is an outage, or not the network's."""
