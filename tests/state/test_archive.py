"""Archives of compile caches: what comes back, and what bombs get: an error, within memory, disk and time."""

import json
import subprocess
import sys

import pytest

from job.state.compile_cache import archive
from tests.jobs import ROOT
from tests.state import bombs


@pytest.fixture(scope="module")
def bombed(tmp_path_factory):
    """What unpacking each bomb came to, in a process with 256 MB more memory than it begins with."""
    command = [sys.executable, "-m", "tests.state.bombs", str(tmp_path_factory.mktemp("bombs"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


HARMLESS = {"a deep name"}


@pytest.mark.process
def test_bombs(bombed):
    """None is unpacked, none ends the process, and none writes more than the bound, counted in blocks of the disk."""
    assert len(bombed) > 30
    assert {name for name, found in bombed.items() if found["said"] == "unpacked"} == HARMLESS
    assert all(found["bytes"] <= bombs.MOST_BYTES for found in bombed.values())
    assert all(found["files"] * archive.DISK_BLOCK <= bombs.MOST_BYTES for found in bombed.values())
    assert {found["said"].partition(":")[0] for name, found in bombed.items() if name not in HARMLESS} <= {
        "ValueError",
        "OSError",
        "FileExistsError",
        "NotADirectoryError",
    }


def test_names_of_all_kinds_come_back(tmp_path):
    """Long names, names in other scripts and bits for execution are kept; a name that nobody could read is left out."""
    names = ["a", "long/" + "n" * 200, "d/" * 100 + "x", "日本語/ß", "a\nline", "ß\n" * 20, "p" * 100, "q" * 101]
    bad = ["/".join(["z" * 200] * 6), "half\udc80"]
    source = tmp_path / "source"
    source.mkdir()
    files = {}
    for number, name in enumerate([*names, *bad]):
        files[name] = source / str(number)
        files[name].write_bytes(name.encode(errors="replace") * 50)
    files["a"].chmod(0o700)
    packed = archive.pack(files, tmp_path / "archive", label={"key": "k", "limit": float("inf")})
    assert sorted(packed) == sorted(names)
    label, found = archive.unpack(tmp_path / "archive", tmp_path / "out", most_bytes=1 << 30)
    assert (label, sorted(found)) == ({"key": "k", "limit": "Infinity"}, sorted(packed))
    assert all((tmp_path / "out" / name).read_bytes() == files[name].read_bytes() for name in packed)
    assert [bool((tmp_path / "out" / name).stat().st_mode & 0o100) for name in ("a", "q" * 101)] == [True, False]


def test_the_same_files_give_the_same_bytes(tmp_path):
    """The order in which they are given, and their times, do not matter."""
    files = {}
    for name in ("b", "a"):
        files[name] = tmp_path / name
        files[name].write_bytes(name.encode())
    archive.pack(files, tmp_path / "one", label={"key": "k"})
    archive.pack(dict(reversed(files.items())), tmp_path / "two", label={"key": "k"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_restore_that_was_given_up(tmp_path):
    """No file is written any more."""
    (tmp_path / "a").write_bytes(b"a")
    archive.pack({str(n): tmp_path / "a" for n in range(9)}, tmp_path / "archive", label={"key": "k"})
    asked = iter([False, False, True])
    with pytest.raises(ValueError, match="given up"):
        archive.unpack(tmp_path / "archive", tmp_path / "out", most_bytes=1 << 30, cancelled=lambda: next(asked))
    assert len(list((tmp_path / "out").iterdir())) == 2
