"""What misbehaves in tests, for real: a server that answers anything, and system calls that the kernel refuses, as a
file system without them does."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One reply."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @classmethod
    def error(
        cls, status: int, code: str, message: str = "as the test wants", *, more: str = "", **headers: str
    ) -> Answer:
        """An error as S3 writes it."""
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>"
        return cls(status=status, headers=headers, body=text.encode())

    @classmethod
    def page(cls, status: int = 200) -> Answer:
        """A web page: a login, a console, an error of a proxy."""
        body = b"<!doctype html><html><head><meta charset=utf-8></head><body>Sign in</body></html>"
        return cls(status=status, headers={"Content-Type": "text/html", "Server": "Console"}, body=body)


EMPTY = Answer(
    body=b"<?xml version='1.0'?><ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated></ListBucketResult>"
)
"""The listing of an empty bucket."""


@dataclass(kw_only=True)
class Answering:
    """A server, and what it was asked: method and path."""

    endpoint: str
    seen: list[tuple[str, str]] = field(default_factory=list)


@contextlib.contextmanager
def serve_answers(choose: Callable[[str, str, int], Answer]) -> Iterator[Answering]:
    """Answer whatever is asked with `choose(method, path, number)`, the number from 1."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found.seen.append((self.command, self.path))
            answer = choose(self.command, self.path, len(found.seen))
            self.send_response_only(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        def __getattr__(self, name: str) -> Callable[[], None]:
            if name.startswith("do_"):  # all other methods
                return self.do_GET
            raise AttributeError(name)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign,assignment] - clients hang up
    found = Answering(endpoint=f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()


CALLS = {
    "x86_64": {"rename": (82, 264, 316), "link": (86, 265), "fsync": (74, 75), "flock": (73,)},
    "aarch64": {"rename": (38, 276), "link": (37,), "fsync": (82, 83), "flock": (32,)},
}
"""Numbers of system calls (asm/unistd.h), by what they do."""


def refuse(call: str, number: int) -> None:
    """From now on the kernel answers a system call of this process with an error (seccomp, which every user may)."""
    load, jump, leave, allow, error = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000 | number
    program = [(load, 0, 0, 0)]  # the call's number, the first field of seccomp_data
    for known in CALLS[platform.machine()][call]:
        program += [(jump, 0, 1, known), (leave, 0, 0, error)]
    program.append((leave, 0, 0, allow))

    class Filter(ctypes.Structure):
        _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint16), ("filter", ctypes.POINTER(Filter))]

    filters = (Filter * len(program))(*(Filter(*one) for one in program))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, seccomp, by_filter = 38, 22, 2
    whole = Program(len(program), ctypes.cast(filters, ctypes.POINTER(Filter)))
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(seccomp, by_filter, ctypes.byref(whole)):
        raise OSError(ctypes.get_errno(), "seccomp")
