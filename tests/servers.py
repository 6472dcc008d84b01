"""Real servers for the storage tests: rclone's S3 on real files, and a proxy that breaks what passes through it."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

ACCESS_KEY = "access-key"
SECRET_KEY = "secret-key-that-no-message-may-show"


@dataclass(frozen=True, kw_only=True)
class Rclone:
    """An S3 server whose objects are plain files: `directory/bucket/key`."""

    endpoint: str
    directory: Path


@contextlib.contextmanager
def serve_rclone(directory: Path, *options: str) -> Iterator[Rclone]:
    """Start rclone's server; it ignores conditional writes."""
    program = Path(sys.executable).with_name("rclone")
    for _ in range(5):
        port = _free_port()
        child = subprocess.Popen(
            [
                program,
                "serve",
                "s3",
                directory,
                f"--addr=127.0.0.1:{port}",
                f"--auth-key={ACCESS_KEY},{SECRET_KEY}",
                *options,
            ],
            stderr=subprocess.DEVNULL,
        )
        try:
            if _answers(child, port):
                yield Rclone(endpoint=f"http://127.0.0.1:{port}", directory=directory)
                return
        finally:
            child.kill()
            child.wait()
    raise OSError("rclone did not start")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _answers(child: subprocess.Popen[bytes], port: int) -> bool:
    for _ in range(200):
        if child.poll() is not None:
            return False  # somebody took the port
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        time.sleep(0.05)
    return False


@dataclass(kw_only=True)
class Seen:
    """One request at the proxy. A rule may set what happens to it."""

    method: str
    path: str
    headers: dict[str, str]
    number: int  # of its method, from 1
    refuse: tuple[int, str] | None = None  # an S3 error instead of an answer
    cut: bool = False  # the server acts, the client gets no reply
    lose: bool = False  # the client gets a success, and the server hears nothing
    hang_seconds: float = 0.0
    flip: bool = False  # one byte of the body changes
    truncate: bool = False  # the connection ends in the middle of the body
    before: Callable[[], None] = field(default=lambda: None)  # runs before the request is passed on
    after: Callable[[], None] = field(default=lambda: None)  # runs when the server has acted, before the reply
    reset: bool = False  # the connection is reset, and the server hears nothing
    drip_seconds: float = 0.0  # between one eighth of the body and the next
    without: str = ""  # a header that the reply lacks, in lower case


Rule = Callable[[Seen], None]


@contextlib.contextmanager
def serve_proxy(upstream: str, rule: Rule, *, tls: Path | None = None, port: int = 0) -> Iterator[str]:
    """A reverse proxy in front of `upstream` (or a forward proxy for whoever uses it as one); yields its URL."""
    server = _Proxy(upstream, rule, port)
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls / "server.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, upstream: str, rule: Rule, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Passing)
        self.upstream, self.rule = upstream, rule
        self.counts: Counter[str] = Counter()
        self.over = threading.Event()

    def handle_error(self, *_: object) -> None:
        pass  # clients hang up on purpose here


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.counts[self.command] += 1
        seen = Seen(
            method=self.command,
            path=self.path,
            headers={name.lower(): value for name, value in self.headers.items()},
            number=self.server.counts[self.command],
        )
        self.server.rule(seen)
        seen.before()
        if seen.hang_seconds:
            self.server.over.wait(seen.hang_seconds)
            self.close_connection = True
        elif seen.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif seen.lose:
            self._reply(200, [("ETag", '"d41d8cd98f00b204e9800998ecf8427e"')], b"", whole=True)
        elif seen.refuse:
            self._refuse(*seen.refuse)
        else:
            self._pass_on(seen, body)

    def do_PUT(self) -> None:
        self.do_GET()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_DELETE(self) -> None:
        self.do_GET()

    def _refuse(self, status: int, code: str) -> None:
        content = f"<Error><Code>{code}</Code><Message>as the test wants</Message></Error>".encode()
        self._reply(status, [], content, whole=True)

    def _pass_on(self, seen: Seen, body: bytes) -> None:
        status, headers, content = _forward(self.server.upstream, self, body)
        headers = [(name, value) for name, value in headers if name.lower() != seen.without]
        seen.after()
        if seen.cut:
            self.close_connection = True
            return
        if seen.flip:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._reply(status, headers, content, whole=not seen.truncate, drip_seconds=seen.drip_seconds)

    def _reply(
        self, status: int, headers: list[tuple[str, str]], content: bytes, *, whole: bool, drip_seconds: float = 0.0
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in {"connection", "transfer-encoding"}:
                self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            sent = content if whole else content[: len(content) // 2]
            size = len(sent) // 8 + 1 if drip_seconds else len(sent) or 1
            for start in range(0, len(sent), size):
                self.wfile.write(sent[start : start + size])
                self.server.over.wait(drip_seconds)
        self.close_connection = self.close_connection or not whole

    def log_message(self, *_: object) -> None:
        pass


def _forward(upstream: str, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
    absolute = urlsplit(request.path)
    host = absolute.netloc or urlsplit(upstream).netloc
    path = request.path if not absolute.netloc else request.path.partition(absolute.netloc)[2]
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        connection.putrequest(request.command, path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            if name.lower() not in {"expect", "connection", "proxy-connection"}:
                connection.putheader(name, value)
        connection.endheaders(body or None)
        reply = connection.getresponse()
        return reply.status, reply.getheaders(), reply.read()
    finally:
        connection.close()
