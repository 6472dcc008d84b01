"""One bucket, and the retries of its requests: every request to S3 goes through `Bucket.call`."""

from __future__ import annotations

import datetime
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import structlog
from botocore.exceptions import ClientError
from tenacity import RetryCallState, Retrying, retry_if_exception, sleep_using_event

from job.runtime.errors import AccessDeniedError
from job.storage.causes import Cause, Patience
from job.storage.parallel import Stopped
from job.storage.s3.causes import cause_of
from job.storage.s3.client import Connection, check_endpoint
from job.storage.s3.failures import Failed, nothing

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

_FIRST_SECONDS = 0.5
_LONGEST_SECONDS = {Patience.LONG: 30.0, Patience.BRIEF: 5.0}
# Not the global generator: training seeds it, so that all pods of one seed would retry at the same moments.
_jitter = random.SystemRandom()


class Bucket:
    """A bucket whose requests are retried while a retry may help."""

    def __init__(
        self, name: str, connection: Connection, *, patience_seconds: float, denied_patience_seconds: float
    ) -> None:
        self.name = name
        self.connection = connection
        self.patience_seconds = patience_seconds
        self.denied_patience_seconds = denied_patience_seconds

    def call(
        self,
        operation: str,
        key: str,
        act: Callable[[S3Client], T],
        *,
        expected: Callable[[ClientError], bool] = nothing,
        stop: threading.Event | None = None,
    ) -> T:
        """What `act` returns. Failures are retried with full jitter, for as long as their cause allows.

        Args:
            operation: the S3 operation's name, for logs and errors.
            key: the object's key, or the prefix listed.
            act: called with a client, possibly several times.
            expected: which replies the caller deals with.
            stop: ends the retries when set.

        Raises:
            JobError: of the kind that the table of causes says (`causes.CAUSES`).
            Stopped: `stop` was set.
            ClientError: a reply that was expected.
        """
        return _Call(self, operation, key, expected, stop or threading.Event()).run(act)


class _Call:
    """One operation with its deadlines. They are counted from the first failure: a slow transfer is not an outage."""

    def __init__(
        self,
        bucket: Bucket,
        operation: str,
        key: str,
        expected: Callable[[ClientError], bool],
        stop: threading.Event,
    ) -> None:
        self.bucket, self.operation, self.key, self.expected, self.stop = bucket, operation, key, expected, stop
        self.failing_since = self.refused_since = 0.0  # by the monotonic clock; 0 before the first
        self.client: S3Client | None = None

    def run(self, act: Callable[[S3Client], T]) -> T:
        connection = self.bucket.connection

        def attempt() -> T:
            if self.stop.is_set():
                raise Stopped
            self.client = None
            self.client = connection.client()
            check_endpoint(self.client, self.bucket.name)
            result = act(self.client)
            connection.worked = True
            return result

        retrying = Retrying(
            retry=retry_if_exception(self._note),
            wait=self._wait,
            stop=lambda state: time.monotonic() >= self._deadline(state),
            sleep=sleep_using_event(self.stop),
            before_sleep=self._before_sleep,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except Exception as error:
            cause = self._cause(error)
            if cause is None:
                raise
            raise cause.failure(self._evidence(error)) from error

    def _evidence(self, error: BaseException) -> Failed:
        bucket, connection = self.bucket, self.bucket.connection
        return Failed(
            error=error,
            what=f"{self.operation} on s3://{bucket.name}/{self.key} at {connection.endpoint}",
            worked=connection.worked,
            operation=self.operation,
            bucket=bucket.name,
            key=self.key,
            endpoint=connection.endpoint,
            connection=connection,
            reply=connection.reply,
            seconds=time.monotonic() - self.failing_since,
        )

    def _cause(self, error: BaseException) -> Cause | None:
        if isinstance(error, ClientError) and self.expected(error):
            return None
        return cause_of(self._evidence(error))

    def _patience(self, state: RetryCallState) -> Patience:
        cause = self._cause(_error(state))
        return cause.patience if cause else Patience.NONE

    def _note(self, error: BaseException) -> bool:
        """Whether another try may help; starts the clock of the failure's kind if it is the first."""
        cause = self._cause(error)
        self.failing_since = self.failing_since or time.monotonic()
        if cause is None or cause.patience is not Patience.LONG:
            self.refused_since = self.refused_since or time.monotonic()
        return cause is not None and cause.patience is not Patience.NONE

    def _deadline(self, state: RetryCallState) -> float:
        if self._patience(state) is Patience.LONG:
            return self.failing_since + self.bucket.patience_seconds
        return self.refused_since + min(self.bucket.denied_patience_seconds, self.bucket.patience_seconds)

    def _wait(self, state: RetryCallState) -> float:
        left = self._deadline(state) - time.monotonic()
        longest = _LONGEST_SECONDS.get(self._patience(state), 0.0)
        most = min(longest, _FIRST_SECONDS * 2 ** min(state.attempt_number, 20))
        return max(0.0, min(_jitter.uniform(0.0, most), left))

    def _before_sleep(self, state: RetryCallState) -> None:
        error, pause = _error(state), state.upcoming_sleep
        cause = self._cause(error)
        if cause is not None and cause.renew:
            self.bucket.connection.renew(self.client, other_payer=cause.kind is AccessDeniedError)
        deadline = datetime.datetime.now(datetime.UTC) + datetime.timedelta(
            seconds=self._deadline(state) - time.monotonic()
        )
        structlog.get_logger().warning(
            "storage_retry",
            operation=self.operation,
            key=f"s3://{self.bucket.name}/{self.key}",
            error=self._evidence(error).reason,
            tries=state.attempt_number,
            next_seconds=round(pause, 3),
            deadline=deadline.isoformat(timespec="seconds"),
        )


def _error(state: RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome else None
    return error or RuntimeError("no failure")
