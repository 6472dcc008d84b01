"""What the training libraries read at import, and what child processes get."""

import os
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from job.runtime import libraries, process
from job.runtime.libraries import COMPILED, OFFLINE, LibrarySettings


@pytest.fixture
def environment(monkeypatch):
    """An environment that is this process's again afterwards."""
    before = dict(os.environ)
    monkeypatch.setattr(libraries, "_given", {})
    for name in (*OFFLINE, *COMPILED, "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        os.environ.pop(name, None)
    yield os.environ
    os.environ.clear()
    os.environ.update(before)


def test_children_go_online_where_the_user_may(tmp_path, environment):
    """The process that trains is offline; a child has what the user had set, or nothing where nothing was set."""
    environment["HF_HUB_OFFLINE"] = "0"
    assert libraries.child_environment(NEW="1")["NEW"] == "1"
    libraries.prepare(LibrarySettings(scratch=tmp_path, expect_gpu=False))
    assert {name: environment[name] for name in OFFLINE} == OFFLINE
    child = libraries.child_environment(PATH=None, NEW="1")
    assert {name: child.get(name) for name in (*OFFLINE, "PATH", "NEW")} == {
        **dict.fromkeys(OFFLINE),
        "HF_HUB_OFFLINE": "0",
        "PATH": None,
        "NEW": "1",
    }


@pytest.mark.process
def test_only_the_stores_credentials_stay(tmp_path, environment):
    """What the libraries start sees only the credentials that this process needs to its end; a child may have more."""
    planted = {"HF_TOKEN": "planted", "WANDB_API_KEY": "planted", "DATABASE_URL": "pg://u:planted@h"}
    environment.update(planted, AWS_SECRET_ACCESS_KEY="store", HTTPS_PROXY="http://u:p@proxy", MAX_TOKENS="3")
    libraries.prepare(LibrarySettings(scratch=tmp_path, expect_gpu=False))
    started = subprocess.check_output(["env"], text=True)
    assert "planted" not in started
    for kept in ("AWS_SECRET_ACCESS_KEY=store", "HTTPS_PROXY=http://u:p@proxy", "MAX_TOKENS=3"):
        assert kept in started.splitlines()
    assert planted.items() <= libraries.child_environment().items()


def test_compiled_code_stays_where_it_was_put(tmp_path, environment):
    """A library that moves a compile directory at its import does not move it for good."""
    environment["TRITON_CACHE_DIR"] = "/elsewhere"
    settings = LibrarySettings(scratch=tmp_path, compiled=tmp_path / "kept", expect_gpu=True)
    prepared = libraries.prepare(settings)
    placed = {name: str(tmp_path / "kept" / leaf) for name, leaf in COMPILED.items()}
    assert {name: environment[name] for name in COMPILED} == placed
    del environment["TORCHINDUCTOR_CACHE_DIR"]
    prepared.restore_compiled()
    assert {name: environment[name] for name in COMPILED} == placed


def test_the_users_places_are_kept_without_a_compile_cache(tmp_path, environment):
    """Caches go under the scratch directory, unless the user placed them elsewhere."""
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "own")
    libraries.prepare(LibrarySettings(scratch=tmp_path, expect_gpu=False))
    assert environment["TRITON_CACHE_DIR"] == str(tmp_path / "own")
    assert Path(environment["TORCHINDUCTOR_CACHE_DIR"]) == tmp_path / "inductor"


@pytest.mark.parametrize(("quota", "threads"), [(None, None), (0.5, "1"), (2.5, "2"), (64.0, None)])
def test_threads_follow_the_quota(tmp_path, environment, monkeypatch, quota, threads):
    """A container with less CPU time than the machine has CPUs gets as many threads as whole CPUs, at least one."""
    monkeypatch.setattr(process, "cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    libraries.prepare(LibrarySettings(scratch=tmp_path, expect_gpu=False))
    assert environment.get("OMP_NUM_THREADS") == threads


def test_the_cuda_of_torch_is_that_of_its_libraries():
    """The CUDA that torch says it was built for is that of the CUDA libraries installed with it."""
    runtime = metadata.version("nvidia-cuda-runtime").split(".")
    assert libraries.torch_cuda() == (int(runtime[0]), int(runtime[1]))
