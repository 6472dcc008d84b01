"""Every line a JSON object, whoever prints it; no secret in any; the last words of a dying process are kept."""

import json
import subprocess
import sys
import textwrap

import pytest

from job.observability import termination
from job.runtime.errors import DataError

pytestmark = pytest.mark.process

PROLOGUE = """
import ctypes, logging, os, sys, threading, warnings
import structlog, tqdm
from job.observability import logs
logs.configure(form="json", level="info", secrets=["s3cr3t-value", 'quo"ted-secret'])
logs.bind(run_id="r1", attempt=2, rank=0)
log = structlog.get_logger()
"""


def speak(code: str) -> tuple[int, list[dict]]:
    """Run code under the JSON logger; its exit code and its lines, each parsed."""
    program = PROLOGUE + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


END = "\nlogs.close(); os._exit(0)"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        pytest.param("print('banner')", "banner", id="print"),
        pytest.param("os.write(2, b'from C++\\n')", "from C++", id="file descriptor 2"),
        pytest.param("os.system('echo child')", "child", id="child process"),
        pytest.param("sys.stdout.write('no newline')", "no newline", id="unfinished line"),
        pytest.param("ctypes.CDLL(None).puts(b'libc'); ctypes.CDLL(None).fflush(None)", "libc", id="libc"),
        pytest.param("logging.getLogger('lib').warning('lib %s', 3)", "lib 3", id="logging"),
        pytest.param("print('\\x1b[31mred\\x1b[0m')", "red", id="colours are dropped"),
    ],
)
def test_library_output_is_json(code, message):
    """What anybody prints becomes a `library_output` line with the run's context."""
    _, lines = speak(code + END)
    (line,) = lines
    assert line["event"] == "library_output"
    assert line["message"] == message
    assert (line["run_id"], line["attempt"], line["rank"]) == ("r1", 2, 0)


def test_progress_bars_leave_one_line():
    """Of a progress bar only what a terminal would show at the end is kept."""
    _, lines = speak("for _ in tqdm.tqdm(range(50)): pass" + END)
    assert len(lines) == 1
    assert "50/50" in lines[0]["message"]


def test_warnings_and_own_events():
    """Warnings are captured; own events keep their fields, and the first keys come first."""
    _, lines = speak("warnings.warn('careful'); log.info('dataset_ready', rows=3)" + END)
    assert any("careful" in line["message"] for line in lines if line["event"] == "library_output")
    own = next(line for line in lines if line["event"] == "dataset_ready")
    assert ["timestamp", "level", "event", "run_id", "attempt", "rank", "rows"] == list(own)


def test_secrets_are_replaced_everywhere():
    """A secret is replaced in events, prints, library logs and tracebacks, also where JSON escapes it."""
    code = """
    print('x s3cr3t-value'); os.write(2, b's3cr3t-value\\n'); logging.getLogger('l').error('s3cr3t-value')
    log.info('a', value='s3cr3t-value', other='quo"ted-secret')
    try:
        secret = 's3cr3t-value'; raise ValueError('s3cr3t-value')
    except ValueError:
        log.exception('run_failed')
    """
    _, lines = speak(textwrap.dedent(code) + END)
    assert len(lines) == 5
    text = json.dumps(lines)
    assert "s3cr3t-value" not in text
    assert "ted-secret" not in text
    assert text.count("***") >= 6


def test_printed_addresses_are_shown_without_secrets():
    """What libraries print of an address loses passwords and signatures, also those that nobody knew before."""
    code = """
    print("Error while downloading from https://cdn/x?Policy=p&Signature=0a1b2c&Key-Pair-Id=K")
    def fail(): raise ValueError("https://user:hunter2@host/a")
    thread = threading.Thread(target=fail); thread.start(); thread.join()
    """
    _, lines = speak(textwrap.dedent(code) + END)
    text = json.dumps(lines)
    assert "Signature=***&Key-Pair-Id=K" in text
    assert "https://***@host/a" in text
    assert "0a1b2c" not in text
    assert "hunter2" not in text


def test_a_long_printed_line_keeps_no_part_of_a_secret():
    """It loses its beginning after its secrets."""
    _, lines = speak("print('x' * 300_000 + 's3cr3t-value' + 'y' * (32_768 - 6))" + END)
    (line,) = lines
    assert "-value" not in line["message"]
    assert len(line["message"]) == 32_768


def test_secrets_are_replaced_on_a_terminal_too():
    """Readable lines hide the same secrets, and list every problem of a bad environment whole."""
    program = PROLOGUE.replace('form="json"', 'form="text"') + textwrap.dedent("""
    problems = [f"problem {n} " + "x" * 100 for n in range(9)]
    log.error("run_failed", message='m s3cr3t-value quo"ted-secret', problems=problems)
    logs.close()
    """)
    shown = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert "m *** ***" in shown
    assert all(f"problem {n} " in shown for n in range(9))


def test_last_words_of_an_abort_are_kept():
    """What a library writes right before it aborts the process is delivered, as JSON."""
    code, lines = speak("os.write(2, b'terminate called\\n'); os.kill(os.getpid(), 9)")
    assert code == -9
    assert [line["message"] for line in lines] == ["terminate called"]


def test_a_straggler_cannot_hold_the_end():
    """A child that outlives the job and keeps its output open does not keep the log, or the exit, waiting."""
    program = PROLOGUE + "os.system('sleep 60 >&2 &')\nlog.info('last')" + END
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.wait(timeout=20) == 0
    assert b'"last"' in child.stdout.readline()


def test_threads_log_whole_lines():
    """Long lines of many threads and of file descriptors never mix."""
    code = """
    def work():
        for i in range(50):
            log.info('big', data='x' * 20_000); print('y' * 9_000)
    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]; [t.join() for t in threads]
    """
    _, lines = speak(textwrap.dedent(code) + END)
    assert sum(line["event"] == "big" for line in lines) == 200


def test_a_reader_that_leaves_does_not_end_the_run():
    """When nobody reads the log any more, the job continues and ends with its own exit code, in silence."""
    code = "\nimport time\nfor i in range(200):\n    log.info('tick', i=i); print('x' * 1000); time.sleep(0.002)\n"
    program = PROLOGUE + code + "logs.close(); os._exit(7)"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    assert child.wait(timeout=30) == 7
    assert child.stderr.read() == b""


def test_a_last_message_with_half_a_character_is_written(tmp_path, monkeypatch):
    """Whatever a message quotes, the platform gets a line of JSON, within its limit."""
    monkeypatch.setattr(termination, "PLACE", tmp_path / "log")
    (tmp_path / "log").touch()
    termination.write(DataError("half a \ud800" + "é" * 9000, remedy="Correct it."))
    line = (tmp_path / "log").read_bytes()
    assert len(line) <= termination.LONGEST_BYTES
    assert json.loads(line)["message"].startswith("half a ?é")
