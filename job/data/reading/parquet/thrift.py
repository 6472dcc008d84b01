"""Thrift's compact protocol, as far as the numbers in the metadata of a Parquet file go.

Source: thrift/doc/specs/thrift-compact-protocol.md. Memory and time are bounded by the number of structs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

DEEPEST = 100
_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = range(14)
_NUMBERS = {_I16, _I32, _I64}
_FIXED = {_TRUE: 1, _FALSE: 1, _BYTE: 1, _DOUBLE: 8, _UUID: 16}


class TooLargeError(ValueError):
    """A file claims more than is read."""


class DamagedError(ValueError):
    """A file is not what the format says."""


class Thrift:
    """The compact protocol, with numbers, texts, structs and lists of these; other values are passed over.

    Raises IndexError where the data end.
    """

    def __init__(self, data: bytes, *, most: int) -> None:
        self._data, self._left = data, most
        self.position = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """The values of a struct, by field."""
        return {field: self._value(kind, depth + 1) for field, kind in self._fields(depth)}

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _NUMBERS:
            number = self._varint()
            return (number >> 1) ^ -(number & 1)
        if kind == _BINARY:
            return self._move(self._varint())
        if kind == _STRUCT:
            return self.struct(depth)
        if kind in _FIXED:
            return self._move(_FIXED[kind])
        if kind not in {_LIST, _SET} or depth > DEEPEST:
            raise DamagedError("its metadata have a value of an unknown kind")
        head = self._byte()
        inner = head & 15
        count = head >> 4 if head >> 4 < 15 else self._varint()  # noqa: PLR2004 - all four bits
        if inner in _FIXED:
            return self._move(_FIXED[inner] * count)
        self._left -= 0 if inner == _STRUCT else count // 8
        return [self._value(inner, depth + 1) for _ in range(count)]

    def _fields(self, depth: int) -> Iterator[tuple[int, int]]:
        """Each field's number and kind; the caller moves behind its value."""
        self._left -= 1
        if self._left < 0 or depth > DEEPEST:
            raise TooLargeError("its metadata have too many parts")
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self._varint() >> 1
            if head & 15 not in {_TRUE, _FALSE}:  # their value is the kind
                yield field, head & 15

    def _byte(self) -> int:
        byte = self._data[self.position]
        self.position += 1
        return byte

    def _move(self, count: int) -> bytes:
        start = self.position
        self.position += count
        if self.position > len(self._data):
            raise IndexError
        return self._data[start : self.position]

    def _varint(self) -> int:
        result = shift = 0
        while True:
            byte = self._byte()
            result |= (byte & 127) << shift
            if byte < 128:  # noqa: PLR2004 - the last of a number
                return result
            shift += 7
            if shift > 63:  # noqa: PLR2004 - bits
                raise DamagedError("a number of more than 64 bits")
