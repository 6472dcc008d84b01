"""The header of a safetensors file, believed only where it describes the file that it heads.

Format: 8 bytes of little-endian length, that much JSON, the data (https://github.com/huggingface/safetensors#format).
The library itself checks the same when the weights are loaded; here it is known before they are downloaded.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from job.inputs.model_files import COPY_AGAIN, json_object
from job.inputs.safetensors_stub import LENGTH_BYTES, LONGEST_HEADER
from job.runtime.errors import DataError

_TYPES = {
    64: ("F64", "I64", "U64", "C64"),
    32: ("F32", "I32", "U32"),
    16: ("F16", "BF16", "I16", "U16"),
    8: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    6: ("F6_E2M3", "F6_E3M2"),
    4: ("F4",),
}
BITS = {name: bits for bits, names in _TYPES.items() for name in names}
"""Bits of an element by the name of its type."""
DIMENSIONS = 16
"""More than torch's tensors of any model have."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor as a file stores it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Of its bytes, counted from the end of the header."""
    end: int


def read_header(file: Path, model: str) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
        DataError: the header is not one of safetensors, or does not describe a file of this size.
    """
    what = f"{file.name} of {model}"
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(LENGTH_BYTES).ljust(LENGTH_BYTES, b"\0"))[0]
        if length > min(size - LENGTH_BYTES, LONGEST_HEADER):
            raise DataError(f"{what} is damaged: its header does not fit the file.", remedy=COPY_AGAIN)
        header = json_object(stream.read(length), f"The header of {what}")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry, what) for name, entry in header.items()}
    end = _check_places(tensors, what)
    if LENGTH_BYTES + length + end != size:
        raise DataError(f"{what} is damaged: {size} bytes, {LENGTH_BYTES + length + end} expected.", remedy=COPY_AGAIN)
    return tensors


def _tensor(name: str, entry: Any, what: str) -> Tensor:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, place = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _damaged(name, what, "its dtype is not one that safetensors have")
    if not (_counts(shape) and len(shape) <= DIMENSIONS and _counts(place) and len(place) == 2):  # noqa: PLR2004
        raise _damaged(name, what, "its shape and data_offsets are not lists of numbers")
    start, end = place
    if math.prod(shape) * BITS[dtype] != 8 * (end - start):
        raise _damaged(name, what, f"{math.prod(shape):,} elements of {dtype} are not {end - start:,} bytes")
    return Tensor(dtype=dtype, shape=tuple(shape), start=start, end=end)


def _counts(values: Any) -> TypeGuard[list[int]]:
    """Whether this is a list of whole numbers, none negative."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_places(tensors: dict[str, Tensor], what: str) -> int:
    """Where the last tensor ends. Raises DataError where two overlap, or bytes between them belong to none."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            raise _damaged(name, what, f"its bytes begin at {tensor.start:,}, and those before it end at {end:,}")
        end = tensor.end
    return end


def _damaged(name: str, what: str, why: str) -> DataError:
    return DataError(f"The header of {what} is damaged: {name!r}: {why}.", remedy=COPY_AGAIN)
