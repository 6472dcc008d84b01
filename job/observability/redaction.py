"""How the credentials of the environment vanish from what a run logs, records and shows.

Redaction works on values before they are encoded: a secret is replaced inside texts only. Numbers and the names of
fields stay as they are, so that JSON stays valid and a history stays readable whatever the environment holds. What a
credential is, `job.runtime.credentials` says; what looks like a secret in the data is `job.observability.masking`'s
business.
"""

from __future__ import annotations

import base64
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, quote_plus

from job.runtime import credentials
from job.runtime.credentials import REPLACEMENT
from job.runtime.errors import words

CIRCULAR = "(circular)"

SHORTEST_SECRET = 6
SHORTEST_NUMBER = 8
"""A shorter number is not a secret: it would turn up in any text."""
SHORTEST_LINE = 16
"""A shorter line of a secret of several lines is not looked for by itself."""
WORDS = frozenset(("check", "ended", "event", "kind", "level", "outcome", "phase", "started", "time", "timestamp"))
"""Fields that hold a word of this program or a time, by which records and logs are read: it stays, even where a secret
is the same word."""
_ESCAPE = re.compile(r"%[0-9A-F]{2}")
_WORD = re.compile(r"[a-z0-9_]+|\d{4}-\d\d-\d\dT[\d:.+-]+Z?")
_PLAIN_NUMBER = re.compile(r"[+-]?[\d.,_]+(?:e[+-]?\d+)?", re.IGNORECASE)


def secret_values(environment: Mapping[str, str]) -> frozenset[str]:
    """The credentials in an environment: values of variables that hold one, and passwords and signatures in addresses.

    What is shorter than `SHORTEST_SECRET` is left out, and so is a number of less than `SHORTEST_NUMBER` digits.
    """
    values = (found for name, value in environment.items() for found in credentials.held(name, value))
    return frozenset(filter(_is_secret, values))


def _is_secret(value: str) -> bool:
    if _PLAIN_NUMBER.fullmatch(value):
        return value.isdecimal() and len(value) >= SHORTEST_NUMBER
    return len(value) >= SHORTEST_SECRET


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
        """How the secrets may stand in a text: as they are, as JSON, Python or an address quotes them, in base64; and
        the lines of one that has several. A secret may begin with another: the longest comes first."""
        pieces = {piece for secret in self.secrets for piece in _pieces(secret)}
        forms = {form for piece in pieces for form in _forms(piece)}
        return tuple(sorted(forms, key=lambda form: (-len(form), form)))

    def __call__(self, value: Any) -> Any:
        """The value without secrets and without credentials in addresses (`credentials.shown`): texts, in lists and as
        values of dictionaries at any depth.

        Numbers, booleans, None, keys that JSON has and the words of `WORDS` stay; anything else becomes its text.
        """
        return _in_texts(value, self.text)

    def known(self, value: Any) -> Any:
        """The value without secrets, and otherwise as it is: for what a run keeps of its data."""
        return _in_texts(value, self._known)

    def text(self, text: str) -> str:
        """The text without secrets and without credentials in addresses."""
        return credentials.shown(self._known(text))

    def _known(self, text: str) -> str:
        for form in self.forms:
            text = text.replace(form, REPLACEMENT)
        return text


def _in_texts(value: Any, change: Callable[[str], str], around: tuple[int, ...] = ()) -> Any:
    """Args: around: the ids of the containers that hold the value."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if not isinstance(value, dict | list | tuple):
        return change(value if isinstance(value, str) else words(value))
    if id(value) in around:
        return CIRCULAR
    around = (*around, id(value))
    if isinstance(value, dict):
        return {
            _key(name): inner if _is_word(name, inner) else _in_texts(inner, change, around)
            for name, inner in value.items()
        }
    items = (_in_texts(item, change, around) for item in value)
    return list(items) if isinstance(value, list) else tuple(items)


def _key(name: Any) -> Any:
    return name if name is None or isinstance(name, str | bool | int | float) else words(name)


def _is_word(name: Any, value: Any) -> bool:
    return name in WORDS and isinstance(value, str) and _WORD.fullmatch(value) is not None


def _pieces(secret: str) -> Iterator[str]:
    """The secret, and its lines: what libraries print is redacted line by line."""
    yield secret
    lines = [line.strip() for line in secret.splitlines()]
    if len(lines) > 1:
        yield from (line for line in lines if len(line) >= SHORTEST_LINE and not line.startswith("-----"))


def _forms(text: str) -> Iterator[str]:
    yield from (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], repr(text)[1:-1])
    data = text.encode(errors="replace")
    for quoted in (quote(data, safe=""), quote(data), quote_plus(data)):
        yield from (quoted, _ESCAPE.sub(lambda found: found[0].lower(), quoted))
    yield from (encode(data).decode().rstrip("=") for encode in (base64.b64encode, base64.urlsafe_b64encode))
