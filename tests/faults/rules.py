"""What happens to the requests of a job on their way to the store: rules for the proxy in `tests.servers`."""

import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from tests.servers import Seen, serve_proxy

Act = Callable[[Seen], None]


def to(**fields: Any) -> Act:
    """Set these fields of a request that was seen, e.g. `cut=True`."""
    return lambda seen: vars(seen).update(fields)


def refuse(status: int, code: str) -> Act:
    """An S3 error."""
    return to(refuse=(status, code))


@dataclass(kw_only=True)
class Fault:
    """Befalls the requests whose `METHOD path` has the pattern, from the `first` to the `last` of them."""

    on: str
    act: Act
    first: int = 1
    last: int = 1 << 30
    during: threading.Event | None = None
    """Only while this is set."""
    hits: int = 0
    _seen: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, seen: Seen) -> None:
        """The rule for the proxy."""
        if not re.search(self.on, f"{seen.method} {seen.path}") or not (self.during is None or self.during.is_set()):
            return
        with self._lock:
            self._seen += 1
            hit = self.first <= self._seen <= self.last
            self.hits += hit
        if hit:
            self.act(seen)


def through(bench: Any, *faults: Act, port: int = 0) -> AbstractContextManager[str]:
    """A proxy to the bench's store; yields its URL."""

    def rule(seen: Seen) -> None:
        for fault in faults:
            fault(seen)

    return serve_proxy(bench.place.endpoint, rule, port=port)


class Held:
    """A request that waits on its way to the store until it is let go."""

    def __init__(self, pattern: str, first: int = 1) -> None:
        self.there, self._released = threading.Event(), threading.Event()
        self.fault = Fault(on=pattern, act=to(before=self._hold), first=first, last=first)

    def _hold(self) -> None:
        self.there.set()
        self._released.wait(120)

    def release(self) -> None:
        """Let it continue."""
        self._released.set()
