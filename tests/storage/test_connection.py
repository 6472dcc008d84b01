"""The standard AWS variables do what they do everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import pytest

from job.runtime.errors import ConfigError
from job.storage.open import open_store
from tests.certificates import make_certificates
from tests.servers import Seen, serve_proxy


def test_custom_ca(moto: str, s3_env: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server whose certificate a private CA signed is trusted with AWS_CA_BUNDLE, and explained without it."""
    certificates = make_certificates(tmp_path)
    headers: list[dict[str, str]] = []
    source = tmp_path / "source"
    source.write_bytes(b"x" * (20 << 20))
    with serve_proxy(moto, lambda seen: headers.append(seen.headers), tls=certificates) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        with pytest.raises(ConfigError, match="not trusted") as caught:
            open_store(f"s3://{s3_env}", denied_patience_seconds=0.2).head("key")
        assert "AWS_CA_BUNDLE" in caught.value.remedy
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificates / "ca.pem"))
        store = open_store(f"s3://{s3_env}", patience_seconds=5)
        store.write("key", b"data")
        store.upload(source, "large")
        (large,) = store.list_objects("large")
        store.download(large, tmp_path / "target")
    assert source.read_bytes() == (tmp_path / "target").read_bytes()
    assert {"UNSIGNED-PAYLOAD"} == {seen["x-amz-content-sha256"] for seen in headers if "x-amz-checksum-crc32c" in seen}


def test_proxy(moto: str, s3_env: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests go through the proxy that HTTP_PROXY names, except to hosts in NO_PROXY."""
    seen: list[Seen] = []
    with serve_proxy(moto, seen.append) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        open_store(f"s3://{s3_env}").write("key", b"data")
        assert [moto] == [request.path[: len(moto)] for request in seen]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert open_store(f"s3://{s3_env}").read("key") == b"data"
        assert len(seen) == 1


@pytest.mark.parametrize(
    ("style", "path"), [("path", "/{bucket}/key"), ("virtual", "/key")], ids=["path style", "virtual hosts"]
)
def test_addressing_style(
    moto: str, s3_env: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, style: str, path: str
) -> None:
    """`s3.addressing_style` in AWS_CONFIG_FILE decides where the bucket's name goes."""
    config = tmp_path / "config"
    config.write_text(f"[default]\ns3 =\n  addressing_style = {style}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    seen: list[Seen] = []
    with serve_proxy(moto, seen.append) as proxy:
        # A name that ends in .localhost is this machine's.
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.replace("127.0.0.1", "s3.localhost"))
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setattr("tests.servers._forward", lambda *_: (404, [("Content-Length", "0")], b""))
        assert open_store(f"s3://{s3_env}", patience_seconds=2).head("key") is None
    assert seen[0].path.endswith(path.format(bucket=s3_env))
    assert (f"{s3_env}.s3.localhost" in seen[0].headers["host"]) == (style == "virtual")


def test_requester_pays(moto: str, s3_env: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that refuses whoever does not offer to pay is read, and the offer is made only after a refusal."""
    offers: list[bool] = []

    def rule(seen: Seen) -> None:
        offers.append(seen.headers.get("x-amz-request-payer") == "requester")
        if not offers[-1]:
            seen.refuse = (403, "AccessDenied")

    boto3.client("s3").put_object(Bucket=s3_env, Key="key", Body=b"data")
    with serve_proxy(moto, rule) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        store = open_store(f"s3://{s3_env}")
        assert store.read("key") == b"data"
        assert store.read("key") == b"data"
    assert [False, True, True] == offers


@pytest.mark.parametrize(
    ("calculation", "sent"), [("when_supported", True), ("when_required", False)], ids=["checksums", "none"]
)
def test_checksums_can_be_left_out(
    moto: str, s3_env: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calculation: str, sent: bool
) -> None:
    """Uploads carry a checksum in a signed header unless AWS_REQUEST_CHECKSUM_CALCULATION=when_required."""
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", calculation)
    source = tmp_path / "source"
    source.write_bytes(b"x" * (20 << 20))
    seen: list[Seen] = []
    with serve_proxy(moto, seen.append) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        store = open_store(f"s3://{s3_env}")
        store.write("small", b"x")
        store.create("claim", b"x")
        store.upload(source, "large")
    uploads = [request.headers for request in seen if request.method == "PUT"]
    assert len(uploads) == 4
    for headers in uploads:
        assert sent == any(name.startswith("x-amz-checksum-") for name in headers)
        if sent:
            assert "x-amz-checksum-sha256" in headers["authorization"]
        else:
            assert len(headers["x-amz-content-sha256"]) == 64  # then the signature covers the body


def test_profile(s3_env: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile that does not exist is a mistake in the configuration, found at once."""
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match="nobody"):
        open_store(f"s3://{s3_env}").head("key")


@pytest.mark.parametrize("uri", ["http://host/bucket", "s3://", "relative/path", "gs://bucket", "file://host/path", ""])
def test_bad_addresses(uri: str) -> None:
    """What is no address of a store is refused with the forms that are."""
    with pytest.raises(ConfigError, match=r"Use ") as caught:
        open_store(uri)
    assert repr(uri) in str(caught.value)


def test_version(s3_env: str, tmp_path: Path) -> None:
    """In a bucket that keeps versions, an entry names one, and exactly that one is downloaded later."""
    client: Any = boto3.client("s3")
    client.put_bucket_versioning(Bucket=s3_env, VersioningConfiguration={"Status": "Enabled"})
    store = open_store(f"s3://{s3_env}")
    store.write("key", b"first")
    entry = store.head("key")
    assert entry is not None
    assert entry.version
    store.write("key", b"second")
    store.download(entry, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"first"
