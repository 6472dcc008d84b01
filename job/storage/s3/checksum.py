"""Checksums that stores keep with an object, and how to compute them in parallel.

Only those of the whole object count: a composite one (`...-12`) is a checksum of the parts' checksums.
CRCs of ranges combine into the CRC of the whole; SHA values need a pass over the file.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awscrt import checksums as crt

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_COMBINE: dict[str, Callable[[int, int, int], int]] = {
    "CRC64NVME": crt.combine_crc64nvme,
    "CRC32C": crt.combine_crc32c,
    "CRC32": crt.combine_crc32,
}
_UPDATE: dict[str, Callable[[Any, int], int]] = {
    "CRC64NVME": crt.crc64nvme,
    "CRC32C": crt.crc32c,
    "CRC32": crt.crc32,
}
_BYTES = {"CRC64NVME": 8, "CRC32C": 4, "CRC32": 4}
_HASHES = ("SHA256", "SHA1")


@dataclass(frozen=True, kw_only=True)
class Checksum:
    """A checksum of a whole object: the algorithm as S3 spells it, the value in base64."""

    algorithm: str
    value: str

    def update(self, data: Any, crc: int) -> int:
        """The running CRC of a range after `data`; for a hash it stays as it is."""
        update = _UPDATE.get(self.algorithm)
        return update(data, crc) if update else crc

    def matches(self, path: Path, ranges: list[tuple[int, int]]) -> bool:
        """Whether a file has this checksum, given (CRC, size) of its ranges in order."""
        if self.algorithm in _COMBINE:
            return self.value == _in_base64(self.algorithm, _combined(self.algorithm, ranges))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, self.algorithm.lower()).digest()
        return self.value == base64.b64encode(digest).decode()


def of_whole_object(reply: Mapping[str, Any]) -> Checksum | None:
    """The checksum in a reply of HeadObject or GetObject, if it is one of the whole object.

    Where the reply has no ChecksumType, objects that were uploaded in parts (`-` in the ETag) have composite ones; only
    CRC64NVME is always of the whole. docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
    """
    in_parts = "-" in reply.get("ETag", "")
    kind = reply.get("ChecksumType", "COMPOSITE" if in_parts else "FULL_OBJECT")
    for algorithm in (*_COMBINE, *_HASHES):
        value = reply.get(f"Checksum{algorithm}")
        if value and "-" not in value and (kind == "FULL_OBJECT" or algorithm == "CRC64NVME"):
            return Checksum(algorithm=algorithm, value=value)
    return None


def upload_algorithm(client: S3Client) -> str | None:
    """The checksum that protects the body of an upload, in a signed header, as AWS's SDKs do for streams over TLS.

    Without it the signature would need its own pass over the body, which costs a third of the speed. Over TLS a CRC is
    enough against accidents; without TLS it must be a hash that cannot be forged. None where
    `AWS_REQUEST_CHECKSUM_CALCULATION=when_required` turns checksums off: then the signature covers the body.
    """
    if getattr(client.meta.config, "request_checksum_calculation", "") != "when_supported":
        return None
    return "CRC32C" if client.meta.endpoint_url.startswith("https") else "SHA256"


def algorithm_argument(client: S3Client) -> dict[str, Any]:
    """The argument that asks the store for this checksum of an object that it makes itself."""
    algorithm = upload_algorithm(client)
    return {"ChecksumAlgorithm": algorithm} if algorithm else {}


def upload_arguments(client: S3Client, blocks: Iterable[bytes]) -> dict[str, Any]:
    """The arguments that send the checksum of a body along with it."""
    algorithm = upload_algorithm(client)
    if algorithm is None:
        return {}
    if algorithm == "SHA256":
        digest = hashlib.sha256()
        for block in blocks:
            digest.update(block)
        return {"ChecksumSHA256": base64.b64encode(digest.digest()).decode()}
    crc = 0
    for block in blocks:
        crc = crt.crc32c(block, crc)
    return {"ChecksumCRC32C": _in_base64("CRC32C", crc)}


def _combined(algorithm: str, ranges: list[tuple[int, int]]) -> int:
    whole = 0
    for crc, size in ranges:
        whole = _COMBINE[algorithm](whole, crc, size)
    return whole


def _in_base64(algorithm: str, crc: int) -> str:
    return base64.b64encode(crc.to_bytes(_BYTES[algorithm], "big")).decode()
