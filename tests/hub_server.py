"""A small hub: the few endpoints that huggingface_hub uses to download."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_REPO = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>.+?)(/(?P<what>revision|tree)/(?P<revision>[^/?]+))?(\?.*)?$"
)
_FILE = re.compile(r"/(datasets/)?(?P<name>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>[^?]+)(\?.*)?$")


@dataclass(kw_only=True)
class Hub:
    """What the server holds and what it saw."""

    endpoint: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    failing: int = 0  # so many requests get a 503 first
    hang: bool = False
    resolved: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def serve_hub(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    """Serve these repositories: files by name, each repository with the one commit `COMMIT` on `main`."""
    hub = Hub(repositories=repositories)
    server = _Server(hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.hub = hub

    def handle_error(self, *_: object) -> None:
        pass  # killed clients hang up


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        hub = self.server.hub
        if hub.hang:
            hub.over.wait(60)
        if hub.failing:
            hub.failing -= 1
            self._send(503, b"{}", {})
        elif found := _FILE.match(self.path):
            self._file(found["name"], found["revision"], unquote(found["file"]))
        elif found := _REPO.match(self.path):
            self._repository(found["name"], found["what"], found["revision"] or "main")
        else:
            self._send(404, b"{}", {})

    def do_HEAD(self) -> None:
        self.do_GET()

    def _known(self, name: str, revision: str) -> bool:
        hub = self.server.hub
        if name in hub.gated and "authorization" not in self.headers:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif name not in hub.repositories:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif revision not in {"main", COMMIT}:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        else:
            return True
        return False

    def _repository(self, name: str, what: str | None, revision: str) -> None:
        if not self._known(name, revision):
            return
        files = self.server.hub.repositories[name]
        siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
        content: Any = {"id": name, "sha": COMMIT, "siblings": siblings}
        if what == "tree":
            content = [{"type": "file", "path": f, "size": len(data), "oid": _oid(data)} for f, data in files.items()]
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, file: str) -> None:
        if not self._known(name, revision):
            return
        data = self.server.hub.repositories[name].get(file)
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        if self.command == "GET":
            self.server.hub.resolved.append(file)
        self._send(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(data)}"', "Accept-Ranges": "bytes"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
