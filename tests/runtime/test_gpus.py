"""GPUs and their driver, found once: through NVML, through the driver's files, or not at all.

Shared libraries are compiled in the place of the driver's.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from job.runtime import gpus
from job.runtime.gpus import Card, Gpus
from tests.jobs import ROOT

pytestmark = pytest.mark.process

NVML = """
#include <string.h>
int nvmlInitWithFlags(unsigned flags) { return %(init)d; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strcpy(text, "580.82.07"); return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **card) { *card = (void *)(long)(index + 1); return 0; }
int nvmlDeviceGetName(void *card, char *text, unsigned size) { strcpy(text, "NVIDIA H100"); return 0; }
int nvmlDeviceGetCudaComputeCapability(void *card, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
int nvmlDeviceGetMemoryInfo(void *card, unsigned long long *memory) {
    if ((long)card == 2) return 4; /* no permission, as for a card in partitions */
    memory[0] = 80ull << 30; return 0;
}
"""
FIND = """
import json
from job.runtime import gpus
found = gpus.find()
print(json.dumps([found.driver, found.names, found.kinds, [card.memory_bytes for card in found.cards]]))
"""
COMPILER = pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler")


def library(path, source):
    """Compile a shared library."""
    build = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", path]
    subprocess.run(build, input=source, text=True, check=True)


def said(directory, code):
    """What Python code prints where a directory's shared libraries are found first."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(directory)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@COMPILER
def test_nvml_names_the_cards(tmp_path):
    """Driver, names, kinds and memory come from NVML; memory that it does not report is unknown."""
    library(tmp_path / "libnvidia-ml.so.1", NVML % {"init": 0})
    found = json.loads(said(tmp_path, FIND))
    assert found == ["580.82.07", ["NVIDIA H100"] * 2, ["NVIDIA H100 sm_90"], [80 << 30, None]]


@COMPILER
@pytest.mark.skipif(gpus.SHOWN.exists(), reason="this machine has a driver")
def test_nvml_without_a_driver(tmp_path):
    """Where NVML finds no driver there are no cards, and nothing is raised."""
    library(tmp_path / "libnvidia-ml.so.1", NVML % {"init": 9})
    assert json.loads(said(tmp_path, FIND)) == ["", [], [], []]


def test_without_nvml_the_drivers_files_are_read(tmp_path, monkeypatch):
    """Without NVML the driver's own files name the cards; without a driver there is nothing, and nothing is raised."""
    monkeypatch.setattr(gpus, "_asked_of_nvml", lambda: None)
    monkeypatch.setattr(gpus, "SHOWN", tmp_path)
    assert gpus.find() == Gpus()
    (tmp_path / "gpus/0000:01:00.0").mkdir(parents=True)
    (tmp_path / "gpus/0000:01:00.0/information").write_text("Model: \t NVIDIA H100\nIRQ: 1\n")
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Tue\nGCC version: 12\n"
    )
    assert gpus.find() == Gpus(driver="580.82.07", cards=(Card(name="NVIDIA H100"),))


@pytest.mark.parametrize(("device", "there"), [("nvidia0", True), ("dxg", True), ("nvidiactl", False)])
def test_a_device_is_a_gpu(tmp_path, monkeypatch, device, there):
    """A card, or WSL's device; the driver's control device alone is not one."""
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    assert not gpus.present()
    (tmp_path / device).touch()
    assert gpus.present() is there


@COMPILER
@pytest.mark.parametrize(("number", "shown"), [(12040, "(12, 4)"), (13020, "(13, 2)"), (0, "None")])
def test_the_cuda_of_the_driver(tmp_path, number, shown):
    """The version is read from the driver's library as CUDA defines it: 1000 * major + 10 * minor."""
    library(tmp_path / gpus.CUDA_LIBRARY, f"int cuDriverGetVersion(int *version) {{ *version = {number}; return 0; }}")
    assert said(tmp_path, "from job.runtime import gpus; print(gpus.cuda_version())") == shown
