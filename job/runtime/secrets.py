"""Which values of an environment must never be printed, by the names of their variables and by their form."""

from __future__ import annotations

from collections.abc import Mapping

SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "_KEY", "CREDENTIAL", "SIGNATURE")
NOT_SECRET = ("_ID", "_FILE", "_PATH", "TOKENIZERS_PARALLELISM")  # identifiers, and names of files
SHORTEST_SECRET = 6


def values(environment: Mapping[str, str]) -> frozenset[str]:
    """The values of all variables whose names say that they are secret, and passwords inside URLs."""
    found = set()
    for name, value in environment.items():
        if any(word in name.upper() for word in SECRET_WORDS) and not name.endswith(NOT_SECRET):
            found.add(value.strip())
        if "://" in value and "@" in value:
            user_info = value.split("://", 1)[1].rpartition("@")[0]
            found.update(part for part in (user_info, user_info.partition(":")[2]) if part)
    return frozenset(value for value in found if len(value) >= SHORTEST_SECRET)
