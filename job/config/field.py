"""One row of the table of variables: a setting's name, kind, default and meaning."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from job.config.value_types import Kind

PREFIX = "TUNE_"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of the table of variables."""

    name: str
    kind: Kind
    default: Any
    required: bool
    meaning: str
    fingerprint: bool

    @property
    def variable(self) -> str:
        """The environment variable's name."""
        return PREFIX + self.name.upper()

    @property
    def default_text(self) -> str:
        """The default as a user would write it, or `required` / `none`."""
        if self.required:
            return "required"
        if self.default is None or self.default == ():
            return "none"
        if isinstance(self.default, tuple):
            return ",".join(self.default)
        return str(self.default).lower() if isinstance(self.default, bool) else f"{self.default}"


def setting(kind: Kind, meaning: str, *, default: Any = dataclasses.MISSING, fingerprint: bool = False) -> Any:
    """A field of `Config`, which is a row of the table."""
    return dataclasses.field(
        default=default, metadata={"kind": kind, "meaning": meaning, "fingerprint": fingerprint}, kw_only=True
    )
