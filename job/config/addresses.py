"""Addresses in settings: their kinds, the patterns that they match, and which rule one breaks that does not.

Without look-ahead, since Helm reads the patterns too (Go's RE2).
"""

from __future__ import annotations

import re

from job.config.value_types import text

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
_PART = r"(?:[^/\\.][^/\\]*|\.[^/\\.][^/\\]*|\.\.[^/\\]+)"
S3 = rf"s3://{BUCKET}(?:/{_PART})*/?"
"""A bucket and a key or prefix, which may end with a slash."""


def broken_rule(value: str) -> str:
    """The rule that an address breaks, in a sentence; empty for one that is not of S3."""
    if not value.startswith("s3://"):
        return ""
    bucket, _, key = value.removeprefix("s3://").partition("/")
    if "@" in bucket:
        return "The name of a bucket has no user name or password before it: credentials have variables of their own."
    if not re.fullmatch(BUCKET, bucket):
        return (
            f"{bucket!r} is not the name of a bucket: it has 3 to 63 lower-case letters, digits, dots and hyphens, and "
            "begins and ends with a letter or digit."
        )
    if not re.fullmatch(rf"(?:{_PART}/)*(?:{_PART})?", key):
        return f"{key!r} is not a key: it has no empty, '.' or '..' part between its slashes, and no backslash."
    return ""


MODEL = text(
    rf"{HUB_NAME.pattern}|{S3}|/.+",
    "org/name[@revision], s3://bucket/prefix, or an absolute path",
    broken=broken_rule,
)
PLACE = text(rf"{S3}|/.+", "s3://bucket/prefix, or an absolute path", broken=broken_rule)
DATA = text(
    rf"{S3}|hf://datasets/.+|/.+",
    "s3://bucket/key, an absolute path, or hf://datasets/org/name[@revision][:split]; several separated by commas",
    broken=broken_rule,
)
TEMPLATE = text(
    rf"[a-z][\w.-]*|{S3}|/.+",
    "tokenizer, a template's name such as chatml, or the URI of a Jinja file",
    broken=broken_rule,
)
