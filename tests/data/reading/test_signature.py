"""A file that is not what its name says is named for what it is, with the remedy that helps."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import feather, orc
from safetensors.numpy import save

from job.data.reading.files import read_rows
from job.data.reading.signature import EXPECTED, check_contents
from job.runtime.errors import DataError
from tests import corpus
from tests.corpus import QUESTIONS, lines, parquet

ROWS = lines(QUESTIONS)
TABLE = pa.Table.from_pylist(QUESTIONS)
CSV = b'question,answer\n"a, b",c\n'


def zipped(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return out.getvalue()


def tarred() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("a.jsonl")
        member.size = len(ROWS)
        archive.addfile(member, io.BytesIO(ROWS))
    return out.getvalue()


def written(write: object, **more: object) -> bytes:
    out = io.BytesIO()
    write(TABLE, out, **more)  # type: ignore[operator]
    return out.getvalue()


def database(directory: Path) -> bytes:
    path = directory / "a.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("create table a (b)")
    connection.close()
    return path.read_bytes()


def array() -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros(3))
    return out.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4915\nsize 261136\n"
CASES = [
    ("a.jsonl", gzip.compress(ROWS), "is gzip data, not JSON Lines", "Rename it to a.jsonl.gz. An S3 object with"),
    ("a.csv", zstandard.compress(CSV), "is zstd data, not CSV", "Rename it to a.csv.zst."),
    ("a.json.gz", zstandard.compress(b"[]"), "is zstd data, not gzip data", "Rename it to a.json.zst."),
    ("a.jsonl.gz", gzip.compress(gzip.compress(ROWS)), "gzip data inside gzip data", "It is compressed twice"),
    ("a.jsonl.gz", gzip.compress(tarred()), "is a tar archive inside gzip data", "Unpack it"),
    ("a.jsonl.gz", gzip.compress(parquet(QUESTIONS)), "is Parquet inside gzip data", "Rename it to a.parquet.gz."),
    ("a.jsonl.gz", ROWS, "is text, not gzip data", "Rename it to a.jsonl."),
    ("a.jsonl", bz2.compress(ROWS), "is bzip2 data", "Decompress it"),
    ("a.jsonl", lzma.compress(ROWS), "is xz data", "Decompress it"),
    ("a.jsonl", pa.compress(ROWS, "lz4", asbytes=True), "is LZ4 data", "Decompress it"),
    ("a.jsonl", zipped("a.jsonl"), "is a ZIP archive", "Unpack it"),
    ("a.csv", zipped("[Content_Types].xml", "xl/workbook.xml"), "is an Office document", "Save a sheet as CSV"),
    ("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "is an Office document", "Save a sheet as CSV"),
    ("a.parquet", zipped("a/data.pkl"), "is a file of torch.save", "Convert it"),
    ("a.jsonl", parquet(QUESTIONS), "is Parquet, not JSON Lines", "Rename it to a.parquet."),
    ("a.parquet", written(feather.write_feather), "is Arrow, not Parquet", "Convert it"),
    ("a.parquet", written(orc.write_table), "is ORC, not Parquet", "Convert it"),
    ("a.parquet", written(lambda table, out: pickle.dump(table.to_pylist(), out)), "is a Python pickle", "Convert it"),
    ("a.json", array(), "is a NumPy array", "Convert it"),
    ("a.parquet", save({"a": np.zeros(3)}), "is the weights of a model", "Name a dataset"),
    ("a.parquet", ROWS, "is JSON, not Parquet", "Rename it to a.jsonl."),
    ("a.parquet", CSV, "is text, not Parquet", "Upload the file again, or rename it"),
    ("a.csv", json.dumps(QUESTIONS).encode(), "is JSON, not CSV", "Rename it to a.json."),
    ("a.jsonl", CSV, "is a table of cells, not JSON Lines", "Rename it to a.csv."),
    ("a.jsonl", b"question\tanswer\na\tb\n", "is a table of cells", "Rename it to a.tsv."),
    ("a.jsonl", b"- question: a\n  answer: b\n", "is YAML", "Convert it"),
    ("a.csv", b"<!DOCTYPE html>\n<html>", "is a web page (HTML), not CSV", "Download the file again"),
    ("a.json", b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code>', "is XML", "Convert it"),
    ("a.jsonl", LFS, "is a Git LFS pointer", "Upload the file itself"),
    ("a.parquet", LFS, "is a Git LFS pointer, not Parquet", "Upload the file itself"),
    ("a.jsonl.gz", LFS, "is a Git LFS pointer, not gzip data", "Upload the file itself"),
    ("a.jsonl", b"../../.git/annex/objects/Jx/4f/SHA256E-s9--1f.jsonl", "is a git-annex pointer", "Upload the file"),
    ("a.jsonl", b"/annex/objects/SHA256E-s9--1f.jsonl\n", "is a git-annex pointer", "Upload the file itself"),
    ("a.jsonl", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "is a document (PDF or RTF)", "Write its text into rows"),
    ("a.jsonl", ROWS.decode().encode("utf-16-be"), "is UTF-16, not UTF-8", "Save the file as UTF-8"),
    ("a.csv", CSV.decode().encode("utf-32-le"), "is UTF-32, not UTF-8", "Save the file as UTF-8"),
    ("a.jsonl", bytes(700), "is nothing but zero bytes", "Upload the file again"),
    ("a.jsonl", np.random.default_rng(0).bytes(700), "is binary data of an unknown kind", "Upload the file again"),
]


@pytest.mark.parametrize(("name", "content", "says", "remedy"), CASES, ids=[f"{one[0]} {one[2]}" for one in CASES])
def test_the_first_bytes_decide(name: str, content: bytes, says: str, remedy: str, tmp_path: Path) -> None:
    """What a file is, is said before any decoder's error, and the remedy fits it."""
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(name, tmp_path / "file"))
    assert says in caught.value.message
    assert caught.value.remedy.startswith(remedy)


def test_a_database_is_named(tmp_path: Path) -> None:
    """An SQLite file is no table of text."""
    with pytest.raises(DataError, match="is an SQLite database, not CSV"):
        check_contents("a.csv", database(tmp_path)[:512], ".csv")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"ORCID,name\n1,a\n"),
        ("a.csv", b"PAR1,PAR2\n1,2\n"),
        ("a.csv", b"src,ftype\n1,2\n"),
        ("a.csv", b"ID3,GIF8\n1,2\n"),
        ("a.csv", b"---,- a:\n1,2\n"),
        ("a.csv", "größe,\x1b\n".encode("latin-1")),
        ("a.jsonl", b'"a, b"\n'),
        ("a.jsonl", b"\xef\xbb\xbf \n{}\n"),
        ("a.jsonl", b"nonsense"),
        ("a.jsonl", b'{"text": "\\u0000"}\n'),
        ("a.parquet", b"PAR1"),
        ("a.gz", b"\x1f\x8b"),
    ],
)
def test_what_only_looks_so_is_left_to_its_decoder(name: str, content: bytes) -> None:
    """Words of a table that begin like marks, and odd text, are not taken for another kind of file."""
    check_contents(name, content, name[1:])


@pytest.mark.parametrize("suffix", EXPECTED)
def test_an_empty_file_is_not_judged(suffix: str) -> None:
    """That a file is empty has words of its own."""
    check_contents(f"a{suffix}", b"", suffix)


def test_every_accepted_file_of_the_corpus_is_what_its_name_says() -> None:
    """No file that is read is taken for another kind."""
    for verdict in corpus.VERDICTS:
        if "accepted" in verdict and isinstance(verdict["file"], str):
            suffix = next((one for one in EXPECTED if verdict["file"].lower().endswith(one)), "")
            if suffix:
                check_contents(verdict["file"], corpus.content(verdict["file"])[:512], suffix)
