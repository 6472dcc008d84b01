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

from job.runtime.errors import words

REPLACEMENT = "***"
CIRCULAR = "(circular)"
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
    *("TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS", "SIGNATURE"),
    *("KEY", "APIKEY"),
)
"""Last words of the names of variables that hold a credential (AWS_SECRET_ACCESS_KEY, HF_TOKEN, WANDB_API_KEY); behind
them may stand which of several it is (HF_TOKEN_WRITE, DB_PASSWORD_2)."""
HARMLESS = frozenset(
    (
        *("BOS_TOKEN", "EOS_TOKEN", "PAD_TOKEN", "UNK_TOKEN"),
        *("CACHE_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "PARTITION_KEY", "PRIMARY_KEY", "PUBLIC_KEY", "SORT_KEY"),
    )
)
"""Names that end like a credential's: tokens of a vocabulary, the path of a file, keys that open nothing."""
SHORTEST_SECRET = 6
SHORTEST_NUMBER = 8
"""A shorter number is not a secret: it would turn up in any text."""
_CREDENTIAL = re.compile(rf"(?:.*_)?(?:{'|'.join(ENDINGS)})(?:_(?:\d+|READ|WRITE|VALUE))?")
_PLAIN_NUMBER = re.compile(r"[+-]?[\d.,_]+(?:e[+-]?\d+)?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?=://([^/?#\s]+))")  # a value may hold several URLs
_UNQUOTED = re.compile(r"://([^/?#\s:@]+:(?!//|\d+[/?#])[^\s@]*[/?#][^\s@]*)@")
"""A user and a password with a character that a URL should quote."""


def is_credential(name: str) -> bool:
    """Whether a variable of this name holds a credential."""
    name = name.upper()
    return name in CREDENTIALS or (name not in HARMLESS and _CREDENTIAL.fullmatch(name) is not None)


def secret_values(environment: Mapping[str, str]) -> frozenset[str]:
    """The credentials in an environment: values of variables that hold one, and passwords inside URLs.

    What is shorter than `SHORTEST_SECRET` is left out, and so is a number of less than `SHORTEST_NUMBER` digits.
    """
    values = {value.strip() for name, value in environment.items() if is_credential(name)}
    values.update(part for value in environment.values() for part in _passwords(value))
    return frozenset(filter(_is_secret, values))


def _is_secret(value: str) -> bool:
    if _PLAIN_NUMBER.fullmatch(value):
        return value.isdecimal() and len(value) >= SHORTEST_NUMBER
    return len(value) >= SHORTEST_SECRET


def _passwords(url: str) -> Iterator[str]:
    """`user:password` of each URL in a value, and the password alone, as written and decoded."""
    for user_info in (*(part.rpartition("@")[0] for part in _AUTHORITY.findall(url)), *_UNQUOTED.findall(url)):
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

        Numbers, booleans, None and keys that JSON has stay; anything else becomes its text.
        """
        return self._inside(value, ())

    def _inside(self, value: Any, around: tuple[int, ...]) -> Any:
        """Args: around: the ids of the containers that hold the value."""
        if value is None or isinstance(value, bool | int | float):
            return value
        if not isinstance(value, dict | list | tuple):
            return self.text(value if isinstance(value, str) else words(value))
        if id(value) in around:
            return CIRCULAR
        around = (*around, id(value))
        if isinstance(value, dict):
            return {_key(name): self._inside(inner, around) for name, inner in value.items()}
        items = (self._inside(item, around) for item in value)
        return list(items) if isinstance(value, list) else tuple(items)

    def text(self, text: str) -> str:
        """The text without secrets."""
        for form in self.forms:
            text = text.replace(form, REPLACEMENT)
        return text


def _key(name: Any) -> Any:
    return name if name is None or isinstance(name, str | bool | int | float) else words(name)


def _quoted(text: str, *, ascii_only: bool = False) -> str:
    return json.dumps(text, ensure_ascii=ascii_only)[1:-1]
