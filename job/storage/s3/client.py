"""The connection to S3: boto3's standard credential chain and environment variables, nothing of our own.

So `AWS_ENDPOINT_URL_S3`, `AWS_CA_BUNDLE`, `HTTPS_PROXY`, `AWS_PROFILE`, `AWS_CONFIG_FILE` (with `s3.addressing_style`)
and `AWS_REQUEST_CHECKSUM_CALCULATION` work as everywhere else. There is no standard variable for SSE-KMS: give the
bucket a default encryption. Nor for requester pays: after a refusal every second try offers to pay
(`x-amz-request-payer`), and the connection keeps what worked; AWS ignores the offer on other buckets.

boto3's own retries are off, because they are invisible and cannot distinguish their own success from another writer's:
see `bucket.Bucket.call`.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ProfileNotFound

from job.runtime.errors import ConfigError
from job.storage.s3.checksum import upload_algorithm

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client  # stubs: only type checkers have them

WORKERS = 8
"""Requests in flight of one transfer."""

CONNECT_SECONDS = 10.0


class Connection:
    """A client that can be renewed while threads use it."""

    def __init__(self, *, reply_seconds: float) -> None:
        self._reply_seconds = reply_seconds
        self._lock = threading.Lock()
        self._requester_pays = False
        self._client: S3Client | None = None
        self._session: boto3.session.Session | None = None

    def client(self) -> S3Client:
        """The current client.

        Raises:
            ConfigError: the profile in `AWS_PROFILE` does not exist, or the endpoint is not a URL.
        """
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def renew(self, old: S3Client, *, other_payer: bool = False) -> None:
        """Ask the credential chain again, unless another thread has done so since `old` was returned."""
        with self._lock:
            if self._client is old:
                self._client = None
                self._requester_pays ^= other_payer

    def _connect(self) -> S3Client:
        try:
            self._session = boto3.session.Session()
        except ProfileNotFound as error:
            raise ConfigError(f"{error}.", remedy="Correct AWS_PROFILE, or mount the file that has it.") from error
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=CONNECT_SECONDS,
            read_timeout=self._reply_seconds,
            max_pool_connections=2 * WORKERS,
            tcp_keepalive=True,
            user_agent_extra="finetune-job",
        )
        try:
            client: S3Client = self._session.client("s3", config=config)
        except ValueError as error:  # botocore's for an endpoint that is not a URL
            raise ConfigError(
                f"{error}.", remedy="Write AWS_ENDPOINT_URL_S3 as a URL with its scheme: https://minio.example:9000."
            ) from error
        if upload_algorithm(client) is not None:
            used: Any = client.meta.config  # in place: making a second client costs a tenth of a second
            used.s3 = {**(used.s3 or {}), "payload_signing_enabled": False}
        if self._requester_pays:
            client.meta.events.register("before-call.s3", _requester_pays)
        return client

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
        except BotoCoreError as error:
            return f"none: {type(error).__name__}: {error}"
        if found is not None:
            return f"`{found.method}`"
        chain = session._session.get_component("credential_provider")  # noqa: SLF001 - boto3 has no public way
        return "none found: looked at " + ", ".join(provider.METHOD for provider in chain.providers)


def _requester_pays(params: dict[str, Any], **_: Any) -> None:
    params["headers"]["x-amz-request-payer"] = "requester"
