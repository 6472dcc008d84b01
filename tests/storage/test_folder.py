"""Of a folder every file is listed once, or the error names what cannot be."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from job.runtime.errors import AccessDeniedError, DataError
from job.storage.fetch import find
from job.storage.folder import Listing, Rule, listed
from job.storage.open import open_store

RULE = Rule(enters=lambda name: not name.startswith("."), reads=lambda name: name.endswith(".jsonl"))
NOBODY = 12345


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that other users may enter, unlike pytest's."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    (directory / "a.jsonl").write_text("a")
    (directory / "more").mkdir()
    (directory / "more/b.jsonl").write_text("b")
    yield directory
    shutil.rmtree(directory)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything: permissions are seen by another user."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def keys(found: Listing) -> list[str]:
    return [entry.key for entry in found.entries]


def test_links_are_followed(place: Path) -> None:
    """Links to files and folders are followed, whichever way they lead, and a file with two names is read once."""
    with tempfile.TemporaryDirectory() as other:
        (Path(other) / "deep").mkdir()
        (Path(other) / "deep/c.jsonl").write_text("c")
        (place / "elsewhere").symlink_to(other)
        (place / "inside").symlink_to(Path(other) / "deep")
        (place / "again.jsonl").symlink_to("a.jsonl")
        (place / "latest").symlink_to("more")
        found = listed(place, RULE)
    assert len(keys(found)) == 3
    assert {"a.jsonl", "more/b.jsonl"} < {*keys(found)}
    assert found.repeated.keys() >= {"again.jsonl", "latest"}


def test_folders_that_are_not_entered(place: Path) -> None:
    """Of a folder that does not matter only the name is seen, whoever may read it."""
    (place / ".cache").mkdir(mode=0o700)
    (place / ".x").symlink_to("nothing")
    with as_nobody():
        found = listed(place, RULE)
    assert (keys(found), found.folders) == (["a.jsonl", "more/b.jsonl"], [".cache/"])


def link_to_nothing(place: Path) -> str:
    (place / "more/gone.jsonl").symlink_to("../gone.jsonl")
    return "more/gone.jsonl"


def link_to_no_folder(place: Path) -> str:
    (place / "2025").symlink_to("/nothing/here")
    return "2025"


def link_to_itself(place: Path) -> str:
    (place / "one.jsonl").symlink_to("two.jsonl")
    (place / "two.jsonl").symlink_to("one.jsonl")
    return "one.jsonl"


def link_to_above(place: Path) -> str:
    (place / "more/top").symlink_to("..")
    return "more/top"


def link_around(place: Path) -> str:
    (place / "more/back").symlink_to(place)
    (place / "again").symlink_to("more")
    return "more/back"


def link_through_a_file(place: Path) -> str:
    (place / "x").symlink_to("a.jsonl/x")
    return "x"


def pipe(place: Path) -> str:
    os.mkfifo(place / "pipe.jsonl")
    return "pipe.jsonl"


def device(place: Path) -> str:
    (place / "zero.jsonl").symlink_to("/dev/zero")
    return "zero.jsonl"


def listening(place: Path) -> str:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(place / "s.jsonl"))
    return "s.jsonl"


def not_utf_8(place: Path) -> str:
    (place / os.fsdecode(b"caf\xe9.jsonl")).write_text("x")
    return r"caf\xe9.jsonl"


def folder_without_entry(place: Path) -> str:
    (place / "more").chmod(0o700)
    return "more"


def folder_without_search(place: Path) -> str:
    (place / "more").chmod(0o744)
    return "more"


def file_without_reading(place: Path) -> str:
    (place / "a.jsonl").chmod(0o600)
    return "a.jsonl"


def link_into_a_closed_folder(place: Path) -> str:
    (place / ".closed").mkdir(mode=0o700)
    (place / ".closed/c.jsonl").write_text("c")
    (place / "c.jsonl").symlink_to(".closed/c.jsonl")
    return "c.jsonl"


BAD = [link_to_nothing, link_to_no_folder, link_to_itself, link_to_above, link_around, link_through_a_file, pipe]
BAD += [device, listening, not_utf_8]
DENIED = [folder_without_entry, folder_without_search, file_without_reading, link_into_a_closed_folder]


@pytest.mark.parametrize("make", [*BAD, *DENIED])
def test_what_cannot_be_read_is_named(place: Path, make: Callable[[Path], str]) -> None:
    """Rows never disappear with a link, a permission or a file that is none."""
    name = make(place)
    with as_nobody(), pytest.raises(AccessDeniedError if make in DENIED else DataError) as caught:
        listed(place, RULE)
    assert name in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize("make", [link_to_nothing, link_to_itself, pipe, device, file_without_reading, not_utf_8])
def test_a_file_that_is_named(place: Path, make: Callable[[Path], str]) -> None:
    """What the user names is not read if it is no file, and nothing waits for a pipe."""
    name = make(place)
    path = place / (name if make is not not_utf_8 else os.fsdecode(b"caf\xe9.jsonl"))
    with as_nobody(), pytest.raises(AccessDeniedError if make in DENIED else DataError) as caught:
        find(str(path), RULE, patience_seconds=1)
    assert name in caught.value.message


def test_what_is_not_read_may_be_anything(place: Path) -> None:
    """A socket, a file of another user and a strange name are no matter beside the data."""
    os.mkfifo(place / "pipe")
    (place / "notes.txt").write_text("x")
    (place / "notes.txt").chmod(0o600)
    (place / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    with as_nobody():
        assert {"a.jsonl", "more/b.jsonl"} < {*keys(listed(place, RULE))}


def test_deep_folders(place: Path) -> None:
    """Depth is no matter."""
    deep = place
    for _ in range(900):
        deep /= "d"
    deep.mkdir(parents=True)
    (deep / "x.jsonl").write_text("x")
    assert f"{'d/' * 900}x.jsonl" in keys(listed(place, RULE))


def test_an_output_that_cannot_be_listed(place: Path) -> None:
    """Records that cannot be seen are not taken for records that are not there."""
    folder_without_entry(place)
    with as_nobody(), pytest.raises(AccessDeniedError, match="more"):
        open_store(str(place)).list_objects("")
