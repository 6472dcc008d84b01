"""The container's memory as the kernel shows it, and when it is noted that it runs out."""

import subprocess
import sys
import threading
import time

import pytest

from job.observability import memory
from job.observability.memory import Judge, Usage
from tests.groups import GIB, ControlGroup
from tests.jobs import ROOT

MEMINFO = "MemTotal:       8388608 kB\nMemFree:        1048576 kB\nMemAvailable:   2097152 kB\n"


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A machine of 8 GiB, of which 6 are in use, whose processes are in the control group that the test says."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(MEMINFO)

    def within(line: str) -> None:
        (tmp_path / "proc/self/cgroup").write_text(f"3:cpu,cpuacct:/elsewhere\n{line}\n")

    within("0::/")
    return within


@pytest.mark.parametrize(
    ("line", "directory", "version"),
    [
        pytest.param("0::/", "", 2, id="v2, in a namespace of its own"),
        pytest.param("0::/kubepods/pod1/c1", "", 2, id="v2, a path of the host's"),
        pytest.param("0::/../../pod1", "", 2, id="v2, a path outside"),
        pytest.param("0::/user.slice/job", "user.slice/job", 2, id="v2, below"),
        pytest.param("0::/user.slice/job", "user.slice", 2, id="v2, limited further up"),
        pytest.param("4:memory:/", "memory", 1, id="v1"),
        pytest.param("4:hugetlb,memory:/docker/c1\n0::/", "memory", 1, id="v1, a path of the host's"),
        pytest.param("4:memory:/job\n0::/", "memory/job", 1, id="v1, below"),
    ],
)
def test_the_nearest_limit(kernel, tmp_path, line, directory, version):
    """The limit of the container is found wherever the kernel shows it; what files keep in memory is not in use."""
    kernel(line)
    (tmp_path / "cgroup/user.slice/job").mkdir(parents=True)
    ControlGroup(directory=tmp_path / "cgroup" / directory, version=version).show(0.5, files=0.25, kills=3)
    assert memory.container().read() == Usage(limit_bytes=GIB, in_use_bytes=GIB // 2, oom_kills=3)
    assert memory.container_limit() == GIB


@pytest.mark.parametrize(
    ("outer", "found"), [(GIB // 2, "user.slice"), (GIB, "user.slice/job"), (2 * GIB, "user.slice/job")]
)
def test_the_lowest_limit(kernel, tmp_path, outer, found):
    """Of several limits the lowest counts, wherever it is; of equal ones the nearest."""
    kernel("0::/user.slice/job")
    ControlGroup(directory=tmp_path / "cgroup/user.slice", limit=outer).show(0.5)
    ControlGroup(directory=tmp_path / "cgroup/user.slice/job").show(0.25)
    assert memory.container().directory == tmp_path / "cgroup" / found


@pytest.mark.parametrize(
    ("limit", "version"), [("max", 2), (9223372036854771712, 1), (8 * GIB, 2), ("", 2), ("a lot", 1)]
)
def test_no_limit(kernel, tmp_path, limit, version):
    """Without a limit below the machine's memory, that is the limit."""
    kernel("0::/" if version == 2 else "4:memory:/")
    ControlGroup(directory=tmp_path / "cgroup" / ("" if version == 2 else "memory"), limit=limit, version=version).show(
        0.5
    )
    assert memory.container_limit() is None
    assert memory.Machine().read() == Usage(limit_bytes=8 * GIB, in_use_bytes=6 * GIB)


def test_nothing_is_shown(kernel, tmp_path):
    """A kernel that shows nothing of its memory gives no evidence."""
    for name in ("self/cgroup", "meminfo"):
        (tmp_path / "proc" / name).unlink()
    assert memory.container_limit() is None
    assert memory.Machine().read() is None


def judged(looks: list[tuple[float, float, int]], *, kind: str = "container", own: float = 0.9) -> list[tuple]:
    """What is noted: second, whether memory is running out, peak in GiB. A look is (second, GiB in use of 1, kills)."""
    judge, noted = Judge(kind=kind, own_bytes=lambda: int(own * GIB)), []
    for second, in_use, kills in looks:
        found = judge.look(Usage(limit_bytes=GIB, in_use_bytes=int(in_use * GIB), oom_kills=kills), second)
        noted += [(second, found.running_out, round(found.peak_in_use_bytes / GIB, 2))] if found else []
    return noted


@pytest.mark.parametrize(
    ("looks", "noted"),
    [
        pytest.param([(0, 0.5, 7), (1, 0.94, 7), (90, 0.5, 7)], [], id="enough"),
        pytest.param([(0, 0.5, 0), (1, 0.96, 0), (2, 0.96, 0)], [(1, True, 0.96)], id="near"),
        pytest.param([(0, 0.96, 0), (9, 0.97, 0), (30, 0.98, 0)], [(0, True, 0.96), (30, True, 0.98)], id="higher"),
        pytest.param([(0, 0.96, 0), (9, 0.5, 0), (60, 0.5, 0)], [(0, True, 0.96), (60, False, 0.96)], id="calm"),
        pytest.param([(0, 0.96, 0), (50, 0.96, 0), (70, 0.5, 0)], [(0, True, 0.96)], id="not calm yet"),
        pytest.param([(0, 0.5, 7), (1, 0.5, 8), (2, 0.5, 8)], [(1, True, 0.5)], id="a process was killed"),
        pytest.param([(0, 0.5, 0), (1, 0.5, 1), (61, 0.5, 1)], [(1, True, 0.5), (61, False, 0.5)], id="long ago"),
    ],
)
def test_what_is_noted(looks, noted):
    """A note is made when memory begins to run out, when it has gone higher half a minute later, and when a minute was
    calm: as long as there is enough, none."""
    assert judged(looks) == noted


@pytest.mark.parametrize(("own", "noted"), [(0.5, 1), (0.3, 0)])
def test_a_machine_that_others_fill(own, noted):
    """On a machine without a limit for this job, only a job that has at least half of what is in use runs out."""
    assert len(judged([(0, 0.96, 0)], kind="machine", own=own)) == noted


def test_a_note_that_fails_is_made_again(kernel, tmp_path, monkeypatch):
    """Notes are made in another thread while the block runs; an error there ends nothing, and the note is tried again;
    after the block there are no more."""
    monkeypatch.setattr(memory, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(memory, "EVERY_SECONDS", 0.02)
    group = ControlGroup(directory=tmp_path / "cgroup").show(0.99)
    notes, written = [], threading.Event()

    def note(evidence) -> None:
        notes.append(evidence)
        if len(notes) < 3:
            raise MemoryError
        written.set()

    with memory.watched(note):
        assert written.wait(10)
    threads = [thread for thread in threading.enumerate() if thread.name == "memory"]
    for thread in threads:
        thread.join(10)
    group.show(1.0)
    assert {(evidence.running_out, evidence.limit_of, evidence.limit_bytes) for evidence in notes} == {
        (True, "container", GIB)
    }
    assert len(notes) == 3


def test_watching_costs_next_to_nothing(kernel, tmp_path):
    """A thousand looks, five hundred seconds of a run, take less than a second of one CPU."""
    ControlGroup(directory=tmp_path / "cgroup").show(0.5)
    limit, judge, started = memory.container(), Judge(kind="container"), time.thread_time()
    for second in range(1000):
        judge.look(limit.read(), second)
    assert time.thread_time() - started < 1


CHILD = """
import resource
from job.observability import memory
print(memory.peak_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
large = b"x" * (64 << 20)
print(memory.peak_bytes())
del large
print(memory.peak_bytes())
"""
PARENT = f"""
import subprocess, sys
large = b"x" * (400 << 20)
subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)
"""


@pytest.mark.process
def test_the_peak_is_that_of_this_process():
    """What the launching process had before this one's program began is not counted, as it is by getrusage; the peak
    grows with what is used, and stays when that is given back."""
    done = subprocess.run([sys.executable, "-c", PARENT], cwd=ROOT, capture_output=True, text=True, check=True)
    first, with_launcher, after, at_the_end = map(int, done.stdout.split())
    assert first < 300 << 20
    assert with_launcher > 400 << 20
    assert after >= first + (60 << 20)
    assert at_the_end == pytest.approx(after, rel=0.05)  # the kernel's own count is not exact


def test_the_peak_where_the_kernel_does_not_show_it(kernel, tmp_path):
    """A sandbox may have no such line, or no such file: then getrusage has to do."""
    assert memory.peak_bytes() > 1 << 20
    (tmp_path / "proc/self/status").write_text("Name:\tpython\nVmHWM:\t 1234 kB\nVmRSS:\t 1000 kB\n")
    assert memory.peak_bytes() == 1234 << 10
