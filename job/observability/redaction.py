"""Which values of the environment are credentials, and how they vanish from what a run logs, records and shows.

Redaction works on values before they are encoded: a secret is replaced inside texts only. Numbers and the names of
fields stay as they are, so that JSON stays valid and a history stays readable whatever the environment holds. What
looks like a secret in the data is `job.observability.masking`'s business.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

REPLACEMENT = "***"
CREDENTIALS = frozenset(
    (
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_KEY",
        "KAGGLE_KEY",
        "MYSQL_PWD",
        "PGPASSWORD",
        "SSHPASS",
    )
)
"""Variables that hold a credential although their names do not end like one."""
ENDINGS = (
    *("TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIALS"),
    *("API_KEY", "APIKEY", "ACCESS_KEY", "SECRET_KEY", "PRIVATE_KEY"),
)
"""Last words of the names of variables that hold a credential (AWS_SECRET_ACCESS_KEY, HF_TOKEN, WANDB_API_KEY)."""
HARMLESS = frozenset(("BOS_TOKEN", "EOS_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "PAD_TOKEN", "UNK_TOKEN"))
"""Variables whose names end like a credential's: tokens of a vocabulary, the path of a file."""
SHORTEST_SECRET = 6
_CREDENTIAL = re.compile(rf"(?:.*_)?(?:{'|'.join(ENDINGS)})")
_PLAIN_NUMBER = re.compile(r"[+-]?[\d.,_]+(?:e[+-]?\d+)?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?=://([^/?#\s]+))")  # a value may hold several URLs


def is_credential(name: str) -> bool:
    """Whether a variable of this name holds a credential."""
    name = name.upper()
    return name in CREDENTIALS or (name not in HARMLESS and _CREDENTIAL.fullmatch(name) is not None)


def secret_values(environment: Mapping[str, str]) -> frozenset[str]:
    """The credentials in an environment: values of variables that hold one, and passwords inside URLs.

    A plain number, or what is shorter than `SHORTEST_SECRET`, is not a secret: it would turn up in any text.
    """
    values = {value.strip() for name, value in environment.items() if is_credential(name)}
    values.update(part for value in environment.values() for part in _passwords(value))
    return frozenset(value for value in values if len(value) >= SHORTEST_SECRET and not _PLAIN_NUMBER.fullmatch(value))


def _passwords(url: str) -> Iterator[str]:
    """`user:password` of each URL in a value, and the password alone, as written and decoded."""
    for authority in _AUTHORITY.findall(url):
        user_info = authority.rpartition("@")[0]
        for part in (user_info, user_info.partition(":")[2]):
            yield from {part, unquote(part)}


@dataclass(frozen=True)
class Redactor:
    """Replaces secrets in values.

    Args:
        secrets: what must not appear.
    """

    secrets: frozenset[str] = frozenset()

    def with_secrets(self, more: Iterable[str]) -> Redactor:
        """A redactor that knows further secrets."""
        return Redactor(self.secrets.union(more))

    @functools.cached_property
    def forms(self) -> tuple[str, ...]:
        """How the secrets may stand in a text: as they are, or as JSON quotes them. A secret may begin with another:
        the longest comes first."""
        forms = {
            form for secret in self.secrets for form in (secret, _quoted(secret), _quoted(secret, ascii_only=True))
        }
        return tuple(sorted(forms, key=lambda form: (-len(form), form)))

    def __call__(self, value: Any) -> Any:
        """The value without secrets: texts, in lists and as values of dictionaries at any depth.

        Numbers, booleans, None and keys stay; anything else becomes its text, as in the JSON that is made of it.
        """
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, dict):
            return {name: self(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self(inner) for inner in value]
        if isinstance(value, tuple):
            return tuple(self(inner) for inner in value)
        return self.text(value if isinstance(value, str) else str(value))

    def text(self, text: str) -> str:
        """The text without secrets."""
        for form in self.forms:
            text = text.replace(form, REPLACEMENT)
        return text


def _quoted(text: str, *, ascii_only: bool = False) -> str:
    return json.dumps(text, ensure_ascii=ascii_only)[1:-1]
