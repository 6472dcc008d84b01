"""cloud/docker: the loop around a container, run with a program in docker's place that ends as the test says."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from job.runtime.errors import KINDS, JobError
from tests.jobs import ROOT

pytestmark = pytest.mark.process

SCRIPTS = sorted((ROOT / "cloud" / "docker").glob("*.sh"))
AGAIN, RUN = ROOT / "cloud" / "docker" / "restart.sh", ROOT / "cloud" / "docker" / "run.sh"
TRIES = 3
ENDS = {kind.exit_code: not kind.retry for kind in (*KINDS, JobError)} | {0: True, 137: False}


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `docker` on PATH that keeps its arguments and ends with the codes in `codes`, one a line."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "$*" >> "$HERE/calls"\n'
        'code=$(head -n 1 "$HERE/codes")\nsed -i 1d "$HERE/codes"\nexit "$code"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("TRIES", str(TRIES))
    monkeypatch.setenv("PAUSE_SECONDS", "0")
    return tmp_path


def ended(here: Path, *codes: int) -> tuple[int, int]:
    """The loop's exit code, and how many containers it started."""
    (here / "codes").write_text("".join(f"{code}\n" for code in codes))
    (here / "job.env").write_text("TUNE_OUTPUT=s3://bucket\n")
    done = subprocess.run([RUN, here / "job.env"], capture_output=True, text=True, check=False)
    return done.returncode, len((here / "calls").read_text().splitlines())


@pytest.mark.parametrize(("code", "ends"), [pytest.param(*item, id=f"code-{item[0]}") for item in ENDS.items()])
def test_starts_again_exactly_what_is_worth_it(docker: Path, code: int, ends: bool) -> None:
    """After a code whose kind says `retry`, and an unknown one, the container runs again; after no other."""
    assert ended(docker, code, 0) == ((code, 1) if ends else (0, 2))


@pytest.mark.parametrize("code", [74, 1, 137, 125])
def test_counts_what_may_go_on_for_ever(docker: Path, code: int) -> None:
    """Failures count to TRIES, and the last code is the loop's."""
    assert ended(docker, *[code] * 9) == (code, TRIES)


def test_interruptions_do_not_count(docker: Path) -> None:
    """However often a container is interrupted, it is started again, and a failure in between is only one."""
    assert ended(docker, *[75] * 8, 74, *[75] * 8, 0) == (0, 18)


def test_a_signal_reaches_the_container_and_ends_the_loop(tmp_path: Path) -> None:
    """SIGTERM is passed on; the loop then waits for the container's own end and starts nothing more."""
    body = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('asked', flush=True), time.sleep(0.2), sys.exit(75)))\n"
        "print('started', flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen([AGAIN, sys.executable, "-c", body], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "started\n"
    child.send_signal(signal.SIGTERM)
    rest, _ = child.communicate(timeout=30)
    assert (child.returncode, rest) == (75, "asked\n")


def test_a_signal_ends_the_pause(docker: Path) -> None:
    """A loop that waits before the next try ends at once, with the code that it waits for."""
    body = "import sys; print('ran', flush=True); sys.exit(74)"
    environment = {**os.environ, "PAUSE_SECONDS": "60"}
    child = subprocess.Popen(
        [AGAIN, sys.executable, "-c", body], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert child.stderr is not None
    assert "starting again" in child.stderr.readline()
    child.send_signal(signal.SIGTERM)
    output, _ = child.communicate(timeout=30)
    assert (child.returncode, output) == (74, "ran\n")


def test_the_container_may_write_to_scratch_only(docker: Path) -> None:
    """The root is read-only, there are no capabilities, and the grace that the job hears of is the one that it gets."""
    ended(docker, 0)
    line = (docker / "calls").read_text()
    for part in ("--gpus all", "--read-only", "--cap-drop ALL", "--security-opt no-new-privileges", "--shm-size 1g"):
        assert part in line
    assert line.count("--mount") == 1
    assert "target=/scratch" in line
    assert "--stop-timeout 15" in line
    assert "--env TUNE_GRACE_SECONDS=15" in line


@pytest.mark.skipif(shutil.which("docker") is None, reason="Docker's command line is not installed")
def test_docker_knows_every_option(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker's own command line parses the options: it gets as far as looking for its daemon."""
    ended(docker, 0)
    options = (docker / "calls").read_text().split()
    # The real program again, and no daemon for it, so that nothing runs anywhere.
    monkeypatch.setenv("PATH", os.environ["PATH"].partition(":")[2])
    monkeypatch.setenv("DOCKER_HOST", f"unix://{docker}/no-daemon")
    monkeypatch.setenv("DOCKER_CONFIG", str(docker))
    good, typo = (
        subprocess.run(["docker", *words], capture_output=True, text=True, check=False, timeout=60).stderr
        for words in (options, ["run", "--shm-sise", "1g", *options[1:]])
    )
    assert "unknown flag: --shm-sise" in typo
    assert "daemon" in good
    assert "unknown flag" not in good


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_clean(script: Path) -> None:
    """Bash parses every script and shellcheck has nothing to say."""
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
