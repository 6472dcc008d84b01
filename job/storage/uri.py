"""Addresses: which store a URI means, and which keys are safe to use. It opens nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from job.runtime.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class S3Address:
    """A bucket and a key or prefix in it, without a leading slash ("" is the bucket's root)."""

    bucket: str
    key: str

    @property
    def uri(self) -> str:
        """`s3://bucket/key`."""
        return f"s3://{self.bucket}/{self.key}".rstrip("/")


def parse(uri: str) -> S3Address | Path:
    """The address that a URI names: `s3://bucket/key`, `file:///path` or an absolute path.

    Raises:
        ConfigError: it is something else.
    """
    if uri.startswith("s3://"):
        return _s3(uri)
    if uri.startswith("file://"):
        return _file(uri)
    if uri.startswith("/"):
        return Path(uri)
    raise ConfigError(
        f"{uri!r} is not a valid address.", remedy="Use s3://bucket/prefix, an absolute path, or file:///path."
    )


def _s3(uri: str) -> S3Address:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise ConfigError(f"{uri!r} has no bucket name.", remedy="Use s3://bucket/prefix.")
    if key.strip("/"):
        try:
            checked_key(key.strip("/"))
        except DataError as error:
            raise ConfigError(f"{uri!r} is not a valid address: {error.message}", remedy="Correct it.") from None
    return S3Address(bucket=bucket, key=key)


def _file(uri: str) -> Path:
    parts = urlsplit(uri)
    if parts.netloc not in {"", "localhost"} or not parts.path.startswith("/"):
        raise ConfigError(f"{uri!r} is not a local file.", remedy="Use file:///absolute/path.")
    return Path(unquote(parts.path))


def checked_key(key: str) -> str:
    """The key itself, if it is also a valid relative path.

    Raises:
        DataError: it is empty or absolute, has an empty, `.` or `..` part, a backslash or a NUL.
    """
    parts = key.split("/")
    if "\\" in key or "\0" in key or any(part in {"", ".", ".."} for part in parts):
        raise DataError(
            f"The object key {key!r} is not valid: a key must be a relative path"
            " without empty, '.' or '..' parts, backslashes or NUL.",
            remedy="Rename the object.",
        )
    return key


def parents(key: str) -> list[str]:
    """Every directory above a key, nearest first: `a/b/c` gives `a/b` and `a`."""
    return [str(parent) for parent in PurePosixPath(key).parents if str(parent) != "."]
