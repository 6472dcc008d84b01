"""Nothing about logging ends a run: full disks, closed descriptors, killed log processes, readers that stop reading."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from job.observability import capture
from job.observability.capture import Output, Pump
from tests.jobs import KEPT, ROOT, zygote

pytestmark = pytest.mark.process

PROLOGUE = """
import contextlib, logging, os, signal, sys, threading, time
from pathlib import Path
import psutil, structlog
from job.observability import logs
log = structlog.get_logger()

def configure():
    logs.configure(form=sys.argv[1], level="info", secrets=["s3cr3t-value"])
    logs.bind(run_id="r1")

def kill():
    (pid,) = logs.processes()
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)
    return pid

def end():
    logs.close()
    os._exit(7)
"""


def speak(code: str, form: str = "json", **options) -> tuple[int, str]:
    """Run code under the logger; its exit code and what it wrote to stdout."""
    command = [sys.executable, "-c", PROLOGUE + textwrap.dedent(code) + "\nend()", form]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **options)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


def events(text: str) -> list[str]:
    return [line.get("message", line["event"]) for line in map(json.loads, text.splitlines())]


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("configure(); kill(); log.info('last'); print('printed')", id="at the start"),
        pytest.param(
            "configure(); log.info('first'); kill(); print('x' * 300_000); log.info('last'); print('printed')",
            id="in the middle",
        ),
        pytest.param(
            "configure(); print('early', flush=True); kill(); print('printed'); log.info('last')", id="at the end"
        ),
        pytest.param(
            """
            configure()
            while logs.processes():
                pid = kill()
                while logs.processes() == {pid}:
                    time.sleep(0.01)
            print('s3cr3t-value'); print('printed'); log.info('last')
            """,
            id="again and again",
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_killed_log_process_is_replaced(code):
    """What is logged or printed after the log process was killed arrives, and the exit code is the program's own."""
    code, text = speak(code)
    assert code == 7
    assert {"last", "printed"} <= set(events(text))
    assert "s3cr3t-value" not in text


def test_a_stopped_log_process_continues():
    """A log process that somebody stopped does not hold the job up."""
    code, text = speak(
        "configure(); os.kill(*logs.processes(), signal.SIGSTOP); print('x' * 300_000); log.info('last')"
    )
    assert code == 7
    assert events(text)[-1] == "last"


def test_a_log_process_stopped_at_the_end():
    """It is woken to deliver the last line."""
    code, text = speak("configure(); log.info('first'); os.kill(*logs.processes(), signal.SIGSTOP); log.info('last')")
    assert (code, events(text)) == (7, ["first", "last"])


@pytest.mark.full
def test_a_huge_line():
    """The time that a line takes grows with its length only."""
    code, text = speak("configure(); log.info('huge', data='x' * 60_000_000)")
    assert (code, len(json.loads(text)["data"])) == (7, 60_000_000)


def test_no_process_can_be_started():
    """Without another process, a thread makes the same lines."""
    code, text = speak("""
        sys.executable = "/nowhere/python"
        configure()
        print("x" * 300_000); print("a s3cr3t-value"); log.info("last")
        """)
    assert code == 7
    assert {"last", "a ***", "log_process_not_available"} <= set(events(text))


def test_log_processes_that_end_at_once_while_the_job_logs():
    """A line that waits for a log process does not keep the next one from being started."""
    code, text = speak("""
        configure()
        sys.executable = "/bin/false"
        kill()
        for _ in range(30):
            log.info("many", data="x" * 10_000)
        log.info("last")
        """)
    assert code == 7
    found = events(text)
    assert found[-1] == "last"
    assert found.count("many") == 30
    assert {"log_process_ended", "log_process_not_available"} <= set(found)


def test_no_thread_can_be_started():
    """Where the process may have no more threads and processes, lines go to stdout as they are."""
    code, text = speak("""
        def start(self): raise RuntimeError("can't start new thread")
        sys.executable = "/nowhere/python"
        threading.Thread.start = start
        configure()
        log.info("last")
        """)
    assert (code, events(text)) == (7, ["last"])


def test_a_fork_while_others_log():
    """A forked process logs, whatever the threads were doing that it does not have."""
    code, text = speak("""
        configure()
        over = threading.Event()
        def work():
            while not over.is_set(): log.info("busy", data="x" * 3000)
        threads = [threading.Thread(target=work) for _ in range(3)]
        [thread.start() for thread in threads]
        for _ in range(20):
            if not (child := os.fork()):
                signal.alarm(20)
                log.info("child")
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        over.set()
        [thread.join() for thread in threads]
        """)
    assert code == 7
    assert text.count('"child"') == 20


def test_the_log_process_knows_no_credentials():
    """Its environment is empty; the secrets that it replaces come through a pipe."""
    code, text = speak(
        """
        configure()
        (pid,) = logs.processes()
        print(len(Path(f"/proc/{pid}/environ").read_bytes()), "bytes; s3cr3t-value")
        """,
        env={name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"} | {"HF_TOKEN": "abcdefgh"},
    )
    assert (code, events(text)) == (7, ["0 bytes; ***"])


def test_an_observer_that_raises():
    """It is reported once; the lines that it was given are written."""
    code, text = speak("configure(); logs.observe(lambda event: 1 / 0); log.info('first'); log.info('second')")
    assert code == 7
    assert sorted(events(text)) == ["first", "observer_failed", "second"]


BAD_VALUES = """
class Bad(Exception):
    def __str__(self): raise RuntimeError("no text")
    __repr__ = __str__
circle = {"step": 1}
circle["again"] = [circle]
deep = []
for _ in range(100_000): deep = [deep]
configure()
log.info("a_bad_value", step=3, value=Bad(), secret="s3cr3t-value")
log.info("a_circle", step=3, value=circle)
log.info("a_deep_value", step=3, value=deep, secret="s3cr3t-value")
log.info("a_huge_number", step=3, value=10 ** 5000)
log.info("half_a_character", step=3, value="\\ud800")
log.info("odd_keys", step=3, value={(1, 2): 3, Bad(): 4})
log.info("no_numbers", step=3, value=[float("nan"), {"inner": float("-inf")}])
log.info("train_progress", step=3)
logging.getLogger("library").warning("%s", Bad())
logging.getLogger("library").warning("half \\ud800")
print("half \\ud800")
try:
    raise Bad
except Bad:
    log.exception("an_error", step=3)
"""
NAMES = (
    *("a_bad_value", "a_circle", "a_deep_value", "a_huge_number", "half_a_character", "odd_keys", "no_numbers"),
    "an_error",
)


def test_values_that_have_no_text():
    """Whatever an event holds, there is a line of JSON for it, as other programs read it, with its simple fields."""
    code, text = speak(BAD_VALUES)
    assert code == 7

    def rejected(name):
        raise AssertionError(f"{name} is not JSON")

    lines = [json.loads(line, parse_constant=rejected) for line in text.splitlines()]
    found = {line["event"]: line for line in lines}
    assert all(found[name]["step"] == 3 and found[name]["run_id"] == "r1" for name in NAMES)
    assert found["no_numbers"]["value"] == ["NaN", {"inner": "-Infinity"}]
    assert "s3cr3t-value" not in text


def test_values_that_have_no_text_as_text():
    """The same, in words."""
    code, text = speak(BAD_VALUES, form="text")
    assert code == 7
    assert all(name.replace("_", " ") in text or name in text for name in NAMES)
    assert "s3cr3t-value" not in text


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_full_disk(form):
    """Printing and logging to a full disk raise nothing, whoever does it."""
    code = "configure()\nfor _ in range(100): print('x' * 10_000); log.info('a')\nend()"
    command = [sys.executable, "-c", PROLOGUE + code, form]
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(command, cwd=ROOT, stdout=full, stderr=full, timeout=60, check=False).returncode == 7


def test_a_reader_that_stops_reading(tmp_path):
    """The job waits for a bounded time, then lines are dropped; they are counted once the reader reads again."""
    code = """
    configure()
    for number in range(300):
        log.info("many", data="x" * 10_000)
    Path("logged").touch()
    while not Path("read").exists():
        time.sleep(0.01)
    log.info("last")
    """
    command = [sys.executable, "-c", PROLOGUE + textwrap.dedent(code) + "\nend()", "json"]
    child = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    try:
        _until(lambda: (tmp_path / "logged").exists() or child.poll() is not None)
        first = json.loads(child.stdout.readline())
        (tmp_path / "read").touch()
        rest = [json.loads(line) for line in child.stdout]
        assert child.wait(20) == 7
    finally:
        child.kill()
    (report,) = [line for line in rest if line["event"] == "log_lines_lost"]
    lines = [first, *rest]
    assert lines[-1]["event"] == "last"
    assert report["level"] == "warning"
    assert report["lines"] + sum(line["event"] == "many" for line in lines) == 300


def test_a_disk_that_has_room_again(tmp_path):
    """The first line after an outage comes after one report of how many were lost, and why."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    output = Output(descriptor, lambda lines, reason: f"{lines} lost: {reason}".encode())
    for number in range(3):
        output.put(b"lost %d" % number)
    output.finish()
    with (tmp_path / "log").open("wb") as log:
        os.dup2(log.fileno(), descriptor)
    output.put(b"next")
    output.put(b"last")
    output.finish()
    assert (tmp_path / "log").read_text() == "3 lost: No space left on device\nnext\nlast\n"


def test_a_reader_that_is_slow(monkeypatch):
    """One that reads a line now and then does not hold the job for each line that it reads."""
    monkeypatch.setattr(capture, "STALL_SECONDS", 0.01)
    reading, writing = os.pipe()
    output = Output(writing, lambda lines, reason: b"lost")
    for _ in range(20):
        output.put(b"x" * 99_999)  # more than fits
    monkeypatch.setattr(capture, "STALL_SECONDS", 3600)
    for _ in range(100_000 // 50):
        os.read(reading, 50)
    slow = threading.Thread(target=lambda: [output.put(b"x" * 99_999) for _ in range(20)], daemon=True)
    slow.start()
    slow.join(20)
    assert not slow.is_alive()


def test_the_rest_of_a_line_is_none(tmp_path):
    """What a killed log process left of a line is dropped, also where it looks like an object."""
    with (tmp_path / "log").open("wb") as log:
        pump = Pump(log.fileno(), {})
        pump.own(b'{"loss": 1}}')
        pump.own(b'{"timestamp": "now", "event": "last"}')
        pump.output.finish()
    assert (tmp_path / "log").read_text() == '{"timestamp": "now", "event": "last"}\n'


def test_a_descriptor_that_does_not_block(tmp_path):
    """Somebody else who shares stdout made it non-blocking: no line is lost."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    output = Output(writing, lambda lines, reason: b"lost")
    for _ in range(100):
        output.put(b"x" * 9999)
    received = b""
    while len(received) < 1_000_000:
        received += os.read(reading, 65_536)
    assert received == (b"x" * 9999 + b"\n") * 100


PROGRAM = """
import runpy, sys
from pathlib import Path
from job.observability import termination
termination.PLACE = Path(sys.argv.pop(1))
runpy.run_module("job", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("redirection", "form"),
    [
        (">&-", "json"),
        ("<&- >&- 2>&-", "json"),
        pytest.param("> /dev/full", "json", marks=pytest.mark.full),
        pytest.param("<&- >&- 2>&-", "text", marks=pytest.mark.full),
        pytest.param("> /dev/full 2>&1", "text", marks=pytest.mark.full),
        pytest.param("2>&-", "json", marks=pytest.mark.full),
        pytest.param("<&-", "json", marks=pytest.mark.full),
        pytest.param(">&- 2>&-", "json", marks=pytest.mark.full),
        pytest.param("<&- 2>&-", "json", marks=pytest.mark.full),
        pytest.param(">&-", "text", marks=pytest.mark.full),
    ],
)
def test_an_error_keeps_its_code_and_its_message(tmp_path, redirection, form):
    """Wherever stdout leads, a bad environment ends with 78 and the termination message."""
    (tmp_path / "message").touch()
    command = ["bash", "-c", f'exec "$@" {redirection}', "-", sys.executable, "-c", PROGRAM, str(tmp_path / "message")]
    environment = {**os.environ, "TUNE_BATCH_SIZE": "0", "TUNE_LOG_FORMAT": form}
    assert subprocess.run(command, cwd=ROOT, env=environment, timeout=60, check=False).returncode == 78
    assert json.loads((tmp_path / "message").read_bytes())["exit_code"] == 78


@pytest.mark.parametrize("redirection", ["> /dev/full", ">&-"])
@pytest.mark.parametrize(
    "command", ["variables --json", "env --json", pytest.param("check --json", marks=pytest.mark.full)]
)
def test_a_result_that_cannot_be_written_is_an_error(command, redirection):
    """Where stdout is the result, the command fails with a message on stderr."""
    shell = f'exec "$@" {command} {redirection}'
    done = subprocess.run(
        ["bash", "-c", shell, "-", sys.executable, "-m", "job"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 74
    assert json.loads(done.stderr.splitlines()[-1])["event"] == "run_failed"
    assert "Traceback" not in done.stderr


def test_a_reader_of_a_result_may_leave():
    """`python -m job variables | head -1` is no error."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "job", "variables"]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


SETTINGS = {"max_length": 128, "samples": 0, "batch_size": 4, "lora_r": 4, "max_steps": 2, "log_format": "json"}


@pytest.fixture
def train(tiny_model, rows, tmp_path):
    """Start a training whose stdout and stderr are a file, with hooks; its exit code and its run's folder."""

    def begin(log, *hooks, **variables):
        settings = {
            **SETTINGS,
            "model": tiny_model,
            "dataset": rows,
            "output": tmp_path / "out",
            "run_id": "r",
            **variables,
        }
        named = {f"TUNE_{name.upper()}": str(value) for name, value in settings.items()}
        kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
        (tmp_path / "scratch").mkdir(exist_ok=True)
        environment = {**kept, "TMPDIR": str(tmp_path / "scratch"), "OMP_NUM_THREADS": "1", **named}
        pid = zygote().fork({"env": environment, "log": str(log), "hooks": list(hooks)})
        return zygote().wait(pid, 120), tmp_path / "out" / "r"

    return begin


def test_a_run_on_a_full_disk_for_its_log(train):
    """The run trains and publishes."""
    code, run = train("/dev/full")
    assert code == 0
    assert json.loads((run / "done.json").read_bytes())


@pytest.mark.parametrize(
    ("outcome", "code", "hook"),
    [
        ("unknown", 1, ["fail_at_step", 2]),
        pytest.param("interrupted", 75, ["signal_at_step", 2, signal.SIGTERM], marks=pytest.mark.full),
    ],
)
def test_an_error_on_a_full_disk_for_the_log(train, tmp_path, outcome, code, hook):
    """How the attempt ended is recorded, and the termination message is written."""
    (tmp_path / "message").touch()
    found, run = train("/dev/full", ["termination_log", str(tmp_path / "message")], hook)
    assert found == code
    assert json.loads((run / "attempts/0001.end.json").read_bytes())["outcome"] == outcome
    assert json.loads((tmp_path / "message").read_bytes())["exit_code"] == code
    assert (run / "failure.json").exists() == (code == 1)


def test_a_run_whose_log_process_is_killed(train, tmp_path):
    """Libraries print on, an observer raises, a value has no text: the run publishes, and its log continues."""
    log = tmp_path / "log"
    code, run = train(log, ["break_the_log", 1])
    assert code == 0
    assert (run / "done.json").exists()
    names = [line["event"] for line in map(json.loads, log.read_text().splitlines())]
    assert {"log_process_ended", "observer_failed", "value_without_text", "run_complete"} <= set(names)


@pytest.mark.full
@pytest.mark.parametrize("form", ["json", "text"])
def test_a_run_without_standard_streams(train, form):
    """Trained with descriptors 0, 1 and 2 closed."""
    code, run = train("/dev/null", ["close_streams"], log_format=form)
    assert code == 0
    assert (run / "done.json").exists()


def _until(condition, seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
