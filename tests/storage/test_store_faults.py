"""Outages, refusals and damage between the job and its store, made by a proxy in front of a real server."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import boto3
import pytest
from structlog.testing import capture_logs

from job.runtime.errors import AccessDeniedError, DataError, JobError, StorageError
from job.storage.base import Store
from job.storage.disk import disk_errors
from job.storage.faults import ChangedError, DamagedError
from job.storage.open import open_store
from tests.servers import SECRET_KEY, Rclone, Rule, Seen, serve_proxy

MIB = 1 << 20
LARGE = 37 * MIB + 11


@pytest.fixture
def through(moto: str, s3_env: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`through(rule)`: a store in the fresh bucket behind a proxy with that rule."""
    with contextlib.ExitStack() as stack:

        def opened(rule: Rule, **options: Any) -> Store:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", stack.enter_context(serve_proxy(moto, rule)))
            return open_store(f"s3://{s3_env}/run", **{"patience_seconds": 20, **options})

        yield opened


def _retries(logs: list[Any]) -> list[Any]:
    return [entry for entry in logs if entry["event"] == "storage_retry"]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (503, "SlowDown"),
        (500, "InternalError"),
        (429, "TooManyRequests"),
        (409, "ConditionalRequestConflict"),
        (400, "ExpiredToken"),
        (403, "RequestTimeTooSkewed"),
        (400, "RequestTimeout"),
    ],
)
def test_outages_are_waited_for(through: Any, status: int, code: str) -> None:
    """A failure that time can heal is retried, and each retry is logged with what failed and until when."""

    def rule(seen: Seen) -> None:
        if seen.method == "PUT" and seen.number <= 2:
            seen.refuse = (status, code)

    store = through(rule)
    with capture_logs() as logs:
        store.write("key", b"data")
    assert store.read("key") == b"data"
    first, second = _retries(logs)
    assert {"operation", "key", "error", "tries", "next_seconds", "deadline"} <= first.keys()
    assert ("PutObject", "warning", 1, 2) == (
        first["operation"],
        first["log_level"],
        first["tries"],
        second["tries"],
    )
    assert code in first["error"]
    assert first["key"].endswith("/run/key")


def test_patience_ends(through: Any) -> None:
    """Past the patience the error names the endpoint, the bucket and the last failure."""

    def rule(seen: Seen) -> None:
        seen.refuse = (503, "SlowDown")

    store = through(rule, patience_seconds=0.5)
    with pytest.raises(StorageError, match=r"127\.0\.0\.1.*SlowDown") as caught:
        store.read("key")
    assert store.uri.split("/")[2] in str(caught.value)


def test_no_etags(through: Any) -> None:
    """A store that names no ETags copies, and an object of the expected content is replaced."""

    def rule(seen: Seen) -> None:
        seen.without = "etag"

    store = through(rule)
    store.write("key", b"data")
    store.copy("key", "copy")
    assert store.replace("copy", b"new", expected=b"other") is False
    assert store.replace("copy", b"new", expected=b"data") is True
    assert (store.read("key"), store.read("copy")) == (b"data", b"new")


def test_unreachable(s3_env: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is not there is an outage, not a missing object."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    store = open_store(f"s3://{s3_env}", patience_seconds=0.5)
    with pytest.raises(StorageError, match="EndpointConnectionError"):
        store.head("key")


def test_hang_is_noticed(through: Any) -> None:
    """A server that accepts a request and stays silent counts as an outage after the reply time."""

    def rule(seen: Seen) -> None:
        seen.hang_seconds = 30 if seen.method == "PUT" and seen.number == 1 else 0

    store = through(rule, reply_seconds=0.5)
    started = time.monotonic()
    with capture_logs() as logs:
        store.write("key", b"data")
    assert time.monotonic() - started < 10
    assert "ReadTimeoutError" in _retries(logs)[0]["error"]
    assert store.read("key") == b"data"


def test_lost_reply_of_own_create(through: Any) -> None:
    """When the reply of a successful create is lost and the retry hears that the key exists, that is a success."""

    def rule(seen: Seen) -> None:
        seen.cut = seen.method == "PUT" and seen.number == 1

    store = through(rule)
    with capture_logs() as logs:
        assert store.create("claim", b"mine") is True
    assert len(_retries(logs)) == 1
    assert store.read("claim") == b"mine"


def test_lost_reply_of_a_lost_create(through: Any) -> None:
    """When the reply was lost and the object is somebody else's, the create failed."""
    stores: list[Store] = []

    def rule(seen: Seen) -> None:
        if seen.method == "PUT" and seen.headers.get("if-none-match") and seen.number == 1:
            seen.refuse = (500, "InternalError")
            seen.before = lambda: stores[0].write("claim", b"theirs")

    stores.append(through(rule))
    assert stores[0].create("claim", b"mine") is False


@pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (400, "InvalidArgument")])
def test_a_store_that_does_not_know_if_match(through: Any, status: int, code: str) -> None:
    """What was read is compared, and replaced without the condition."""

    def rule(seen: Seen) -> None:
        if seen.method == "PUT" and seen.headers.get("if-match"):
            seen.refuse = (status, code)

    store = through(rule)
    store.write("latest", b"old")
    assert store.replace("latest", b"new", expected=b"other") is False
    assert store.replace("latest", b"new", expected=b"old") is True
    assert store.read("latest") == b"new"


@pytest.mark.parametrize("size", [1000, LARGE], ids=["small", "large"])
def test_transfers_survive_an_unreliable_network(through: Any, tmp_path: Path, size: int) -> None:
    """Every third request fails, every fourth body ends early: the files still come back whole."""

    def rule(seen: Seen) -> None:
        if seen.number % 3 == 0:
            seen.refuse = (503, "SlowDown")
        elif seen.method == "GET" and seen.number % 4 == 1:
            seen.truncate = True

    store = through(rule)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(size))
    store.upload(source, "file")
    entry = store.head("file")
    assert entry is not None
    store.download(entry, target)
    assert source.read_bytes() == target.read_bytes()


def test_a_copy_repeats_what_failed_alone(through: Any) -> None:
    """The two requests of a copy are retried each by itself: a busy store refuses one of two for long enough."""
    methods: list[str] = []

    def rule(seen: Seen) -> None:
        if seen.path.endswith("key") or "copy" in seen.path:
            methods.append(seen.method)
            if methods.count(seen.method) <= 3:
                seen.refuse = (503, "SlowDown")

    store = through(rule)
    store.write("key", b"data")
    methods.clear()
    store.copy("key", "copy")
    assert methods == ["HEAD"] * 4 + ["PUT"] * 4
    assert store.read("copy") == b"data"


def test_failed_upload_leaves_nothing(through: Any, s3_env: str, moto: str, tmp_path: Path) -> None:
    """A large upload that fails for good is aborted: no object, and no parts that cost money."""

    def rule(seen: Seen) -> None:
        if "partNumber=2" in seen.path:
            seen.refuse = (503, "SlowDown")

    source = tmp_path / "source"
    source.write_bytes(b"x" * LARGE)
    with pytest.raises(StorageError, match="UploadPart"):
        through(rule, patience_seconds=0.5).upload(source, "file")
    client = boto3.client("s3", endpoint_url=moto)
    assert "Uploads" not in client.list_multipart_uploads(Bucket=s3_env)
    assert "Contents" not in client.list_objects_v2(Bucket=s3_env)


def test_lost_upload_starts_again(through: Any, tmp_path: Path) -> None:
    """A multipart upload that the store forgot (or completed, with the reply lost) is sent again."""

    def rule(seen: Seen) -> None:
        seen.cut = seen.method == "POST" and "uploadId=" in seen.path and seen.number == 2

    source = tmp_path / "source"
    source.write_bytes(b"x" * LARGE)
    store = through(rule)
    store.upload(source, "file")
    (entry,) = store.list_objects()
    assert entry.size == LARGE


@pytest.mark.parametrize("act", ["head", "read", "list_objects", "write"])
def test_denied(through: Any, act: str) -> None:
    """A refusal is believed after the denied patience; the error says what was tried and how, never the secret."""

    def rule(seen: Seen) -> None:
        seen.refuse = (403, "AccessDenied")

    store = through(rule, denied_patience_seconds=0.5)
    arguments = {"list_objects": ("",), "write": ("key", b"x")}.get(act, ("key",))
    started = time.monotonic()
    with pytest.raises(AccessDeniedError, match="`env`") as caught:
        getattr(store, act)(*arguments)
    assert 0.4 < time.monotonic() - started < 5
    text = str(caught.value)
    assert store.uri in text
    assert "127.0.0.1" in text
    assert "s3:" in caught.value.remedy
    assert SECRET_KEY not in text


def test_denied_at_first(through: Any) -> None:
    """A refusal that ends within the denied patience, as when a workload identity warms up, is forgotten."""

    def rule(seen: Seen) -> None:
        if seen.number <= 2:
            seen.refuse = (403, "AccessDenied")

    store = through(rule)
    assert store.read("key") is None


def test_wrong_key_is_denied(rclone: Rclone, s3_env: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real server's refusal of a key pair is a refusal, with the secret in no message."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", rclone.endpoint)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret-value")
    with pytest.raises(AccessDeniedError, match="SignatureDoesNotMatch") as caught:
        open_store(f"s3://{s3_env}", denied_patience_seconds=0.3).list_objects()
    assert "another-secret-value" not in str(caught.value)


def test_no_credentials(s3_env: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials the error says where they were looked for."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessDeniedError, match=r"none found: looked at env, assume-role.*iam-role"):
        open_store(f"s3://{s3_env}", denied_patience_seconds=0.3).head("key")


def test_credentials_that_appear(s3_env: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials that become readable while they are waited for are used: the chain is asked again."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    text = "[default]\naws_access_key_id = a\naws_secret_access_key = b\n"
    threading.Timer(0.3, file.write_text, [text]).start()
    assert open_store(f"s3://{s3_env}").head("key") is None


def test_missing_bucket(s3_env: str) -> None:
    """A bucket that does not exist is the data's fault, at once, and the error names it."""
    store = open_store("s3://no-such-bucket-here/run")
    for act in (store.list_objects, lambda: store.read("key"), lambda: store.write("key", b"")):
        with pytest.raises(DataError, match="no-such-bucket-here"):
            act()


@pytest.mark.parametrize("algorithm", ["CRC32", "SHA256"])
@pytest.mark.parametrize("size", [1000, LARGE], ids=["small", "large"])
def test_damage_on_the_way(through: Any, s3_env: str, tmp_path: Path, algorithm: Any, size: int) -> None:
    """A body that does not match the checksum which the store keeps is read again; if it stays so, that is an error."""
    always = False

    def rule(seen: Seen) -> None:
        seen.flip = seen.method == "GET" and (always or seen.number == 1)

    store = through(rule)
    data = os.urandom(size)
    boto3.client("s3").put_object(Bucket=s3_env, Key="run/file", Body=data, ChecksumAlgorithm=algorithm)
    entry = store.head("file")
    assert entry is not None
    with capture_logs() as logs:
        store.download(entry, tmp_path / "target")
    assert data == (tmp_path / "target").read_bytes()
    assert [log["event"] for log in logs] == ["download_damaged"]
    always = True
    with pytest.raises(DamagedError, match=r"run/file"):
        store.download(entry, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_damage_in_a_small_read(through: Any, s3_env: str) -> None:
    """`read` notices damage as well."""

    def rule(seen: Seen) -> None:
        seen.flip = seen.method == "GET"

    store = through(rule)
    boto3.client("s3").put_object(Bucket=s3_env, Key="run/file", Body=b"data", ChecksumAlgorithm="SHA256")
    with pytest.raises(DamagedError, match="damaged"):
        store.read("file")


def test_damage_on_the_stores_disk(
    rclone: Rclone, s3_env: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An object whose bytes changed in the store since it was listed is not handed out."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", rclone.endpoint)
    boto3.client("s3").create_bucket(Bucket=s3_env)
    store = open_store(f"s3://{s3_env}")
    store.write("file", b"some data")
    (entry,) = store.list_objects()
    with (rclone.directory / s3_env / "file").open("r+b") as file:
        file.write(b"S")
    with pytest.raises(ChangedError, match="changed"):
        store.download(entry, tmp_path / "target")


def test_disk_full(s3_env: str, tmp_path: Path) -> None:
    """A file that does not fit on the disk fails before the transfer, with the path and what to do."""
    store = open_store(f"s3://{s3_env}")
    store.write("file", b"x")
    (entry,) = store.list_objects()
    huge = entry.__class__(key="file", size=1 << 60, etag=entry.etag, version=None)
    with pytest.raises(StorageError, match="do not fit") as caught:
        store.download(huge, tmp_path / "target")
    assert str(tmp_path) in str(caught.value)


def test_a_signal_ends_the_waiting(through: Any) -> None:
    """An exception out of a signal handler leaves a retry loop at once."""

    class InterruptionError(BaseException):  # like `StopRequested`
        pass

    def rule(seen: Seen) -> None:
        seen.refuse = (503, "SlowDown")

    caught: list[bool] = []

    def handler(*_: object) -> None:
        # Again and again, as `job.runtime.signals` does: a finaliser that happens to be running swallows the first.
        if not caught:
            raise InterruptionError

    store = through(rule, patience_seconds=600)
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
    started = time.monotonic()
    try:
        with pytest.raises(InterruptionError):
            store.read("key")
        caught.append(True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 5


def test_full_disk_and_refused_directory_are_explained(tmp_path: Path) -> None:
    """A directory store turns the disk's errors into ours."""
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(JobError, match=r"file/under"):
        open_store(str(file / "under")).write("key", b"x")
    full = Path("/dev/full")
    if full.exists():
        with pytest.raises(StorageError, match="full"), disk_errors(full):
            full.write_bytes(b"x")
