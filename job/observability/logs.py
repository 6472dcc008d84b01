"""Structured logs: one JSON object a line off a terminal, readable lines and a progress bar on one.

`configure` is called once by the process edge. Off a terminal it also captures file descriptors 1 and 2, so that
banners, progress bars, warnings and C++ output of libraries become `library_output` lines
(`job.observability.capture`). Everything else logs through `structlog.get_logger()` with constant snake_case events and
units in field names.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from job.observability import capture, terminal
from job.observability.redaction import Redactor

FIRST_KEYS = ("timestamp", "level", "event", "run_id", "attempt", "rank")
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
DRAIN_SECONDS = 5.0
# Verbose at info.
QUIET = {"botocore": logging.WARNING, "urllib3": logging.WARNING, "s3transfer": logging.WARNING}


@dataclass
class _State:
    """What outlives a single call: the context of every line, what removes secrets, and where lines go."""

    context: dict[str, Any] = field(default_factory=dict)
    redactor: Redactor = field(default_factory=Redactor)
    write: Callable[[str], None] = print
    control: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None
    configured: bool = False
    pump: int | None = None
    observers: list[Callable[[EventDict], None]] = field(default_factory=list)


_state = _State()


def configure(*, form: str, level: str, secrets: Iterable[str] = ()) -> None:
    """Set logging up for the process; a second call only adds secrets.

    Args:
        form: `json`, `text`, or `auto` (text on a terminal).
        level: minimum level of the job's own lines; what libraries print is always kept.
        secrets: values that are replaced by `***` wherever they would appear.
    """
    _state.redactor = _state.redactor.with_secrets(secrets)
    if _state.configured:
        _state.control()
        return
    _state.configured = True
    as_json = form == "json" or (form != "text" and not sys.stdout.isatty())
    if as_json:
        _capture()
        last: Processor = structlog.processors.JSONRenderer(ensure_ascii=False, default=str)
    else:
        screen = terminal.Screen()
        _state.write, _state.close = screen.write, screen.close
        last = screen.render
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_context,
        _exceptions(as_json=as_json),
        _order,
        _redact,
        _observe,
        last,
    ]
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, *shared],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: _Line(),
        cache_logger_on_first_use=False,
    )
    _adopt_stdlib(shared)


def to_stderr() -> int:
    """Send stdout to stderr from here on, before `configure`, so that stdout carries the command's result alone.

    Returns:
        a file descriptor of the real stdout.
    """
    result = os.dup(1)
    os.dup2(2, 1)
    return result


def set_level(level: str) -> None:
    """Change the minimum level of the job's own lines, once the configuration is known."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]))


def bind(**context: Any) -> None:
    """Add fields to every line from here on, in every thread and in captured library output."""
    _state.context.update(context)
    _state.control()


def observe(observer: Callable[[EventDict], None]) -> None:
    """Call `observer` with each event as a dictionary, without secrets."""
    _state.observers.append(observer)


def redact(value: Any) -> Any:
    """A JSON-like value without the secrets that `configure` was given, and without credentials in addresses; numbers
    and keys stay (`Redactor`)."""
    return _state.redactor(value)


def redact_data(value: Any) -> Any:
    """The same for what a run keeps of its data: only the secrets that `configure` was given are replaced."""
    return _state.redactor.known(value)


def processes() -> set[int]:
    """The ids of the processes that logging needs to its end."""
    return set() if _state.pump is None else {_state.pump}


def close() -> None:
    """Deliver everything that was logged or printed. Nothing may be logged afterwards."""
    _state.close()


class _Line:
    """The logger at the end of structlog's chain: it writes one finished line."""

    def msg(self, line: str) -> None:
        _state.write(line)

    debug = info = warning = error = critical = exception = log = msg


def _add_context(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return {**_state.context, **event}


def _order(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    first = {key: event[key] for key in FIRST_KEYS if key in event}
    return {**first, **{key: value for key, value in event.items() if key not in first}}


def _observe(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for observer in _state.observers:
        observer(event)
    return event


def _redact(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    redacted: EventDict = redact(event)
    return redacted


def _exceptions(*, as_json: bool) -> Processor:
    """Tracebacks without the values of local variables, which may be secrets."""
    if as_json:
        transformer = structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=30)
        return structlog.processors.ExceptionRenderer(transformer)
    return structlog.processors.ExceptionRenderer()


def _foreign(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """A record of the standard library's logging, as other packages use it."""
    record: logging.LogRecord | None = event.get("_record")
    event["message"] = event.pop("event", "")
    event["event"] = "library_output"
    if record is not None:
        event["logger"] = record.name
    return event


def _adopt_stdlib(processors: list[Processor]) -> None:
    """Let records of the standard library's logging take the same way as the job's own events."""
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[_foreign, structlog.stdlib.ProcessorFormatter.remove_processors_meta, *processors]
    )
    handler = _Handler()
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(capture=True)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            _state.write(self.format(record))
        except Exception:  # noqa: BLE001 - logging must never end the run
            self.handleError(record)


def _capture() -> None:
    """Put the pump between file descriptors 1 and 2 and the real stdout."""
    own_read, own_write = os.pipe()
    foreign_read, foreign_write = os.pipe()
    crash = os.dup(2)
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(capture.__file__)), str(own_read), str(foreign_read)],
        pass_fds=(own_read, foreign_read),
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C at a terminal reaches the job, not the process that writes its log
    )
    os.close(own_read)
    os.close(foreign_read)
    os.dup2(foreign_write, 1)
    os.dup2(foreign_write, 2)
    os.close(foreign_write)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable(file=crash)  # raw, and straight to the real stderr
    lock = threading.Lock()

    def write(line: str) -> None:
        data = line.encode(errors="replace") + b"\n"
        with lock:
            while data:
                data = data[os.write(own_write, data) :]

    def control() -> None:
        message = {"context": redact(_state.context), "secrets": _state.redactor.forms}
        write(capture.CONTROL.decode() + json.dumps(message, default=str))

    def drain() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.close(own_write)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        try:
            process.wait(DRAIN_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    _state.write, _state.control, _state.close, _state.pump = write, control, drain, process.pid
    control()
