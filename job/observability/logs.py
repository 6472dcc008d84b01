"""Structured logs: one JSON object a line off a terminal, readable lines and a progress bar on one.

`configure` is called once by the process edge. Off a terminal it also captures file descriptors 1 and 2, so that
banners, progress bars, warnings and C++ output of libraries become `library_output` lines
(`job.observability.log_pump`). Everything else logs through `structlog.get_logger()` with constant snake_case events
and units in field names.

Nothing about logging ends a run: neither where the lines go, nor the values in them, nor those who observe them.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from job.observability import terminal
from job.observability.json_text import dumps
from job.observability.log_pump import LogPump
from job.observability.redaction import Redactor
from job.runtime import streams
from job.runtime.errors import words

FIRST_KEYS = ("timestamp", "level", "event", "run_id", "attempt", "rank")
LARGEST_BITS = 63
"""Of a number in the line of an event that could not be shown whole."""
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# Verbose at info.
QUIET = {"botocore": logging.WARNING, "urllib3": logging.WARNING, "s3transfer": logging.WARNING}


@dataclass
class _State:
    """What outlives a single call: the context of every line, what removes secrets, and where lines go."""

    plain: bool = False
    """Whether lines are text."""

    context: dict[str, Any] = field(default_factory=dict)
    redactor: Redactor = field(default_factory=Redactor)
    write: Callable[[str], None] = print
    screen: terminal.Screen | None = None
    pump: LogPump | None = None
    configured: bool = False
    observers: list[Callable[[EventDict], None]] = field(default_factory=list)
    failed: list[Callable[[EventDict], None]] = field(default_factory=list)
    """Observers that raised."""


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
        _inform_pump()
        return
    _state.configured = True
    on_terminal = os.isatty(streams.STDOUT)
    _state.plain = form == "text" or (form != "json" and on_terminal)
    if not (_state.plain and on_terminal):
        _capture()
    streams.tolerate()
    if _state.plain:
        _state.screen = terminal.Screen()
        _state.write = _state.screen.write
    elif _state.pump:
        _state.write = _state.pump.write
    shared = _guarded(
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_context,
        _exceptions(),
        _order,
        _redact,
        _observe,
        _state.screen.render if _state.screen else _as_json,
    )
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, shared],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: _Line(),
        cache_logger_on_first_use=False,
    )
    _adopt_stdlib(shared)


def set_level(level: str) -> None:
    """Change the minimum level of the job's own lines, once the configuration is known."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]))


def bind(**context: Any) -> None:
    """Add fields to every line from here on, in every thread and in captured library output."""
    _state.context = {**_state.context, **context}
    _inform_pump()


def observe(observer: Callable[[EventDict], None]) -> None:
    """Call `observer` with each event as a dictionary, without secrets. What it raises is logged once."""
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
    pid = _state.pump.pid if _state.pump else None
    return set() if pid is None else {pid}


def close() -> None:
    """Deliver everything that was logged or printed. Nothing may be logged afterwards."""
    with contextlib.suppress(Exception):
        if _state.screen:
            _state.screen.close()
    if _state.pump:
        _state.pump.close()


class _Line:
    """The logger at the end of structlog's chain: it writes one finished line."""

    def msg(self, line: str) -> None:
        with contextlib.suppress(Exception):
            _state.write(line)

    debug = info = warning = error = critical = exception = log = msg


def _guarded(*processors: Processor) -> Processor:
    """One processor that applies several; where one fails, a line of what the event says in simple values."""

    def apply(logger: WrappedLogger, name: str, event: EventDict) -> Any:
        found: Any = dict(event)
        try:
            for processor in processors:
                found = processor(logger, name, found)
        except structlog.DropEvent:
            raise
        except Exception as error:  # noqa: BLE001 - logging must never end the run
            return _simple(name, event, error)
        return found

    return apply


def _simple(level: str, event: EventDict, error: Exception) -> str:
    now = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
    fields = {
        name: redact(value)
        for name, value in {**_state.context, **event, "event": words(event.get("event"))}.items()
        if isinstance(value, str) or (isinstance(value, int) and value.bit_length() <= LARGEST_BITS)
    }
    line = {"timestamp": now, "level": level, **fields, "not_logged": type(error).__name__}
    if _state.plain:
        return f"[{level}]{now[11:19]} " + "  ".join(f"{name}={value}" for name, value in line.items())
    return dumps(line)


def _add_context(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return {**_state.context, **event}


def _order(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    first = {key: event[key] for key in FIRST_KEYS if key in event}
    return {**first, **{key: value for key, value in event.items() if key not in first}}


def _observe(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for observer in _state.observers:
        try:
            observer(event)
        except Exception as error:  # noqa: BLE001 - an observer must not be able to end the run
            if observer not in _state.failed:
                _state.failed.append(observer)  # first: it observes the warning, too
                structlog.get_logger().warning("observer_failed", exc_info=error)
    return event


def _redact(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    redacted: EventDict = redact(event)
    return redacted


def _exceptions() -> Processor:
    """Tracebacks without the values of local variables, which may be secrets."""
    if _state.plain:
        return structlog.processors.ExceptionRenderer()
    transformer = structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=30)
    return structlog.processors.ExceptionRenderer(transformer)


def _as_json(_: WrappedLogger, __: str, event: EventDict) -> str:
    return dumps(event)


def _foreign(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """A record of the standard library's logging, as other packages use it."""
    record: logging.LogRecord | None = event.get("_record")
    event["message"] = event.pop("event", "")
    event["event"] = "library_output"
    if record is not None:
        event["logger"] = record.name
    return event


def _adopt_stdlib(shared: Processor) -> None:
    """Let records of the standard library's logging take the same way as the job's own events."""
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[_foreign, structlog.stdlib.ProcessorFormatter.remove_processors_meta, shared]
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
            with contextlib.suppress(Exception):
                self.handleError(record)


def _capture() -> None:
    """Let everything that is written to the file descriptors 1 and 2 go through the pump."""
    with contextlib.suppress(OSError, RuntimeError):  # without a pipe or a thread, lines go to stdout as they are
        _state.pump = LogPump(_facts)
        faulthandler.enable(file=_state.pump.stderr)  # raw, and straight to the real stderr


def _inform_pump() -> None:
    if _state.pump:
        _state.pump.control()


def _facts() -> dict[str, Any]:
    """What the pump needs to know."""
    return {"context": redact(_state.context), "secrets": _state.redactor.forms, "plain": _state.plain}
