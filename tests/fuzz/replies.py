"""What a store may answer: any bytes where HTTP, XML and S3's headers belong, from a real server."""

import functools
import os
import socket
import threading
from pathlib import Path

from hypothesis import strategies as st

from job.storage.open import open_store
from tests.fuzz.harness import CONFIG, DATA, Target
from tests.fuzz.mutations import BYTES, changed
from tests.servers import ACCESS_KEY, SECRET_KEY

LISTING = b"""<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name>
<Prefix>p/</Prefix><KeyCount>1</KeyCount><IsTruncated>false</IsTruncated><Contents><Key>p/a</Key><Size>3</Size><ETag>"e"</ETag>
<LastModified>2026-11-28T00:00:00Z</LastModified></Contents></ListBucketResult>"""
ERROR = b'<?xml version="1.0"?><Error><Code>%s</Code><Message>m</Message></Error>'
CODES = [
    b"NoSuchKey", b"NoSuchBucket", b"AccessDenied", b"SlowDown", b"InternalError", b"PreconditionFailed",
    b"NotImplemented",
    b"RequestTimeTooSkewed", b"InvalidAccessKeyId", b"SignatureDoesNotMatch", b"ExpiredToken", b"QuotaExceeded",
    b"InvalidObjectState", b"PermanentRedirect", b"XAmzContentSHA256Mismatch", b"MalformedXML", b"Strange",
]  # fmt: skip
STATUS = [200, 204, 206, 301, 304, 307, 400, 403, 404, 405, 409, 411, 412, 416, 429, 500, 501, 503, 599, 999]
HEADERS = [
    b'ETag: "e"', b"ETag: ", b"Content-Type: application/xml", b"Content-Type: text/html", b"x-amz-request-id: 1",
    b"x-amz-version-id: null", b"x-amz-checksum-crc32: AAAAAA==", b"x-amz-checksum-crc32: !",
    b"x-amz-checksum-sha256: x",
    b"Content-Range: bytes 0-2/3", b"Content-Range: bytes 9-2/x", b"Location: http://127.0.0.1:1/", b"Location: ://",
    b"Retry-After: 99999", b"Retry-After: x", b"Transfer-Encoding: chunked", b"Content-Encoding: gzip",
    b"Date: yesterday",
    b"x-amz-storage-class: GLACIER", b"x-amz-bucket-region: eu-west-9", b"Last-Modified: x", b"x: " + b"y" * 70_000,
]  # fmt: skip
BODIES = [LISTING, b"", b"abc", b"<html>login</html>", b"<", b'{"message": "no"}', *(ERROR % code for code in CODES)]
XML_WORDS = [
    b"<Size>-1</Size>", b"<Size>x</Size>", b"<Size>", b"<Key>../a</Key>", b"<Key></Key>", b"<Key>p/</Key>", b"&lt;",
    b"&x;",
    b"<IsTruncated>true</IsTruncated>", b"<Contents/>", b"<Contents></Contents>", b'<!DOCTYPE x [<!ENTITY a "b">]>',
    b"<Size>99999999999999999999999</Size>", b"<LastModified>x</LastModified>", b"\xff",
    b"<EncodingType>url</EncodingType>",
    b"<NextContinuationToken></NextContinuationToken>", b"<CommonPrefixes><Prefix>p/x/</Prefix></CommonPrefixes>",
]  # fmt: skip
METHODS = (
    "list",
    "names",
    "head",
    "read",
    "read_start",
    "write",
    "create",
    "replace",
    "download",
    "delete",
    "unfinished",
)


@st.composite
def reply(draw: st.DrawFn) -> bytes:
    """The call to make, and the bytes to answer it with."""
    method = draw(st.sampled_from(METHODS)).encode()
    if draw(st.integers(0, 9)) == 0:
        return method + b"\n" + draw(BYTES)
    body = draw(changed(BODIES, XML_WORDS))
    length = draw(st.sampled_from([len(body)] * 5 + [0, len(body) + 5, -1, 10**12]))
    lines = [b"HTTP/1.1 %d Word" % draw(st.sampled_from(STATUS)), b"Content-Length: %d" % length]
    lines += draw(st.lists(st.sampled_from(HEADERS), max_size=3))
    return method + b"\n" + b"\r\n".join(lines) + b"\r\n\r\n" + body


class Server:
    """Answers each connection with the same bytes, and closes it."""

    def __init__(self) -> None:
        self.answer = b""
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(2)
            try:
                if b"Expect: 100" in connection.recv(65_536):
                    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                connection.sendall(self.answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65_536):
                    pass
            except OSError:
                pass


@functools.cache
def server() -> Server:
    """One for all inputs; the environment leads to it."""
    started = Server()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "AWS_PROFILE"):
        os.environ.pop(name, None)
    os.environ.update(
        AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{started.port}",
        AWS_ACCESS_KEY_ID=ACCESS_KEY,
        AWS_SECRET_ACCESS_KEY=SECRET_KEY,
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
        AWS_CONFIG_FILE="/nonexistent",
        AWS_SHARED_CREDENTIALS_FILE="/nonexistent",
    )
    return started


@functools.cache
def _store() -> object:
    server()
    return open_store("s3://bucket/p", patience_seconds=0, denied_patience_seconds=0, reply_seconds=2)


def replies(data: bytes, directory: Path) -> None:
    """Make one call of the store's."""
    from job.storage.base import Entry

    method, _, server().answer = data.partition(b"\n")
    store, entry = _store(), Entry(key="a", size=3, etag="e", version=None)
    calls = {
        "list": lambda: store.list_objects(""),
        "names": lambda: store.names(""),
        "head": lambda: store.head("a"),
        "read": lambda: store.read("a"),
        "read_start": lambda: store.read_start("a", 2),
        "write": lambda: store.write("a", b"abc"),
        "create": lambda: store.create("a", b"abc"),
        "replace": lambda: store.replace("a", b"abc", expected=b"abc"),
        "download": lambda: store.download(entry, directory / "a"),
        "delete": lambda: store.delete("a"),
        "unfinished": lambda: store.remove_unfinished(""),
    }
    calls.get(method.decode(errors="replace"), calls["list"])()


def targets() -> list[Target]:
    """The one target of this module."""
    return [Target(name="reply", inputs=reply(), run=replies, codes=frozenset({DATA, CONFIG, 74, 77}))]
