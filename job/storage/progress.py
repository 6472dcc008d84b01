"""The progress of a transfer, logged every few seconds, and not at all for a short one."""

from __future__ import annotations

import threading
import time

import structlog

INTERVAL_SECONDS = 5.0


class Progress:
    """Counts the bytes of one transfer; any thread may add."""

    def __init__(self, uri: str, direction: str, total: int) -> None:
        self._uri, self._direction, self._total = uri, direction, total
        self._lock = threading.Lock()
        self._done = 0
        self._start = self._reported = time.monotonic()

    def add(self, count: int) -> None:
        """Count transferred bytes; negative when a part has to start again."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._reported < INTERVAL_SECONDS:
                return
            self._reported = now
            done = self._done
        self._report(done, now - self._start)

    def _report(self, done: int, seconds: float) -> None:
        speed = done / seconds
        structlog.get_logger().info(
            "transfer_progress",
            uri=self._uri,
            direction=self._direction,
            bytes_done=done,
            bytes_total=self._total,
            bytes_per_second=round(speed),
            eta_seconds=round((self._total - done) / speed, 1) if speed > 0 else None,
        )
