"""The connection to S3: boto3's standard credential chain and environment variables, nothing of our own.

So `AWS_ENDPOINT_URL_S3`, `AWS_CA_BUNDLE`, `HTTPS_PROXY`, `AWS_PROFILE`, `AWS_CONFIG_FILE` (with `s3.addressing_style`)
and `AWS_REQUEST_CHECKSUM_CALCULATION` work as everywhere else. There is no standard variable for SSE-KMS: give the
bucket a default encryption. Nor for requester pays: after a refusal every second try offers to pay
(`x-amz-request-payer`), and the connection keeps what worked; AWS ignores the offer on other buckets.

boto3's own retries are off, because they are invisible and cannot distinguish their own success from another writer's:
see `bucket.Bucket.call`.
"""

from __future__ import annotations

import dataclasses
import threading
from http import HTTPStatus
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config

from job.runtime.errors import ConfigError
from job.storage.causes import in_words
from job.storage.s3.checksum import upload_algorithm
from job.storage.s3.failures import ConfigurationError, CredentialsError, Reply

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client  # stubs: only type checkers have them

WORKERS = 8
"""Requests in flight of one transfer."""

CONNECT_SECONDS = 10.0
START_BYTES = 300
"""Of a reply's body, to say what answered."""
_KEYS = {"env": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")}
_IN_FILES = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
_STORES = (
    "amazonaws.com",
    "aliyuncs.com",
    "backblazeb2.com",
    "cloudflarestorage.com",
    "digitaloceanspaces.com",
    "googleapis.com",
    "linodeobjects.com",
    "myqcloud.com",
    "ovh.net",
    "scw.cloud",
    "wasabisys.com",
)
"""Hosts of stores whose endpoints may not begin with a bucket's name."""


class Connection:
    """A client that can be renewed while threads use it."""

    def __init__(self, *, reply_seconds: float) -> None:
        self._reply_seconds = reply_seconds
        self._lock = threading.Lock()
        self._requester_pays = False
        self._client: S3Client | None = None
        self._session: boto3.session.Session | None = None
        self._thread = threading.local()
        self.worked = False
        """Whether a request has succeeded."""

    def client(self) -> S3Client:
        """The current client, with credentials that are valid now.

        Raises:
            ConfigurationError: boto3 does not accept its configuration.
            CredentialsError: it has no credentials.
            ConfigError: the credentials have characters that no key has.
        """
        self._thread.reply, self._thread.redirected = None, False
        with self._lock:
            if self._session is None or self._client is None:
                self._session = _session()
                self._authenticate(self._session)  # first: making a client asks for credentials, too
                self._client = self._connect(self._session)
            else:
                self._authenticate(self._session)
            return self._client

    def renew(self, old: S3Client | None, *, other_payer: bool = False) -> None:
        """Ask the credential chain again, unless another thread has done so since `old` was returned."""
        with self._lock:
            if self._client is old or old is None:
                self._client = self._session = None
                self._requester_pays ^= other_payer

    def _connect(self, session: boto3.session.Session) -> S3Client:
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=CONNECT_SECONDS,
            read_timeout=self._reply_seconds,
            max_pool_connections=2 * WORKERS,
            tcp_keepalive=True,
            user_agent_extra="finetune-job",
        )
        try:
            client: S3Client = session.client("s3", config=config)
        except Exception as error:
            raise ConfigurationError from error
        if upload_algorithm(client) is not None:
            used: Any = client.meta.config  # in place: making a second client costs a tenth of a second
            used.s3 = {**(used.s3 or {}), "payload_signing_enabled": False}
        if self._requester_pays:
            client.meta.events.register("before-call.s3", _requester_pays)
        answers: Any = self._redirect_once  # the stubs know no handler that answers
        client.meta.events.register("before-call.s3.HeadBucket", answers)
        client.meta.events.register("before-parse.s3", self._see)
        client.meta.events.register("needs-retry.s3", self._see_status)
        return client

    def _authenticate(self, session: boto3.session.Session) -> None:
        """Have credentials that are valid now, so that what is wrong with them is found here."""
        try:
            found = session.get_credentials()
            keys = found.get_frozen_credentials() if found is not None else None
        except Exception as error:
            raise CredentialsError from error
        if found is None or keys is None:
            raise CredentialsError
        names = _KEYS.get(found.method, _IN_FILES)
        for name, value in zip(names, (keys.access_key, keys.secret_key, keys.token), strict=True):
            _check_key(name, value or "", found.method)

    def _redirect_once(self, **_: Any) -> tuple[Any, dict[str, Any]] | None:
        """Botocore asks for a bucket's region after each redirect, also after that of this very question, without end:
        the second one is not sent, and answered without a region."""
        if not self._thread.redirected:
            self._thread.redirected = True
            return None
        return SimpleNamespace(status_code=HTTPStatus.OK), {"ResponseMetadata": {"HTTPHeaders": {}}}

    def _see(self, response_dict: dict[str, Any], **_: Any) -> None:
        """Keep what is needed to say what a bad reply was."""
        body = response_dict.get("body", b"")
        start = body[:START_BYTES].decode(errors="replace") if isinstance(body, bytes) else ""
        self._thread.reply = Reply(
            status=response_dict["status_code"],
            headers={name.lower(): value for name, value in response_dict["headers"].items()},
            start=" ".join(start.split()),
        )

    def _see_status(self, response: Any, **_: Any) -> None:
        """Botocore makes 500 of a page that came with 200; the status of the reply itself is here."""
        if response is not None and self.reply is not None:
            reply, _ = response
            self._thread.reply = dataclasses.replace(self.reply, status=getattr(reply.raw, "status", reply.status_code))

    @property
    def reply(self) -> Reply | None:
        """The last reply to this thread."""
        return getattr(self._thread, "reply", None)

    @property
    def checksums(self) -> bool:
        """Whether uploads carry checksums in headers."""
        return self._client is not None and upload_algorithm(self._client) is not None

    @property
    def endpoint(self) -> str:
        """Scheme, host and port, without the credentials that a URL may contain."""
        if self._client is None:
            return "the store"
        parts = urlsplit(self._client.meta.endpoint_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    def credentials(self) -> str:
        """Where the credentials came from, by botocore's name of the method; never their value."""
        session = self._session
        if session is None:
            return "none"
        try:
            found = session.get_credentials()
        except Exception as error:  # noqa: BLE001 - whatever it is, there are none
            return f"none: {in_words(error)}"
        if found is not None:
            return f"`{found.method}`"
        chain = session._session.get_component("credential_provider")  # noqa: SLF001 - boto3 has no public way
        return "none found: looked at " + ", ".join(provider.METHOD for provider in chain.providers)


def _session() -> boto3.session.Session:
    try:
        return boto3.session.Session()
    except Exception as error:
        raise ConfigurationError from error


def check_endpoint(client: S3Client, bucket: str) -> None:
    """Check that the endpoint is that of a store, not of a bucket.

    Raises:
        ConfigError: it names the bucket, which would then be asked for twice.
    """
    parts = urlsplit(client.meta.endpoint_url)
    host = parts.hostname or ""
    if parts.path.strip("/").partition("/")[0] == bucket:
        wrong = f"ends with the bucket {bucket!r}"
    elif host.startswith(f"{bucket}.") and host.endswith(_STORES):
        wrong = f"begins with the bucket {bucket!r}"
    else:
        return
    raise ConfigError(
        f"AWS_ENDPOINT_URL_S3={client.meta.endpoint_url} {wrong}, which would be asked for twice.",
        remedy="Write the endpoint of the store alone; the bucket is in the address (s3://bucket/...).",
    )


def _check_key(name: str, value: str, method: str) -> None:
    """Check that a part of the credentials has no white space or quotes around it; it is never shown."""
    secret = "secret" in name.lower()  # it is not sent, and a store may have any
    printable = secret or all("!" <= character <= "~" for character in value)
    if printable and value == value.strip() and value[:1] + value[-1:] not in {'""', "''"}:
        return
    where = f"{name}" if method in _KEYS else f"{name} of the credentials from `{method}`"
    what = (
        "white space or a line break" if any(map(str.isspace, value)) else "quotes or other characters that no key has"
    )
    raise ConfigError(
        f"{where} has {what} in it.",
        remedy="Write it again without: a Secret made by `echo` has a line break at its end (use `echo -n` or "
        "--from-literal), and an env file keeps quotes.",
    )


def _requester_pays(params: dict[str, Any], **_: Any) -> None:
    params["headers"]["x-amz-request-payer"] = "requester"
