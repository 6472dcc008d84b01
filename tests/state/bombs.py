"""Archives of a compile cache that want more than they may have, unpacked in a process with little memory and disk.

`python -m tests.state.bombs <directory>` prints one line of JSON for each: what unpacking it said, and the bytes and
files that it left.
"""

import json
import os
import resource
import struct
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from job.state.compile_cache import archive

MOST_BYTES = 64 << 20
MEMORY = 256 << 20
"""More than the process has when it begins."""
SECONDS = 60
GIB = 1 << 30
ZERO = bytes(tarfile.BLOCKSIZE)
END = ZERO * 2


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **fields: object) -> bytes:
    """One header as tarfile writes it."""
    made = tarfile.TarInfo(name)
    made.size, made.type = size, kind
    for field, value in fields.items():
        setattr(made, field, value)
    return made.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def padded(data: bytes) -> bytes:
    """The content in whole blocks."""
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


def file(name: str, content: bytes = b"x") -> bytes:
    """A regular member."""
    return header(name, len(content)) + padded(content)


def pax(*records: str, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header with these records."""
    lines = b""
    for record in records:
        length = len(record.encode()) + 3
        while len(str(length)) + len(record.encode()) + 2 != length:
            length += 1
        lines += f"{length} {record}\n".encode()
    return header("PaxHeaders/x", len(lines), kind) + padded(lines)


LABEL = file(archive.LABEL, b'{"key": "k"}')
MEGABYTE = bytes(1 << 20)
ZSTD_WINDOW = bytes.fromhex("28b52ffd00f8") + struct.pack("<I", 1 | 5 << 3)[:3] + b"hello"
"""A frame that says it needs a window of 2 TiB."""


def tars() -> Iterator[tuple[str, list[bytes], int]]:
    """A name, the tar's pieces, and how often the last of them stands there."""
    one = file("files/a")
    for key in ("GNU.sparse.size", "GNU.sparse.realsize"):
        for size in (-(10**9), 10**12):
            yield f"{key} {size}", [LABEL, pax(f"{key}={size}"), file("files/a", MEGABYTE), END], 1
    yield "sparse 0.1", [LABEL, pax("GNU.sparse.map=0,1", f"GNU.sparse.size={10**12}"), one, END], 1
    yield "sparse 1.0", [LABEL, pax("GNU.sparse.major=1", "GNU.sparse.minor=0"), file("files/a", b"9" * 512), END], 1
    yield "sparse, GNU", [LABEL, header("files/a", 1, tarfile.GNUTYPE_SPARSE) + padded(b"x"), END], 1
    yield "size in pax", [LABEL, pax(f"size={10**12}"), one, END], 1
    yield "path and size in pax", [LABEL, pax("path=files/b", f"size={10**12}"), one, END], 1
    yield "global pax", [LABEL, pax("path=files/b", kind=tarfile.XGLTYPE), one, END], 1
    yield "pax of gigabytes", [LABEL, header("x", 8 * GIB, tarfile.XHDTYPE), MEGABYTE], 3000
    yield "long name of gigabytes", [LABEL, header("x", 8 * GIB - 1, tarfile.GNUTYPE_LONGNAME), MEGABYTE], 3000
    yield "long link of gigabytes", [LABEL, header("x", 8 * GIB - 1, tarfile.GNUTYPE_LONGLINK), MEGABYTE], 3000
    yield "many pax headers", [LABEL, pax("path=files/b")], 100_000
    yield "negative size", [LABEL, header("files/a", -1), END], 1
    yield "negative size, large", [LABEL, header("files/a", -(1 << 40)), END], 1
    yield "size beyond all", [LABEL, header("files/a", 1 << 62), MEGABYTE], 100
    yield "content of gigabytes", [LABEL, header("files/a", 7 * GIB), MEGABYTE], 7000
    yield "many files of a megabyte", [LABEL, *(file(f"files/{n}", MEGABYTE) for n in range(100)), END], 1
    yield "many empty files", [LABEL, *(header(f"files/{n}") for n in range(20_000)), END], 1
    yield "the same name for ever", [LABEL, header("files/a")], 10_000_000
    yield "directories", [LABEL, header("files/d/", kind=tarfile.DIRTYPE)], 100_000
    yield "hard link", [LABEL, one, header("files/b", kind=tarfile.LNKTYPE, linkname="files/a"), END], 1
    yield "symlink", [LABEL, header("files/b", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), END], 1
    yield "a file below a file", [LABEL, one, file("files/a/b"), END], 1
    yield "a long part of a name", [LABEL, pax("path=files/" + "n" * 300), one, END], 1
    yield "a name with NUL", [LABEL, pax("path=files/a\0b"), one, END], 1
    yield "a deep name", [LABEL, pax("path=files/" + "/".join("d" * 500)), one, END], 1
    deep = [pax(f"path=files/{n}/" + "d/" * 400 + "a") + file("files/a") for n in range(2000)]
    yield "many folders", [LABEL, *deep, END], 1
    yield "no label", [one, END], 1
    yield "a label of gigabytes", [header(archive.LABEL, 7 * GIB), MEGABYTE], 7000
    yield "a label nested deep", [file(archive.LABEL, b"[" * 1_000_000), END], 1
    yield "a label with a number", [file(archive.LABEL, b"1" * 1_000_000), END], 1
    yield "a label that is a link", [header(archive.LABEL, kind=tarfile.SYMTYPE), END], 1
    yield "cut in a header", [LABEL, one[:300]], 1
    yield "cut in a file", [LABEL, header("files/a", 2000), b"x" * 512], 1
    yield "no end", [LABEL, one], 1
    yield "nothing", [b""], 1


def archives(directory: Path) -> Iterator[tuple[str, Path]]:
    """Each as a compressed file."""
    path = directory / "archive"
    for name, (*first, last), times in tars():
        yield name, _written(path, first, last, times)
    for name, data in {"window": ZSTD_WINDOW, "no zstd": b"hello", "empty": b""}.items():
        path.write_bytes(data)
        yield name, path


def _written(path: Path, first: list[bytes], last: bytes, times: int) -> Path:
    """Pieces that are repeated are compressed once: a stream may consist of several frames."""
    at_once = max(1, (8 << 20) // max(1, len(last)))
    whole, rest = divmod(times, at_once)
    parts = [(b"".join(first), 1), (last * at_once, whole), (last * rest, 1)]
    with path.open("wb") as file:
        for data, count in parts:
            if data and count:
                file.write(pa.compress(data, "zstd", asbytes=True) * count)
    return path


def limit() -> None:
    """Give this process little more memory than it has, and no large files."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES + (1 << 20),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def main(directory: Path) -> None:
    """Unpack each, and say what came of it."""
    pa.set_memory_pool(pa.system_memory_pool())
    made = [
        (name, path.rename(directory / f"archive-{number}")) for number, (name, path) in enumerate(archives(directory))
    ]
    limit()
    for number, (name, path) in enumerate(made):
        target = directory / f"files-{number}"
        try:
            archive.unpack(path, target, most_bytes=MOST_BYTES)
            said = "unpacked"
        except (ValueError, OSError) as error:
            said = f"{type(error).__name__}: {error}"
        found = [Path(folder, file) for folder, _, files in os.walk(target) for file in files]
        facts = {"name": name, "said": said, "files": len(found), "bytes": sum(f.lstat().st_size for f in found)}
        print(json.dumps(facts), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
