"""The one place that picks an implementation of `Store` for a URI."""

from __future__ import annotations

from job.storage.base import Store
from job.storage.directory import DirectoryStore
from job.storage.uri import S3Address, parse

DENIED_PATIENCE_SECONDS = 45.0
"""How long a refusal is retried: workload identity takes a while to be ready in a new pod."""

REPLY_SECONDS = 60.0
"""How long a server may stay silent before the connection counts as dead."""


def open_store(
    uri: str,
    *,
    patience_seconds: float = 3600.0,
    denied_patience_seconds: float = DENIED_PATIENCE_SECONDS,
    reply_seconds: float = REPLY_SECONDS,
) -> Store:
    """The store that a URI names; nothing is contacted yet.

    Args:
        uri: `s3://bucket/prefix`, `file:///path` or an absolute path. The first write creates a missing directory.
        patience_seconds: how long one operation is retried through an outage, counted from its first failure.
        denied_patience_seconds: how long a refusal is retried; never longer than an outage.
        reply_seconds: how long a server may stay silent.
    """
    address = parse(uri)
    if isinstance(address, S3Address):
        from job.storage.s3.store import S3Store  # noqa: PLC0415 - boto3 takes a third of a second

        return S3Store(
            address,
            patience_seconds=patience_seconds,
            denied_patience_seconds=min(denied_patience_seconds, patience_seconds),
            reply_seconds=reply_seconds,
        )
    return DirectoryStore(address)
