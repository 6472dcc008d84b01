"""Every store keeps the same promises: moto's S3, rclone's S3 and a directory."""

from __future__ import annotations

import hashlib
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from job.runtime.errors import DataError
from job.storage.base import Entry, Store
from job.storage.faults import ChangedError, DamagedError, MissingError
from job.storage.open import open_store
from job.storage.uri import checked_key
from tests.servers import Rclone

MIB = 1 << 20
LARGE = 37 * MIB + 11  # more than one part and more than one range, neither a multiple


@pytest.fixture(params=["moto", "rclone", "directory"])
def store(
    request: pytest.FixtureRequest, s3_env: str, rclone: Rclone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Store:
    if request.param == "directory":
        return open_store(str(tmp_path / "store"))
    if request.param == "rclone":
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", rclone.endpoint)
        boto3.client("s3").create_bucket(Bucket=s3_env)
    return open_store(f"s3://{s3_env}/some/prefix", patience_seconds=5)


@pytest.fixture(params=["moto", "directory"])
def conditional(request: pytest.FixtureRequest, s3_env: str, tmp_path: Path) -> Store:
    """The stores that honour conditional writes."""
    uri = str(tmp_path / "store") if request.param == "directory" else f"s3://{s3_env}/some/prefix"
    return open_store(uri, patience_seconds=5)


def _large(path: Path) -> Path:
    block = hashlib.sha256(b"seed").digest() * (MIB // 32)
    with path.open("wb") as file:
        for number in range(LARGE // MIB):
            file.write(number.to_bytes(4, "big") + block[4:])
        file.write(b"z" * (LARGE % MIB))
    return path


def test_written_is_read(store: Store) -> None:
    """What was written last is read back, also empty and also with awkward keys."""
    for key in ("a", "deep/er/b.json", "with space/+&%25ü=?#.txt", "empty"):
        data = b"" if key == "empty" else key.encode()
        store.write(key, b"old content, longer than the new one")
        store.write(key, data)
        assert data == store.read(key)
        found = store.head(key)
        assert found is not None
        assert (key, len(data)) == (found.key, found.size)


def test_the_beginning_is_read(store: Store) -> None:
    """The first bytes of an object can be read without the rest; of one that is not there, None."""
    store.write("a", b"0123456789")
    assert store.read_start("a", 4) == b"0123"
    assert store.read_start("a", 100) == b"0123456789"
    assert store.read_start("b", 4) is None


def test_absent(store: Store) -> None:
    """What is not there reads as None, lists as nothing, and is deleted without complaint."""
    assert store.read("nothing") is None
    assert store.head("nothing") is None
    assert store.list_objects("nothing/") == []
    store.delete("nothing")


def test_entries(store: Store) -> None:
    """A listing has every object below the prefix and none else, sorted by key, as `head` describes them."""
    for key in ("b/2", "a", "b/1", "b/c/3", "bb"):
        store.write(key, key.encode())
    assert ["a", "b/1", "b/2", "b/c/3", "bb"] == [entry.key for entry in store.list_objects()]
    assert ["b/1", "b/2", "b/c/3"] == [entry.key for entry in store.list_objects("b/")]
    assert ["b/1", "b/2", "b/c/3", "bb"] == [entry.key for entry in store.list_objects("b")]
    assert store.list_objects("b/") == [store.head(key) for key in ("b/1", "b/2", "b/c/3")]


def test_delete(store: Store) -> None:
    """A deleted object is gone, its neighbours stay."""
    store.write("dir/a", b"1")
    store.write("dir/b", b"2")
    store.delete("dir/a")
    store.delete("dir/a")
    assert ["dir/b"] == [entry.key for entry in store.list_objects()]
    store.delete("dir/b")
    assert store.list_objects() == []
    store.write("dir/c", b"3")
    assert store.read("dir/c") == b"3"


@pytest.mark.parametrize("size", [0, 10, 20 * MIB, LARGE], ids=["empty", "small", "medium", "large"])
def test_files_come_back(store: Store, tmp_path: Path, size: int) -> None:
    """An uploaded file comes back byte for byte, with the mode that the umask gives, and nothing beside it."""
    source, target = tmp_path / "source", tmp_path / "down" / "er" / "target"
    _large(source) if size == LARGE else source.write_bytes(b"x" * size)
    expected = hashlib.sha256(source.read_bytes()).hexdigest()
    store.upload(source, "weights/file", sha256=expected)
    entry = store.head("weights/file")
    assert entry is not None
    assert size == entry.size
    store.download(entry, target)
    assert expected == hashlib.sha256(target.read_bytes()).hexdigest()
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(plain.stat().st_mode) == stat.S_IMODE(target.stat().st_mode)
    assert [target] == list(target.parent.iterdir())


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_wrong_hash_is_not_uploaded(store: Store, tmp_path: Path, large: bool) -> None:
    """A file that does not have the hash it should have never becomes an object."""
    source = tmp_path / "source"
    _large(source) if large else source.write_bytes(b"x")
    with pytest.raises(DamagedError, match="SHA-256"):
        store.upload(source, "file", sha256="0" * 64)
    assert store.head("file") is None


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_changed_object_is_noticed(store: Store, tmp_path: Path, large: bool) -> None:
    """An object written again since it was listed is not taken for the listed one, even of equal size."""
    source = tmp_path / "source"
    _large(source) if large else source.write_bytes(b"one")
    store.upload(source, "file")
    (entry,) = store.list_objects()
    with source.open("r+b") as file:
        file.write(b"two")
    store.upload(source, "file")
    with pytest.raises(ChangedError, match="changed"):
        store.download(entry, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_vanished_object_is_named(store: Store, tmp_path: Path) -> None:
    """Downloading an object that is gone says so."""
    entry = Entry(key="gone-file", size=3, etag=None, version=None)
    with pytest.raises(MissingError, match="gone-file"):
        store.download(entry, tmp_path / "target")


@pytest.mark.parametrize("large", [False, True])
def test_copy(store: Store, tmp_path: Path, large: bool) -> None:
    """The copy has all bytes and replaces what was there; without a source there is an error that names it."""
    source = _large(tmp_path / "source") if large else tmp_path / "source"
    if not large:
        source.write_bytes(b"content")
    store.upload(source, "results/file")
    store.write("file", b"older")
    store.copy("results/file", "file")
    assert store.read("file") == source.read_bytes() == store.read("results/file")
    with pytest.raises(MissingError, match="gone-file"):
        store.copy("gone-file", "file")


@pytest.mark.parametrize("key", ["../a", "a/../b", "/a", "a//b", "a\\b", "a\0b", "", ".", "a/"])
def test_unsafe_keys_are_refused(key: str, tmp_path: Path) -> None:
    """A key that could leave the directory it belongs to is refused wherever it appears."""
    store = open_store(str(tmp_path))
    for act in (store.head, store.read, store.delete):
        with pytest.raises(DataError, match="object key"):
            act(key)
    with pytest.raises(DataError, match="object key"):
        store.write(key, b"")
    with pytest.raises(DataError, match="object key"):
        checked_key(key)


def test_create_once(conditional: Store) -> None:
    """The first creator wins, the second learns of it, the content stays the first's; after a delete it starts over."""
    assert conditional.create("claims/1", b"first") is True
    assert conditional.create("claims/1", b"second") is False
    assert conditional.create("claims/1", b"first") is False
    assert conditional.read("claims/1") == b"first"
    assert [entry.key for entry in conditional.list_objects()] == ["claims/1"]


def test_replace_what_was_read(conditional: Store) -> None:
    """An object is replaced if it still is what was read, once; not after a change, and not where there is none."""
    assert conditional.replace("latest", b"new", expected=b"old") is False
    assert conditional.read("latest") is None
    conditional.write("latest", b"old")
    assert conditional.replace("latest", b"new", expected=b"other") is False
    assert conditional.replace("latest", b"new", expected=b"old") is True
    assert conditional.replace("latest", b"newer", expected=b"old") is False
    assert conditional.read("latest") == b"new"


def test_create_race(conditional: Store) -> None:
    """Of several creators at once exactly one wins, and what is stored is its content."""
    writers = 4
    for number in range(8):
        start = threading.Barrier(writers)

        def race(writer: int, start: threading.Barrier = start, number: int = number) -> bool:
            start.wait()
            return conditional.create(f"race/{number}", f"writer {writer}".encode())

        with ThreadPoolExecutor(writers) as pool:
            wins = list(pool.map(race, range(writers)))
        assert sum(wins) == 1
        assert f"writer {wins.index(True)}".encode() == conditional.read(f"race/{number}")
