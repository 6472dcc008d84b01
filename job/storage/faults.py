"""What can be wrong with one stored object. All are the data's fault: exit code 65 when nobody catches them."""

from __future__ import annotations

from job.runtime.errors import DataError


class MissingError(DataError):
    """The object, or all of what was asked for, is not there."""


class ChangedError(DataError):
    """The object is not the one that was listed: somebody wrote it in between."""


class DamagedError(DataError):
    """The bytes do not match the checksum or size that the store or the caller knows, however often they are read."""
