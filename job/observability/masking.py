"""What a text should not hold: secrets, e-mail addresses, invisible characters.

It finds them by their form and reports where they are, never what they are. `masked` is for whatever shows a text,
`shown` for values that a message names. Each pattern is tried only where a few characters that it requires are found,
which costs a hundredth of the pattern itself. Credentials of this process are `job.observability.redaction`'s.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

MASK = "[masked]"
LONGEST_SHOWN = 80
"""Characters of a name or value of the data that a message shows."""
LEAST_ENTROPY = 2.8
"""Bits per character from which on a password looks random."""

EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,24}(?![\w-])")
EMAIL_OF_NO_ONE = re.compile(r"(?i)@(?:[\w-]+\.)*(?:example\.(?:com|org|net)|[\w-]+\.(?:example|test|invalid|local))$")
"""Domains that are reserved for documents and tests (RFC 2606)."""

_GITHUB = re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36,251}\b")
_AWS = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")
_STRIPE = re.compile(r"\b[sr]k_live_[A-Za-z0-9]{16,}\b")
_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:(?s:.{0,16384}?)-----END [A-Z0-9 ]{0,40}-----|(?s:.{0,16384}))"
)
SECRETS = {
    "AKIA": _AWS,
    "ASIA": _AWS,
    "PRIVATE KEY": _PRIVATE_KEY,
    "ghp_": _GITHUB,
    "gho_": _GITHUB,
    "ghu_": _GITHUB,
    "ghs_": _GITHUB,
    "ghr_": _GITHUB,
    "github_pat_": re.compile(r"\bgithub_pat_[A-Za-z0-9_]{36,251}\b"),
    "glpat-": re.compile(r"\bglpat-[A-Za-z0-9_-]{20,}"),
    "xox": re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),
    "hooks.slack.com/": re.compile(r"hooks\.slack\.com/services/[A-Za-z0-9/]{20,}"),
    "hf_": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    "sk-": re.compile(r"\bsk-(?=[A-Za-z_-]{0,100}[0-9])[A-Za-z0-9_-]{32,}"),
    "k_live_": _STRIPE,
    "AIza": re.compile(r"\bAIza[A-Za-z0-9_-]{35}"),
    "eyJ": re.compile(r"\beyJ[A-Za-z0-9_-]{8,500}+\.eyJ[A-Za-z0-9_-]{8,8000}+\.[A-Za-z0-9_-]{16,}"),
}
"""Characters that each kind of secret contains, and its pattern."""
HINTED = tuple((next(mark for mark in "_/JKIx-" if mark in hint), hint, pattern) for hint, pattern in SECRETS.items())
"""The same with the rarest of these characters: one character is found ten times as fast as several."""
HINTS = ("passw", "pwd", "secret", "api", "access", "token")
PLAIN_HINTS = tuple(hint.encode() for hint in HINTS)
NAMED = re.compile(
    r"(?i)(?:passwd|password|pwd|secret(?:[_-]?access)?(?:[_-]?key)?|api[_-]?key|access[_-]?key|token)"
    r"[\"']?[ \t]{0,4}(?::=|=>|=|:)[ \t]{0,4}[\"']?([A-Za-z0-9+/=_!@#%^&*.~-]{8,256})"
)
"""A name that announces a secret, and a value."""
IN_ADDRESS = re.compile(r"://[^\s:/@]{1,64}:([^\s:/@]{6,256})@")
"""A password inside a URL."""
PLACEHOLDER = re.compile(
    r"(?i)example|placeholder|changeme|your|redacted|xxx|\*\*\*|\.\.\.|dummy|sample|insert|test|none|null|token|password"
    r"|secret|getenv|environ|process\.env|config|self\.|request"
)
"""Words of values that are placeholders."""


def holds_secret(text: str) -> bool:
    """Whether something in the text looks like a key, a token or a password."""
    return next(_secrets(text), None) is not None


def holds_email(text: str) -> bool:
    """Whether an e-mail address is in the text, other than of a domain reserved for examples."""
    return next(_emails(text), None) is not None


def masked(text: str) -> str:
    """The text with `[masked]` for what looks like a secret or an e-mail address."""
    shown, at = [], 0
    for start, end in suspicious(text):
        if start >= at:
            shown += [text[at:start], MASK]
        at = max(at, end)
    return "".join([*shown, text[at:]])


def suspicious(text: str) -> list[tuple[int, int]]:
    """The characters [start, end) of what looks like a secret or an e-mail address, in order; some may overlap."""
    return sorted((*_secrets(text), *_emails(text)))


def shown(value: object) -> str:
    """A name or value of the data for a message: short, without secrets and without a terminal's control characters.

    Other values than texts are shown as Python writes them.
    """
    text = printable(masked((value if isinstance(value, str) else repr(value))[: 10 * LONGEST_SHOWN]))
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def printable(text: str) -> str:
    """The text with invisible characters as escapes; half a surrogate pair, too, becomes what can be encoded."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _secrets(text: str) -> Iterator[tuple[int, int]]:
    for mark, hint, pattern in HINTED:
        if mark in text and hint in text:
            yield from (found.span() for found in pattern.finditer(text))
    if "=" in text or ":" in text:
        yield from (found.span(1) for found in _named(text) if _drawn(found[1]))


def _named(text: str) -> Iterator[re.Match[str]]:
    """Values after a name that announces a secret."""
    if "://" in text:
        yield from IN_ADDRESS.finditer(text)
    plain = text.encode("utf-8", "surrogatepass").lower()
    if not any(hint in plain for hint in PLAIN_HINTS):
        return
    lower = text.lower()
    if len(lower) != len(text):  # a few letters become two
        yield from NAMED.finditer(text)
        return
    for hint in HINTS:
        at = lower.find(hint)
        while at >= 0:
            if found := NAMED.match(text, at):
                yield found
            at = lower.find(hint, at + 1)


def _emails(text: str) -> Iterator[tuple[int, int]]:
    if "@" in text:
        yield from (found.span() for found in EMAIL.finditer(text) if not EMAIL_OF_NO_ONE.search(found[0]))


def _drawn(value: str) -> bool:
    """Whether a value looks random: letters and digits, many different ones, and not a placeholder."""
    mixed = any(char.isdigit() for char in value) and any(char.isalpha() for char in value)
    return mixed and not PLACEHOLDER.search(value) and _entropy(value) >= LEAST_ENTROPY


def _entropy(value: str) -> float:
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())
