"""`python -m job check`: whether a run would begin, and what it would learn, reported in seconds and without a GPU.

The checks collect whatever is wrong (`job.commands.checks`); the first problem that a run would end with gives the exit
code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from job.commands.check_text import show
from job.commands.checks import Checked, check
from job.config import environment
from job.config.schema import Config
from job.data.prepare import Data
from job.model.base_model import BaseModel
from job.observability import logs, termination
from job.observability.json_text import dumps
from job.observability.redaction import secret_values
from job.report import build
from job.runtime import process, streams
from job.runtime.errors import ConfigError, StopRequested


def command(*, as_json: bool, report: Path | None) -> int:
    """Check, and say on stdout what was found; logs go to stderr.

    Args:
        as_json: one JSON object instead of words.
        report: where to write the page.

    Returns:
        the exit code, as of a run.
    """
    started = time.monotonic()
    result = streams.to_stderr()
    secrets = secret_values(process.variables())
    logs.configure(form=environment.asked_log_format(), level="warning", secrets=secrets)
    checked = Checked()
    with contextlib.suppress(StopRequested):
        check(checked)
    written = None
    with checked.collecting("report"):
        written = _write(checked, report)
    facts = {**_facts(checked), "report": str(written) if written else None, "seconds": time.monotonic() - started}
    said = dumps(logs.redact(facts)) + "\n"
    with streams.result(result) as stdout:
        if as_json:
            stdout.write(said)
        else:
            show(json.loads(said), stdout)
    if checked.problems:
        termination.write(checked.problems[0].error)
    return checked.exit_code


def _write(checked: Checked, path: Path | None) -> Path | None:
    """Write the page, if one is asked for and anything is known; returns where it is.

    Raises:
        ConfigError: it cannot be written there.
    """
    page = checked.page() if path else None
    if path is None or page is None:
        return None
    try:
        path.write_bytes(page.encoded())
    except OSError as error:
        raise ConfigError(
            f"The report cannot be written to {path}: {error.strerror}.",
            remedy="Give --report a file in an existing, writable directory.",
        ) from None
    return path


def _facts(checked: Checked) -> dict[str, Any]:
    """All that was found, as JSON holds it."""
    config, data, base = checked.config, checked.data, checked.base
    return {
        "ok": not checked.problems,
        "finished": bool(checked.output and checked.output.finished),
        "exit_code": checked.exit_code,
        "run_id": config.identity() if config else None,
        "problems": [problem.as_json() for problem in checked.problems],
        "findings": [dataclasses.asdict(finding) for finding in data.all_findings()] if data else [],
        "output": _output_facts(checked),
        "model": _model(base) if base else None,
        "files": [dataclasses.asdict(facts) for facts in checked.rows.files] if checked.rows else [],
        "left_out_files": [dataclasses.asdict(one) for one in checked.rows.left_out] if checked.rows else [],
        "train": dataclasses.asdict(data.train.counts) if data else None,
        "evaluation": dataclasses.asdict(data.held_out) if data and data.held_out else None,
        "eval_note": checked.rows.split.note if checked.rows else "",
        "lengths": _lengths(data, config) if data and config else None,
        "chat_template": data.tokenizer.name if data else None,
        "tokenizer_notes": list(data.tokenizer.notes) if data else [],
        "estimate": dataclasses.asdict(checked.expected) if checked.expected else None,
    }


def _output_facts(checked: Checked) -> dict[str, Any] | None:
    if checked.config is None:
        return None
    conditional = checked.output.conditional_writes if checked.output else None
    return {"uri": checked.config.output, "conditional_writes": conditional}


def _lengths(data: Data, config: Config) -> dict[str, Any]:
    return dataclasses.asdict(build.length_chart(data.train.lengths, max_length=config.max_length))


def _model(base: BaseModel) -> dict[str, Any]:
    names = ("name", "architecture", "parameters", "positions", "prequantised")
    return {name: getattr(base, name) for name in names}
