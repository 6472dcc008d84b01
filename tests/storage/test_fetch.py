"""Inputs arrive whole, once, and under the names that users know."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest

from job.runtime.errors import DataError
from job.storage.faults import ChangedError, MissingError
from job.storage.fetch import download, fetch, list_objects, resolve
from job.storage.open import open_store
from tests.servers import Rclone, Seen, serve_proxy


@pytest.fixture
def filled(s3_env: str) -> str:
    """A bucket with a few objects under `data/`."""
    store = open_store(f"s3://{s3_env}/data")
    for key in ("train.jsonl", "more/a.jsonl", "more/b.txt"):
        store.write(key, key.encode())
    boto3.client("s3").put_object(Bucket=s3_env, Key="data/folder/", Body=b"")
    return s3_env


def test_prefix(filled: str, tmp_path: Path) -> None:
    """A prefix brings all its objects under their relative keys, with the URI of each."""
    for uri in (f"s3://{filled}/data", f"s3://{filled}/data/"):
        found = fetch(uri, tmp_path / "in")
        assert ["more/a.jsonl", "more/b.txt", "train.jsonl"] == [file.key for file in found]
        for file in found:
            assert f"s3://{filled}/data/{file.key}" == file.name
            assert tmp_path / "in" / file.key == file.path
            assert file.key.encode() == file.path.read_bytes()
            assert len(file.key) == file.size
            assert file.etag


def test_object(filled: str, tmp_path: Path) -> None:
    """An object's own URI brings that object."""
    (file,) = fetch(f"s3://{filled}/data/train.jsonl", tmp_path)
    assert (f"s3://{filled}/data/train.jsonl", "train.jsonl") == (file.name, file.key)
    assert file.path.read_bytes() == b"train.jsonl"


def test_some(filled: str, tmp_path: Path) -> None:
    """Of the objects under a prefix only those are brought that are asked for."""
    resolved = resolve(f"s3://{filled}/data", patience_seconds=10)
    wanted = [entry for entry in resolved.entries if entry.key.endswith(".jsonl")]
    found = download(replace(resolved, entries=wanted), tmp_path)
    assert ["more/a.jsonl", "train.jsonl"] == [file.key for file in found]
    assert not (tmp_path / "more/b.txt").exists()


def test_list_objects(filled: str, tmp_path: Path) -> None:
    """`list_objects` names what `fetch` would download, and downloads nothing."""
    uri = f"s3://{filled}/data"
    seen = list_objects(uri)
    assert not list(tmp_path.iterdir())
    for file in fetch(uri, tmp_path):
        entry = seen.pop(file.name)
        assert (entry.key, entry.size, entry.etag, entry.version) == (file.key, file.size, file.etag, file.version)
    assert not seen
    assert list_objects(f"s3://{filled}/nothing") == {}


def test_reuse(filled: str, moto: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is here already is not downloaded again; a file that changed here or there is."""
    downloads: list[str] = []

    def rule(seen: Seen) -> None:
        if seen.method == "GET" and "list-type" not in seen.path:
            downloads.append(seen.path.rpartition("/")[2])

    with serve_proxy(moto, rule) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        uri = f"s3://{filled}/data"
        fetch(uri, tmp_path)
        assert ["a.jsonl", "b.txt", "train.jsonl"] == sorted(downloads)
        downloads.clear()
        fetch(uri, tmp_path)
        assert downloads == []

        (tmp_path / "train.jsonl").write_bytes(b"damaged, oh")
        (tmp_path / "more/b.txt").unlink()
        open_store(uri).write("more/a.jsonl", b"anew")
        found = fetch(uri, tmp_path)
        assert ["a.jsonl", "b.txt", "train.jsonl"] == sorted(downloads)
        assert [b"anew", b"more/b.txt", b"train.jsonl"] == [file.path.read_bytes() for file in found]


def test_index_damaged(filled: str, tmp_path: Path) -> None:
    """A damaged index costs a download, nothing else."""
    (file,) = fetch(f"s3://{filled}/data/train.jsonl", tmp_path)
    (index,) = (path for path in tmp_path.iterdir() if path.name.startswith("."))
    index.write_text("{")
    assert [file] == fetch(f"s3://{filled}/data/train.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        pytest.param("data/trian.jsonl", "data/train.jsonl", id="a typo in the name"),
        pytest.param("dta/train.jsonl", "data/", id="a typo in the folder"),
        pytest.param("data/more/c.jsonl", "data/more/a.jsonl", id="another file"),
    ],
)
def test_nothing_there(filled: str, tmp_path: Path, key: str, near: str) -> None:
    """When nothing is there, the error names the address and what stands near it."""
    with pytest.raises(MissingError) as caught:
        fetch(f"s3://{filled}/{key}", tmp_path)
    assert f"s3://{filled}/{key}" in str(caught.value)
    assert near in str(caught.value)


def test_missing_bucket(s3_env: str, tmp_path: Path) -> None:
    """A missing bucket is named."""
    with pytest.raises(DataError, match="no-such-bucket-here"):
        fetch("s3://no-such-bucket-here/data", tmp_path)


def test_local(tmp_path: Path) -> None:
    """Local files are used where they are; a missing one is named with its neighbours."""
    (tmp_path / "data/more").mkdir(parents=True)
    for name in ("a.jsonl", "more/b.jsonl"):
        (tmp_path / "data" / name).write_text(name)
    found = fetch(str(tmp_path / "data"), tmp_path / "unused")
    assert ["a.jsonl", "more/b.jsonl"] == [file.key for file in found]
    assert [str(tmp_path / "data" / file.key) for file in found] == [file.name for file in found]
    assert [tmp_path / "data" / file.key for file in found] == [file.path for file in found]
    (single,) = fetch(f"file://{tmp_path}/data/a.jsonl", tmp_path / "unused")
    assert (tmp_path / "data/a.jsonl", "a.jsonl") == (single.path, single.key)
    with pytest.raises(MissingError, match=r"b\.jsonl.*a\.jsonl"):
        fetch(str(tmp_path / "data/b.jsonl"), tmp_path / "unused")
    assert not (tmp_path / "unused").exists()


def test_mounted_config_map(tmp_path: Path) -> None:
    """Of a directory that Kubernetes mounts from a ConfigMap each file is seen once."""
    version = tmp_path / "..2026_11_22"
    version.mkdir()
    (version / "train.jsonl").write_text("x")
    (tmp_path / "..data").symlink_to(version.name)
    (tmp_path / "train.jsonl").symlink_to("..data/train.jsonl")
    assert ["train.jsonl"] == [file.key for file in fetch(str(tmp_path), tmp_path)]


def test_unsafe_key_in_a_listing(s3_env: str, tmp_path: Path) -> None:
    """A bucket cannot make a fetch write outside its directory."""
    boto3.client("s3").put_object(Bucket=s3_env, Key="data/../../escaped", Body=b"x")
    with pytest.raises(DataError, match="object key"):
        fetch(f"s3://{s3_env}/data", tmp_path / "in")
    assert not list(tmp_path.rglob("escaped"))


def test_key_that_is_file_and_folder(s3_env: str, tmp_path: Path) -> None:
    """Keys that no disk can hold together are refused with both names."""
    store = open_store(f"s3://{s3_env}")
    store.write("data/a", b"x")
    store.write("data/a/b", b"x")
    with pytest.raises(DataError, match=r"'a'.*'a/b'"):
        fetch(f"s3://{s3_env}/data/", tmp_path)


def _rewriting(bucket: str, times: int) -> Any:
    written = []

    def rule(seen: Seen) -> None:
        if seen.method == "GET" and "list-type" not in seen.path and len(written) < times:
            written.append(1)
            client = boto3.client("s3", endpoint_url=os.environ["UPSTREAM"])
            seen.before = lambda: client.put_object(Bucket=bucket, Key="data/train.jsonl", Body=os.urandom(20))

    return rule


def test_changed_while_fetched(filled: str, moto: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An object written between listing and download is listed again; one that never rests is an error."""
    monkeypatch.setenv("UPSTREAM", moto)
    for times, error in ((1, None), (10, ChangedError)):
        with serve_proxy(moto, _rewriting(filled, times)) as endpoint:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
            if error:
                with pytest.raises(error, match=r"train\.jsonl"):
                    fetch(f"s3://{filled}/data/train.jsonl", tmp_path / "never")
            else:
                (file,) = fetch(f"s3://{filled}/data/train.jsonl", tmp_path)
                assert file.path.read_bytes() == open_store(f"s3://{filled}").read("data/train.jsonl")


def test_many_files_through_rclone(
    rclone: Rclone, s3_env: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A prefix of many files, more than a page of a listing holds, arrives whole."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", rclone.endpoint)
    boto3.client("s3").create_bucket(Bucket=s3_env)
    folder = rclone.directory / s3_env / "data"
    folder.mkdir()
    for number in range(1100):
        (folder / f"{number:04}.txt").write_text(str(number))
    resolved = resolve(f"s3://{s3_env}/data", patience_seconds=10)
    wanted = [entry for entry in resolved.entries if int(entry.key[:4]) % 10 == 9]
    found = download(replace(resolved, entries=wanted), tmp_path)
    assert [str(number) for number in range(9, 1100, 10)] == [file.path.read_text() for file in found]
