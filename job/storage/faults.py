"""What can be wrong with one stored object. All are data errors: exit code 65 when nobody catches them."""

from __future__ import annotations

from job.runtime.errors import DataError


class MissingError(DataError):
    """The object does not exist, or no object under the prefix does."""


class ChangedError(DataError):
    """The object is not the one that was listed: it has been replaced since."""


class DamagedError(DataError):
    """The bytes do not match the checksum or size that the store or the caller has, however often they are read."""
