"""Compile caches between runs: what is kept comes back, and whatever is wrong with it costs the cache, not the run."""

import io
import json
import os
import py_compile
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
import structlog

from job.config.schema import Config
from job.runtime import gpus, libraries
from job.runtime.gpus import Card, Gpus
from job.state.compile_cache import archive, bytecode
from job.state.compile_cache import cache as compile_cache
from job.state.compile_cache import key as compile_key
from job.state.compile_cache.cache import CompileCache
from job.storage.open import open_store
from tests.jobs import ROOT, finish, run, start, stop_at
from tests.servers import Seen, serve_proxy

SHAPE = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "_name_or_path": "org/name"}
SHORT = {"max_steps": 2, "max_length": 128, "samples": 0, "batch_size": 4, "lora_r": 4, "precision": "16bit"}
COMPILES = """
import torch
from torch._dynamo.utils import counters
torch.compile(lambda x: (x * 2 + 1).sin().sum())(torch.ones(8))
print(counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.fixture(params=["moto", "directory"])
def uri(request, tmp_path, s3_env):
    return str(tmp_path / "kept") if request.param == "directory" else f"s3://{s3_env}/kept"


@pytest.fixture
def logged():
    with structlog.testing.capture_logs() as lines:
        yield lines


class Machine:
    """A machine with a disk of its own at the same place: what another run left on it is gone."""

    def __init__(self, tmp_path: Path) -> None:
        self.scratch, self.work = tmp_path / "scratch", tmp_path / "scratch/work"

    def cache(self, uri: str, **settings: object) -> CompileCache:
        shutil.rmtree(self.scratch, ignore_errors=True)
        return self.beside(uri, **settings)

    def beside(self, uri: str, **settings: object) -> CompileCache:
        self.work.mkdir(parents=True, exist_ok=True)
        config = Config(model="/m", dataset=("/d",), output="/o", **settings)
        return CompileCache(uri, config.as_variables(), scratch=self.scratch, work=self.work)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def restored(cache: CompileCache) -> dict[str, bytes]:
    """What is there once the restore is over."""
    cache.begin(SHAPE)
    cache.wait()
    top = cache.directory
    return {str(p.relative_to(top)): p.read_bytes() for p in sorted(top.rglob("*")) if p.is_file()}


def compiled(cache: CompileCache, **files: bytes) -> None:
    """The run compiles something, trains and ends."""
    for name, content in files.items():
        path = cache.directory / "triton" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    cache.save_soon()
    cache.finish()


def one_run(machine: Machine, uri: str, **files: bytes) -> None:
    """A run on a machine of its own, which restores what there is and compiles something."""
    cache = machine.cache(uri)
    restored(cache)
    compiled(cache, **files)


def events(logged: list, name: str) -> list:
    return [line for line in logged if line["event"] == name]


def kept(uri: str) -> list[str]:
    return [entry.key for entry in open_store(uri).list_objects()]


def test_what_a_run_compiled_comes_back(uri, machine, logged):
    """The next run on such a machine finds the files, may load what was loadable, and adds only what is new."""
    first = machine.cache(uri)
    assert restored(first) == {}
    (first.directory / "inductor/ab").mkdir(parents=True)
    program = first.directory / "inductor/ab/kernel.so"
    program.write_bytes(b"\x7fELF")
    program.chmod(0o755)
    for passing in ("triton/x/lock", "inductor/locks/a.lock", "unsloth/__pycache__/a.pyc", "triton/x/tmp.pid_1_a/b"):
        (first.directory / passing).parent.mkdir(parents=True, exist_ok=True)
        (first.directory / passing).write_bytes(b"passing")
    compiled(first, a=b"1" * 1000)
    second = machine.cache(uri)
    assert restored(second) == {"inductor/ab/kernel.so": b"\x7fELF", "triton/a": b"1" * 1000}
    assert os.access(second.directory / "inductor/ab/kernel.so", os.X_OK)
    assert list(machine.work.iterdir()) == []
    compiled(second, b=b"2")
    third = machine.cache(uri)
    assert restored(third).keys() == {"inductor/ab/kernel.so", "triton/a", "triton/b"}
    compiled(third)
    assert len(kept(uri)) == 2
    assert [2, 1] == [line["files"] for line in events(logged, "compile_cache_saved")]
    assert len(events(logged, "compile_cache_empty")) == 1
    assert [2, 3] == [line["files"] for line in events(logged, "compile_cache_restored")]


def test_modules_are_kept_wherever_their_sources_lie(machine, tmp_path, monkeypatch):
    """Python's compiled modules lie under the paths of their sources, of which any part may be called as it likes."""
    uri = str(tmp_path / "kept")
    source = tmp_path / "tmp.1/locks/module.py"
    source.parent.mkdir(parents=True)
    source.write_text("VALUE = 1\n")
    cache = machine.cache(uri)
    restored(cache)
    monkeypatch.setattr(sys, "pycache_prefix", str(cache.directory / bytecode.FOLDER))
    module = Path(py_compile.compile(str(source)))
    module.with_name(f"{module.name}.12").touch()
    compiled(cache)
    assert restored(machine.cache(uri)).keys() == {str(module.relative_to(cache.directory))}


def test_what_vanishes_while_it_is_listed(machine, tmp_path, logged):
    """Directories that the libraries rename and remove meanwhile cost nothing of what stays."""
    cache = machine.cache(str(tmp_path / "kept"))
    restored(cache)
    over = threading.Event()

    def compiles() -> None:
        while not over.is_set():
            for number in range(20):
                passing = cache.directory / f"triton/{number}/tmp.pid_1"
                passing.mkdir(parents=True, exist_ok=True)
                (passing / "kernel.cubin").write_bytes(b"1")
            for number in range(20):
                shutil.rmtree(cache.directory / f"triton/{number}")

    (cache.directory / "inductor").mkdir(parents=True)
    (cache.directory / "inductor/stays").write_bytes(b"1")
    thread = threading.Thread(target=compiles)
    thread.start()
    try:
        found = [[name for name, _ in cache._files(0)] for _ in range(100)]
    finally:
        over.set()
        thread.join()
    assert found == [["inductor/stays"]] * 100
    compiled(cache)
    assert len(events(logged, "compile_cache_saved")) == 1


def test_a_damaged_archive_is_passed_over_and_made_whole(uri, machine, logged):
    """One flipped bit costs the archive: the run compiles again, and what it saves takes the damaged one's place."""
    cold = machine.cache(uri)
    restored(cold)
    compiled(cold, a=b"1" * 1000)
    (key,) = kept(uri)
    whole = open_store(uri).read(key)
    open_store(uri).write(key, whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    warned = machine.cache(uri)
    assert restored(warned) == {}
    assert "damaged" in events(logged, "compile_cache_ignored")[0]["reason"]
    compiled(warned, a=b"1" * 1000)
    assert kept(uri) == [key]
    assert open_store(uri).read(key) == whole


def put(cache: CompileCache, uri: str, tmp_path: Path, members: list, *, label: dict | None = None) -> None:
    """An archive with a right name and these members in the place of the cache's."""
    cache.begin(SHAPE)
    cache.wait()
    first = tarfile.TarInfo(archive.LABEL)
    text = json.dumps(label or {"key": cache.directory.name}).encode()
    first.size = len(text)
    path = tmp_path / "made"
    with pa.output_stream(str(path), compression="zstd") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        tar.addfile(first, io.BytesIO(text))
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    open_store(uri).upload(path, f"{cache.directory.name}/{archive.name_of(path)}")


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        pytest.param([(member("files/../../../escaped"), b"x")], "not a valid file name", id="dots"),
        pytest.param([(member("files//escaped"), b"x")], "not a valid file name", id="empty part"),
        pytest.param([(member("/escaped"), b"x")], "not below files/", id="absolute"),
        pytest.param([(member("files/a", tarfile.SYMTYPE, "/etc/passwd"), b"")], "not a regular file", id="symlink"),
        pytest.param([(member("files/a", tarfile.LNKTYPE, "files/b"), b"")], "not a regular file", id="hard link"),
        pytest.param([(member("files/a", tarfile.FIFOTYPE), b"")], "not a regular file", id="fifo"),
        pytest.param([(member("files/a"), b"1"), (member("files/a"), b"2")], "exists", id="twice"),
        pytest.param([(member("files/a"), b"1" * 20_000)], "room for", id="too large"),
    ],
)
def test_an_archive_writes_only_where_it_may(machine, tmp_path, logged, monkeypatch, members, reason):
    """An archive with anything but bounded regular files under plain names is passed over as a whole."""
    monkeypatch.setattr(compile_cache, "MOST_BYTES", 20_000)
    uri = str(tmp_path / "kept")
    put(machine.cache(uri), uri, tmp_path, [(member("files/triton/good"), b"good"), *members])
    assert restored(machine.cache(uri)) == {}
    assert reason in events(logged, "compile_cache_ignored")[0]["reason"]
    assert not list(tmp_path.rglob("escaped"))


def test_a_foreign_archive_is_passed_over(machine, tmp_path, logged):
    """An archive that says it was made for another key is ignored, and so is any other object."""
    uri = str(tmp_path / "kept")
    cache = machine.cache(uri)
    put(cache, uri, tmp_path, [(member("files/triton/a"), b"x")], label={"key": "another"})
    open_store(uri).write(f"{cache.directory.name}/README", b"hello")
    assert restored(machine.cache(uri)) == {}
    reasons = " ".join(line["reason"] for line in events(logged, "compile_cache_ignored"))
    assert "made for another key, 'another'" in reasons
    assert "README (5 bytes) was not written" in reasons


HERE = Gpus(driver="580.1", cards=(Card(name="NVIDIA H100", capability="9.0"),))
REQUIRED = {"model": "/m", "dataset": ("/d",), "output": "/o"}
SETTINGS = Config(**REQUIRED).as_variables()


@pytest.mark.parametrize(
    ("settings", "shape", "there", "same"),
    [
        pytest.param({}, {**SHAPE, "_name_or_path": "other", "transformers_version": "0"}, HERE, True, id="a name"),
        pytest.param({"model": "/n", "epochs": 9.0, "seed": 1}, SHAPE, HERE, True, id="what is not compiled"),
        pytest.param({}, {**SHAPE, "hidden_size": 128}, HERE, False, id="the model's shape"),
        pytest.param({}, SHAPE, Gpus(driver="580.2", cards=HERE.cards), False, id="the driver"),
        pytest.param(
            {}, SHAPE, Gpus(driver="580.1", cards=(Card(name="NVIDIA A100", capability="8.0"),)), False, id="the card"
        ),
        pytest.param({"precision": "16bit"}, SHAPE, HERE, False, id="precision"),
        pytest.param({"lora_targets": ("q_proj",)}, SHAPE, HERE, False, id="targets"),
        pytest.param({"max_length": 512}, SHAPE, HERE, False, id="length"),
    ],
)
def test_the_key_is_what_compiled_code_depends_on(settings, shape, there, same):
    """Another card, driver, shape or compiled setting is another key; another name is not."""
    base = compile_key.facts(SETTINGS, SHAPE, gpus=HERE, scratch=Path("/s"))
    changed = Config(**{**REQUIRED, **settings}).as_variables()
    other = compile_key.facts(changed, shape, gpus=there, scratch=Path("/s"))
    assert (compile_key.key(base) == compile_key.key(other)) is same


def test_the_key_has_the_versions_and_the_place(monkeypatch):
    """The installed versions and the place of the caches are part of the key."""
    base = compile_key.facts(SETTINGS, SHAPE, gpus=HERE, scratch=Path("/s"))
    assert {"torch", "triton", "unsloth", "transformers", "bitsandbytes"} <= base["packages"].keys()
    elsewhere = compile_key.facts(SETTINGS, SHAPE, gpus=HERE, scratch=Path("/t"))
    monkeypatch.setattr(libraries.metadata, "version", lambda package: f"{package} 2")
    later = compile_key.facts(SETTINGS, SHAPE, gpus=HERE, scratch=Path("/s"))
    assert len({compile_key.key(found) for found in (base, elsewhere, later)}) == 3


@pytest.mark.parametrize("bound", ["restore", "disk"])
def test_a_restore_takes_only_so_much(bound, machine, tmp_path, monkeypatch, logged):
    """Archives that there is no room for, packed or unpacked, are left where they are; the others come."""
    uri = str(tmp_path / "kept")
    for name, content in {"large": os.urandom(200_000), "swells": b"1" * 200_000, "fits": b"1"}.items():
        cache = machine.cache(uri)
        restored(cache)
        compiled(cache, **{name: content})
    room = 150_000
    if bound == "restore":
        monkeypatch.setattr(compile_cache, "MOST_BYTES", room)
    else:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(compile_cache, "LEAST_FREE_BYTES", usage.free - room)
        monkeypatch.setattr(compile_cache.shutil, "disk_usage", lambda _: usage)  # others write there, too
    assert restored(machine.cache(uri)).keys() == {"triton/fits"}
    reasons = [line["reason"] for line in events(logged, "compile_cache_ignored")]
    assert len(reasons) == 2
    assert all("room for" in reason for reason in reasons)


def test_what_is_restored_counts_together(machine, tmp_path, monkeypatch, logged):
    """Each archive may be small enough: once they have taken what a restore may take, no more comes."""
    uri = str(tmp_path / "kept")
    for number in range(3):
        cache = machine.cache(uri)
        restored(cache)
        compiled(cache, **{f"f{number}": os.urandom(50_000)})
    monkeypatch.setattr(compile_cache, "MOST_BYTES", 250_000)  # each takes 100,000, packed and unpacked
    assert len(restored(machine.cache(uri))) == 2
    assert "room for" in events(logged, "compile_cache_ignored")[0]["reason"]


def test_a_restore_that_is_given_up_stops(s3_env, machine, monkeypatch, logged):
    """What comes too late is not unpacked, what would come after it is not asked for, and nothing is added to it."""
    uri = f"s3://{s3_env}/kept"
    for number in range(3):
        one_run(machine, uri, **{f"f{number}": b"1"})
    monkeypatch.setattr(compile_cache, "PATIENCE_SECONDS", 0.1)
    asked, came, let = [], threading.Event(), threading.Event()

    def rule(seen: Seen) -> None:
        if seen.method == "GET" and seen.path.partition("?")[0].endswith(archive.SUFFIX):
            asked.append(seen.path)
            came.set()
            seen.before = lambda: let.wait(20)

    with serve_proxy(os.environ["AWS_ENDPOINT_URL_S3"], rule) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy)
        late = machine.cache(uri)
        late.begin(SHAPE)
        assert came.wait(20)
        late.wait()
        let.set()
        assert late._restoring.ended(20)
        compiled(late, f0=b"1", more=b"1")
        assert len(kept(uri)) == 3
    assert len(asked) == 1
    assert {path.name for path in late.directory.rglob("*") if path.is_file()} == {"f0", "more"}
    assert events(logged, "compile_cache_unchanged")[-1]["reason"] == "the restore timed out"
    assert [line["reason"] for line in events(logged, "compile_cache_ignored")] == ["the restore timed out"]


def test_two_writers_do_not_spoil_each_other(uri, machine, logged):
    """Two cold runs that save at the same moment leave only whole archives; one that comes late adds nothing."""
    runs = [machine.cache(uri), machine.beside(uri), machine.beside(uri)]
    for cache in runs:
        assert restored(cache) == {}
    (runs[0].directory / "triton").mkdir(parents=True)
    for number in range(50):
        (runs[0].directory / f"triton/{number}").write_bytes(os.urandom(5000))
    threads = [threading.Thread(target=compiled, args=(cache,)) for cache in runs[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = kept(uri)
    compiled(runs[2], late=b"1")
    assert kept(uri) == before
    assert events(logged, "compile_cache_unchanged")
    assert len(restored(machine.cache(uri))) == 50
    assert not events(logged, "compile_cache_ignored") + events(logged, "compile_cache_not_saved")


def test_only_so_many_archives_are_kept(machine, tmp_path, monkeypatch, logged):
    """Runs that always compile something new do not fill the bucket."""
    monkeypatch.setattr(compile_cache, "MOST_ARCHIVES", 2)
    uri = str(tmp_path / "kept")
    for number in range(4):
        one_run(machine, uri, **{f"f{number}": b"x"})
    assert len(kept(uri)) == 2
    assert events(logged, "compile_cache_unchanged")[-1]["reason"] == "2 archives are kept already"


def test_damaged_archives_are_not_counted(machine, tmp_path, monkeypatch, logged):
    """As many whole archives are kept and restored as may be, whatever damaged ones lie beside them."""
    monkeypatch.setattr(compile_cache, "MOST_ARCHIVES", 2)
    uri = str(tmp_path / "kept")
    for number in range(4):
        one_run(machine, uri, **{f"f{number}": b"x"})
        if number < 2:
            for key in kept(uri):
                open_store(uri).write(key, b"damaged")
    assert len(kept(uri)) == 4
    assert restored(machine.cache(uri)).keys() == {"triton/f2", "triton/f3"}
    one_run(machine, uri, f4=b"x")
    assert len(kept(uri)) == 4
    assert events(logged, "compile_cache_unchanged")[-1]["reason"] == "2 archives are kept already"


def test_a_store_that_comes_late_is_left_as_it_is(s3_env, machine, monkeypatch, logged):
    """Where the archives could not be listed at the start nothing is added to them, and the reason is the true one."""
    uri = f"s3://{s3_env}/kept"
    first = machine.cache(uri)
    restored(first)
    compiled(first, a=b"1")
    with monkeypatch.context() as down:
        down.setattr(compile_cache, "STORE_PATIENCE_SECONDS", 0.4)
        down.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        late = machine.cache(uri)
        assert restored(late) == {}
    compiled(late, a=b"1", b=b"2")
    assert len(kept(uri)) == 1
    (event,) = events(logged, "compile_cache_not_saved")
    assert event["reason"] == "the archives could not be listed at the start"


@pytest.fixture
def silent():
    """A server that takes connections, reports the first, and never answers."""
    called = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            held = []
            while True:
                try:
                    held.append(server.accept())
                except OSError:
                    return
                called.set()

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", called


@pytest.mark.parametrize("answers", ["refused", "silent", "no bucket"])
def test_a_store_that_is_down_costs_seconds(answers, silent, s3_env, machine, monkeypatch, logged):
    """Unreachable, silent or no bucket: the run continues within the patience, and a warning says so at both ends."""
    for name in ("PATIENCE_SECONDS", "STORE_PATIENCE_SECONDS", "SAVING_PATIENCE_SECONDS", "LAST_SECONDS"):
        monkeypatch.setattr(compile_cache, name, 0.4)
    uri = f"s3://{s3_env}/kept"
    if answers == "no bucket":
        uri = f"s3://{s3_env}-of-nobody/kept"
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", silent[0] if answers == "silent" else "http://127.0.0.1:9")
    started = time.monotonic()
    cache = machine.cache(uri)
    assert restored(cache) == {}
    compiled(cache, a=b"1")
    assert time.monotonic() - started < 4
    assert events(logged, "compile_cache_ignored")
    assert events(logged, "compile_cache_not_saved")


def test_sigterm_while_restoring_ends_the_run(silent, tiny_model, rows, tmp_path):
    """A run whose cache does not answer ends within its grace when it is asked to, with 75."""
    endpoint, called = silent
    place = {"model": tiny_model, "dataset": rows, "output": tmp_path / "out", "cache": "s3://bucket/kept"}
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_EC2_METADATA_DISABLED": "true"}
    child = start(tmp_path, **SHORT, **place, **keys, AWS_ENDPOINT_URL_S3=endpoint)
    assert called.wait(60)
    child.send_signal(signal.SIGTERM)
    ended = finish(child, seconds=20)
    assert ended.code == 75
    assert json.loads(next((tmp_path / "out").rglob("attempts/0001.end.json")).read_text())["outcome"] == "interrupted"


def test_a_run_saves_and_the_next_restores(tiny_model, rows, tmp_path):
    """A run's libraries compile into the cache's directory; it is saved at the end, and restored by the next run."""
    place = {"model": tiny_model, "dataset": rows, "output": tmp_path / "out", "cache": tmp_path / "kept"}
    scratch = tmp_path / f"scratch/finetune-job-{os.getuid()}"
    settings = {name: value for name, value in SHORT.items() if name != "samples"}
    config = Config(model=str(tiny_model), dataset=(str(rows),), output="/o", **settings)
    shape = json.loads((tiny_model / "config.json").read_text())
    key = compile_key.key(compile_key.facts(config.as_variables(), shape, gpus=gpus.find(), scratch=scratch))
    left = scratch / "compiled" / key / "triton/ab/kernel.cubin"  # as on a volume that outlived a run
    left.parent.mkdir(parents=True)
    left.write_bytes(b"compiled")
    first = run(tmp_path, fresh=True, **SHORT, **place)
    assert first.code == 0
    assert first.event("compile_cache_empty")["key"] == key
    assert first.event("compile_cache_saved")["files"] >= 1
    seconds = first.event("run_complete")["timeline_seconds"]
    assert 0 < seconds["import"] < first.event("run_complete")["seconds"]
    assert all(seconds[part] > 0 for part in ("download", "tokenise", "load", "train", "evaluate", "export", "upload"))
    assert first.event("run_complete")["seconds_to_first_step"] > seconds["import"]
    shutil.rmtree(scratch)
    place["output"] = tmp_path / "again"
    second = stop_at(start(tmp_path, **SHORT, **place), "compile_cache_restored")
    assert second.event("compile_cache_restored")["files"] == first.event("compile_cache_saved")["files"]
    assert left.read_bytes() == b"compiled"
    assert not first.events("compile_cache_ignored") + second.events("compile_cache_ignored")


@pytest.mark.full  # half a minute of compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles for a CPU with a C++ compiler")
def test_inductor_takes_what_was_restored(machine, tmp_path):
    """What torch compiled in one process is found by another, on a machine that restored it: no graph is compiled."""
    hits = []
    for _ in range(2):
        cache = machine.cache(str(tmp_path / "kept"))
        restored(cache)
        places = {
            "TORCHINDUCTOR_CACHE_DIR": str(cache.directory / "inductor"),
            "TRITON_CACHE_DIR": str(cache.directory / "triton"),
        }
        done = subprocess.run(
            [sys.executable, "-c", COMPILES],
            cwd=ROOT,
            env={**os.environ, **places, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        hits.append(int(done.stdout))
        compiled(cache)
    assert hits == [0, 1]
