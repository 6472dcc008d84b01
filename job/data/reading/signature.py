"""A file's first bytes -> what it really contains, where that is not what its name says.

A decoder's own error says where it stopped, seldom why: gzip data that is read as text "is not UTF-8". So the first
bytes are looked at before a decoder is asked. Knows bytes and the suffixes of file types (`job.data.reading.files`);
nothing of rows.

Sources: the formats' own specifications (RFC 1952 gzip, RFC 8878 zstd, APPNOTE.TXT zip, parquet-format, Avro, ORC,
SQLite's file format, NEP 1, POSIX pax), the first bytes that `file` knows (magic(5)), RFC 4627 section 3 for encodings.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from job.runtime.errors import DataError

HEAD = 512
"""Bytes that are looked at; a tar archive has its mark at 257."""
BOM = b"\xef\xbb\xbf"

CODECS = frozenset({".gz", ".zst"})
JSON = frozenset({".json", ".jsonl", ".ndjson"})

CONVERT = "Convert it to Parquet or JSON Lines."
DECOMPRESS = "Decompress it, and upload it as it is, or compressed as .gz or .zst."
DOCUMENT = "Write its text into rows: this job reads JSON, CSV and Parquet."
UNPACK = "Unpack it, and upload the files inside."
DOWNLOAD = "Download the file again: most often this is an error page, or a page that shows the file."
DECRYPT = "Upload it decrypted."
DATASET = "Name a dataset, not a model."
UPLOAD = "Upload the file again, or convert it to Parquet or JSON Lines."
UTF_8 = "Save the file as UTF-8."
POINTER = "Upload the file itself: `git lfs pull` (or `git annex get`, `git xet`) puts it in the pointer's place."
CONTENT_ENCODING = "An S3 object with `Content-Encoding: gzip` is stored compressed, so its name needs .gz, too."


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What a file contains, by its first bytes."""

    what: str
    """In words, for after "is"."""
    remedy: str = ""
    suffix: str = ""
    """The suffix of files of this kind, if they are read."""
    instead_of: str = ""
    """What it should be, if that does not follow from the name."""


GZIP = Contents(what="gzip data", suffix=".gz")
ZSTD = Contents(what="zstd data", suffix=".zst")
PARQUET = Contents(what="Parquet", suffix=".parquet")
OFFICE = Contents(what="an Office document", remedy="Save a sheet as CSV in UTF-8, and write a text into rows.")
EXPECTED = {
    ".gz": "gzip data",
    ".zst": "zstd data",
    ".parquet": "Parquet",
    ".jsonl": "JSON Lines",
    ".ndjson": "JSON Lines",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "TSV",
}
"""What a file with this suffix contains, in words."""

_MARKS: tuple[tuple[bytes, Contents], ...] = (
    (rb"\x1f\x8b", GZIP),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", ZSTD),  # or a skippable frame: pzstd and seekable files
    (rb'PAR1(?![\w ,;\t\r\n"])', PARQUET),  # not a table with a column of this name
    (rb"PARE[\x15\x19]", Contents(what="encrypted Parquet", remedy=DECRYPT)),
    (rb"BZh[1-9]1AY&SY", Contents(what="bzip2 data", remedy=DECOMPRESS)),
    (rb"\xfd7zXZ\0", Contents(what="xz data", remedy=DECOMPRESS)),
    (rb"\x5d\0\0", Contents(what="LZMA data", remedy=DECOMPRESS)),
    (rb"\x04\x22\x4d\x18", Contents(what="LZ4 data", remedy=DECOMPRESS)),
    (rb"\xff\x06\0\0sNaPpY", Contents(what="Snappy data", remedy=DECOMPRESS)),
    (rb"\x1f\x9d", Contents(what="data of `compress`", remedy=DECOMPRESS)),
    (rb"7z\xbc\xaf\x27\x1c", Contents(what="a 7z archive", remedy=UNPACK)),
    (rb"Rar!\x1a\x07", Contents(what="a RAR archive", remedy=UNPACK)),
    (rb".{257}ustar[\0 ]", Contents(what="a tar archive", remedy=UNPACK)),
    (rb"PK\x03\x04.*(?:xl/|word/|ppt/|\[Content_Types\]|opendocument)", OFFICE),
    (rb"PK\x03\x04.*\.npy", Contents(what="NumPy arrays (.npz)", remedy=CONVERT)),
    (rb"PK\x03\x04.*data\.pkl", Contents(what="a file of torch.save", remedy=CONVERT)),
    (rb"PK\x03\x04", Contents(what="a ZIP archive", remedy=UNPACK)),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", OFFICE),
    (rb"ARROW1\0|\xff\xff\xff\xff", Contents(what="Arrow", remedy=CONVERT)),
    (rb"ORC\n?[\0-\x08\x0e-\x1f\x80-\xff]", Contents(what="ORC", remedy=CONVERT)),
    (rb"Obj\x01", Contents(what="Avro", remedy=CONVERT)),
    (rb"SQLite format 3\0", Contents(what="an SQLite database", remedy=CONVERT)),
    (rb"\x89HDF\r\n", Contents(what="HDF5", remedy=CONVERT)),
    (rb"\x93NUMPY", Contents(what="a NumPy array", remedy=CONVERT)),
    (rb"\x80[\x02-\x05]", Contents(what="a Python pickle", remedy=CONVERT)),
    (rb'[^\0]{1,3}\0{5,7}\{"|GGUF[\x01-\x09]', Contents(what="the weights of a model", remedy=DATASET)),
    (rb"%PDF-|\{\\rtf", Contents(what="a document (PDF or RTF)", remedy=DOCUMENT)),
    (rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP", Contents(what="an image", remedy=DOCUMENT)),
    (rb"RIFF....|ID3[\x02-\x04]|OggS\0|\0\0\0.ftyp", Contents(what="sound or video", remedy=DOCUMENT)),
    (rb"\x7fELF", Contents(what="a program", remedy=DOCUMENT)),
    (rb"-----BEGIN PGP|age-encryption\.org/", Contents(what="encrypted data", remedy=DECRYPT)),
    (rb"version https://git-lfs\.github\.com/", Contents(what="a Git LFS pointer", remedy=POINTER)),
    (rb"# xet version", Contents(what="a Git Xet pointer", remedy=POINTER)),
    (rb"(?:\.\./)*(?:\.git|)/?annex/objects/", Contents(what="a git-annex pointer", remedy=POINTER)),
    (rb"Found\. Redirecting to |Entry not found", Contents(what="an error message of the hub", remedy=DOWNLOAD)),
)
"""Patterns of first bytes; the first that matches decides."""
_TEXTS: tuple[tuple[bytes, Contents], ...] = (
    (rb"(?i:<!doctype\s+html|<html|<head|<body)", Contents(what="a web page (HTML)", remedy=DOWNLOAD)),
    (rb"(?i:<\?xml|<error>)", Contents(what="XML", remedy=f"{CONVERT} {DOWNLOAD}")),
)
_YAML = Contents(what="YAML", remedy=CONVERT)
_CELL = rb'(?:"[^"\r\n]*"|[A-Za-z_][\w .-]*)'
_HEADER = _CELL + rb"([,;\t])" + _CELL + rb"(?:\1" + _CELL + rb")*\s*(?:\r|\n|$)"
_CONTROLS = bytes({*range(0x20), 0x7F} - {*b"\t\n\r\f\b\x1b"})


def check_contents(name: str, head: bytes, suffix: str, *, within: str = "") -> None:
    """Raise DataError if the first bytes are not those of a file that the suffix promises.

    Args:
        name: the file as the user knows it.
        head: at most the first `HEAD` bytes; an empty file is not judged here.
        suffix: one of `EXPECTED`. Of a compressed file, ask first for the compression, then for what is inside.
        within: the suffix of the compression that the bytes were taken out of.
    """
    found = _contents(head, suffix) if head else None
    if found is None or found.suffix == suffix:
        return
    inside = f" inside {EXPECTED[within]}" if within else ""
    raise DataError(
        f"{name} is {found.what}{inside}, not {found.instead_of or EXPECTED[suffix]}.",
        remedy=found.remedy or _rename(PurePosixPath(name).name, found.suffix, suffix, within),
    )


def _rename(base: str, right: str, wrong: str, within: str) -> str:
    """The remedy for a file of a kind that is read, under another name."""
    if right in CODECS and within:
        return "It is compressed twice: compress it once."
    if right in CODECS and wrong not in CODECS:
        return f"Rename it to {base}{right}. {CONTENT_ENCODING}"
    return f"Rename it to {base[: len(base) - len(within) - len(wrong)]}{right}{within}."


def _contents(head: bytes, suffix: str) -> Contents | None:
    """What the file contains; None if nothing speaks against the suffix."""
    text = head.removeprefix(BOM).lstrip()
    if known := _matching(_MARKS, head) or _not_text(head) or _matching(_TEXTS, text):
        return known
    if suffix in CODECS:
        return Contents(what="text")
    if re.match(rb'\[?\s*\{\s*["}]', text):
        right = ".json" if text.startswith(b"[") else ".jsonl"
        return None if suffix in JSON else Contents(what="JSON", suffix=right)
    if suffix == ".parquet":
        return Contents(what="text", remedy="Upload the file again, or rename it to what it is.")
    return _other_than_json(text) if suffix in JSON else None


def _matching(kinds: tuple[tuple[bytes, Contents], ...], head: bytes) -> Contents | None:
    return next((contents for pattern, contents in kinds if re.match(pattern, head, re.DOTALL)), None)


def _not_text(head: bytes) -> Contents | None:
    """Text of two or four bytes for each character, with or without a byte-order mark; or no text at all."""
    start = head[:4]
    zeros = [byte == 0 for byte in start]
    if start in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") or zeros in ([False, True, True, True], [True, True, True, False]):
        return Contents(what="UTF-32", remedy=UTF_8, instead_of="UTF-8")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or zeros in ([False, True, False, True], [True, False, True, False]):
        return Contents(what="UTF-16", remedy=UTF_8, instead_of="UTF-8")
    if not head.strip(b"\0"):
        return Contents(what="nothing but zero bytes", remedy="Upload the file again: it was not written completely.")
    controls = len(head) - len(head.translate(None, _CONTROLS))
    if any(zeros) or (controls > len(head) // 20 and not _is_utf8(head)):
        return Contents(what="binary data of an unknown kind", remedy=UPLOAD)
    return None


def _other_than_json(text: bytes) -> Contents | None:
    """Tables and YAML, where JSON should be."""
    first = text.partition(b"\n")[0]
    if re.match(rb"%YAML|---\s|- +[\w\"']+:", text):
        return _YAML
    if re.match(_HEADER, text) and not _is_json(first):
        return Contents(what="a table of cells", suffix=".tsv" if b"\t" in first else ".csv")
    return None


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut off
    except UnicodeDecodeError:
        return False
    return True


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
