"""Characters that nobody typed: control characters, text that was decoded wrongly, one character again and again."""

from __future__ import annotations

import re

SPACING = 50
RUN = 2 * SPACING
"""One character repeated this often is not text. Such a run contains a whole block between multiples of its half."""
RULES = frozenset(" \t\n\r-=_*#~.+/\\|─━═│█▒░▓·•…")
"""Characters that lines, tables and drawings are made of."""
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufff9-\ufffb\ufffe\uffff]")
REPLACEMENT = "\ufffd"
# What UTF-8 looks like when it was read as Windows-1252 or Latin-1: a lead byte and what its successors become.
_LETTERS = "\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u20ac\u2122"
_MARKS = "\u2013-\u203a"
_MOJIBAKE = (
    f"Ã[\x80-\x9f\xa1-\xac\xae-\xba\xbc-\xbf{_LETTERS}]",
    f"(?<![A-ZÀ-Þ])Ã[\xa0\xbb{_MARKS}]",  # after a capital it may end a word of Portuguese
    "Â[\xa0\xa3\xa7\xa9\xae\xb0-\xb7]",
    f"(?:â€|ðŸ)[\x80-\xbf{_LETTERS}{_MARKS}]",
    "ï»¿|ï¿½",
)
MOJIBAKE = re.compile("|".join(_MOJIBAKE))
MOJIBAKE_STARTS = ("Ã", "Â", "â€", "ðŸ", "ï»", "ï¿")
TYPED = bytes(byte for byte in range(256) if chr(byte) > "\x7f" or not CONTROL.match(chr(byte)))
"""Bytes of UTF-8 that are not a control character, or not by themselves."""
EMBEDDED = re.compile(r"data:(?:image|audio|video|application|font)/[\w.+-]+;base64,[A-Za-z0-9+/\s]{200}")


def holds_media(text: str) -> bool:
    """Whether the text holds a picture or other media as base64 (RFC 2397), which a model would learn to spell."""
    return ";base64," in text and EMBEDDED.search(text) is not None


def garbage_kind(text: str) -> str:
    """The kind of garbage in the text; empty if there is none."""
    if _controls(text):
        return "control characters"
    if not text.isascii():
        if REPLACEMENT in text:
            return "U+FFFD"
        if any(start in text for start in MOJIBAKE_STARTS) and MOJIBAKE.search(text) is not None:
            return "UTF-8 read as another encoding"
    return "one character again and again" if _repeats(text) else ""


def _controls(text: str) -> bool:
    """Whether `CONTROL` matches. Control characters beyond ASCII begin with one of two bytes."""
    encoded = text.encode("utf-8", "surrogatepass")
    if encoded.translate(None, TYPED):
        return True
    return (b"\xc2" in encoded or b"\xef" in encoded) and CONTROL.search(text) is not None


def _repeats(text: str) -> bool:
    if len(text) < RUN:
        return False
    for block, (one, other, third) in enumerate(zip(text[::SPACING], text[1::SPACING], text[2::SPACING], strict=False)):
        if one == other == third and one not in RULES:
            start = block * SPACING
            if text[start : start + SPACING] == one * SPACING:
                return True
    return False
