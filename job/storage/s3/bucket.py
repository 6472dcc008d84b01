"""One bucket, and the retries of its requests: every request to S3 goes through `Bucket.call`."""

from __future__ import annotations

import datetime
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import structlog
from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError
from tenacity import RetryCallState, Retrying, retry_if_exception, sleep_using_event

from job.runtime.errors import AccessDeniedError, ConfigError, DataError, JobError, StorageError
from job.storage.parallel import Stopped
from job.storage.s3.client import Connection
from job.storage.s3.failures import Failure, Kind, classify, has_meaning, in_words

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

_FIRST_SECONDS = 0.5
_LONGEST_SECONDS = {Kind.WAIT: 30.0, Kind.DENIED: 5.0, Kind.UNTRUSTED: 5.0}
# Not the global generator: training seeds it, so that all pods of one seed would retry at the same moments.
_jitter = random.SystemRandom()
_PERMISSIONS = {
    "GetObject": "s3:GetObject (and s3:GetObjectVersion where the bucket keeps versions,"
    " kms:Decrypt where it encrypts with a KMS key)",
    "HeadObject": "s3:GetObject and s3:ListBucket (without the second a missing object looks like a denied one)",
    "ListObjectsV2": "s3:ListBucket",
    "DeleteObject": "s3:DeleteObject",
}
_WRITE_PERMISSION = "s3:PutObject (and kms:GenerateDataKey where the bucket encrypts with a KMS key)"


class Bucket:
    """A bucket whose requests are retried while a retry may help."""

    def __init__(
        self, name: str, connection: Connection, *, patience_seconds: float, denied_patience_seconds: float
    ) -> None:
        self.name = name
        self.connection = connection
        self.patience_seconds = patience_seconds
        self.denied_patience_seconds = denied_patience_seconds

    def call(self, operation: str, key: str, act: Callable[[S3Client], T], *, stop: threading.Event | None = None) -> T:
        """What `act` returns. Failures are retried with full jitter, for as long as their kind allows.

        Args:
            operation: the S3 operation's name, for logs and errors.
            key: the object's key, or the prefix listed.
            act: called with a client, possibly several times.
            stop: ends the retries when set.

        Raises:
            StorageError, AccessDeniedError, DataError: see `Store`.
            Stopped: `stop` was set.
            ClientError: a reply about the object itself (`failures.has_meaning`).
        """
        return _Call(self, operation, key, stop or threading.Event()).run(act)

    def failure(self, operation: str, key: str, error: Exception, *, seconds: float) -> JobError:
        """The error to raise when there are no more retries."""
        what = f"{operation} on s3://{self.name}/{key} at {self.connection.endpoint}"
        kind = classify(error).kind
        if kind is Kind.NO_BUCKET:
            return DataError(
                f"The bucket {self.name!r} does not exist at {self.connection.endpoint}.",
                remedy="Correct its name, or the endpoint in AWS_ENDPOINT_URL_S3.",
            )
        if isinstance(error, ParamValidationError):
            return ConfigError(f"{what} is not a valid request: {error}.", remedy="Correct the address.")
        if kind is Kind.DENIED:
            return AccessDeniedError(
                f"{what} was denied for {seconds:.0f} s: {in_words(error)}."
                f" Credentials tried: {self.connection.credentials()}.",
                remedy=f"Give this identity {_PERMISSIONS.get(operation, _WRITE_PERMISSION)}, or other credentials.",
            )
        if kind is Kind.UNTRUSTED:
            return StorageError(
                f"{what}: the server's certificate is not trusted: {in_words(error)}.",
                remedy="Point AWS_CA_BUNDLE at the CA that signed it.",
            )
        return StorageError(
            f"{what} failed, retried for {seconds:.0f} s: {in_words(error)}.",
            remedy="Run again when the store answers; TUNE_STORAGE_PATIENCE_MINUTES waits longer.",
        )


class _Call:
    """One operation with its deadlines. They are counted from the first failure: a slow transfer is not an outage."""

    def __init__(self, bucket: Bucket, operation: str, key: str, stop: threading.Event) -> None:
        self.bucket, self.operation, self.key, self.stop = bucket, operation, key, stop
        self.failing_since = self.refused_since = 0.0  # by the monotonic clock; 0 before the first
        self.client: S3Client | None = None

    def run(self, act: Callable[[S3Client], T]) -> T:
        def attempt() -> T:
            if self.stop.is_set():
                raise Stopped
            self.client = self.bucket.connection.client()
            return act(self.client)

        retrying = Retrying(
            retry=retry_if_exception(lambda error: self._note(error).kind in _LONGEST_SECONDS),
            wait=self._wait,
            stop=lambda state: time.monotonic() >= self._deadline(state),
            sleep=sleep_using_event(self.stop),
            before_sleep=self._before_sleep,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except ClientError as error:
            if has_meaning(error):
                raise
            raise self._job_error(error) from error
        except Exception as error:
            if classify(error).kind is Kind.OTHER and not isinstance(error, BotoCoreError):
                raise
            raise self._job_error(error) from error

    def _job_error(self, error: Exception) -> JobError:
        return self.bucket.failure(self.operation, self.key, error, seconds=time.monotonic() - self.failing_since)

    def _note(self, error: BaseException) -> Failure:
        """Classify a failure, and start the clock of its kind if it is the first."""
        failure = classify(error)
        self.failing_since = self.failing_since or time.monotonic()
        if failure.kind is not Kind.WAIT:
            self.refused_since = self.refused_since or time.monotonic()
        return failure

    def _deadline(self, state: RetryCallState) -> float:
        if classify(_error(state)).kind is Kind.WAIT:
            return self.failing_since + self.bucket.patience_seconds
        return self.refused_since + min(self.bucket.denied_patience_seconds, self.bucket.patience_seconds)

    def _wait(self, state: RetryCallState) -> float:
        left = self._deadline(state) - time.monotonic()
        most = min(_LONGEST_SECONDS[classify(_error(state)).kind], _FIRST_SECONDS * 2 ** min(state.attempt_number, 20))
        return max(0.0, min(_jitter.uniform(0.0, most), left))

    def _before_sleep(self, state: RetryCallState) -> None:
        error, pause = _error(state), state.upcoming_sleep
        failure = classify(error)
        if failure.renew and self.client is not None:
            self.bucket.connection.renew(self.client, other_payer=failure.kind is Kind.DENIED)
        deadline = datetime.datetime.now(datetime.UTC) + datetime.timedelta(
            seconds=self._deadline(state) - time.monotonic()
        )
        structlog.get_logger().warning(
            "storage_retry",
            operation=self.operation,
            key=f"s3://{self.bucket.name}/{self.key}",
            error=in_words(error),
            tries=state.attempt_number,
            next_seconds=round(pause, 3),
            deadline=deadline.isoformat(timespec="seconds"),
        )


def _error(state: RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome else None
    return error or RuntimeError("no failure")
