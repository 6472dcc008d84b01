"""`TUNE_*` variables -> `Config`. Reports every problem at once; knows nothing of what the values are used for."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from environs import EnvValidationError, FileAwareEnv
from marshmallow import ValidationError

from job.config import rules
from job.config.field import PREFIX, Setting
from job.config.schema import SETTINGS, Config
from job.runtime import process
from job.runtime.errors import ConfigError

FILE_SUFFIX = "_FILE"
NEAR = 0.75


def load() -> Config:
    """Read every `TUNE_*` variable.

    Raises:
        ConfigError: with every problem at once, each naming the variable, its value, the rule and the remedy.
    """
    problems = _unknown_names() + _doubled_names() + process.place_problems()
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        try:
            values[setting.name] = _read(setting)
        except ValueError as error:
            problems.append(str(error))
    if not problems:
        config = Config(**values)
        problems = rules.problems(config) + _lost_outputs(config)
    if problems:
        raise ConfigError(
            "The environment is not valid.",
            remedy="Fix the problems listed here; `python -m job variables` lists every variable and its rule.",
            problems=problems,
        )
    return config


def _read(setting: Setting) -> Any:
    """One variable's value.

    Raises:
        ValueError: with the whole problem in words.
    """
    environment = FileAwareEnv(eager=False, strip_whitespace=True)
    environment.add_parser("setting", lambda raw: raw if raw is setting.default else _parse(setting, raw))
    name = setting.variable
    if not os.environ.get(name, "").strip() and not os.environ.get(name + FILE_SUFFIX):
        # An empty variable is an unset one: charts and compose files pass empty strings for values left out.
        if setting.required:
            raise ValueError(f"{name} is not set. It is required: {setting.kind.rule} ({setting.meaning}).")
        return setting.default
    try:
        value = environment.setting(name, setting.default)
        environment.seal()
    except EnvValidationError:
        raise ValueError(
            f"{name}={_shown(name)!r} is not valid. Expected: {setting.kind.rule} (default: {setting.default_text}). "
            f"{setting.kind.broken(os.environ.get(name, '').strip())}".rstrip()
        ) from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(
            f"{name}{FILE_SUFFIX}={os.environ.get(name + FILE_SUFFIX)!r} cannot be read: {error}"
        ) from None
    return value


def _parse(setting: Setting, raw: str) -> Any:
    value = setting.kind.field.deserialize(raw.strip())
    if isinstance(value, str) and "\n" in value:
        raise ValidationError("The value has a line break.")
    return value


def _shown(name: str) -> str:
    return os.environ.get(name) or f"<content of {os.environ.get(name + FILE_SUFFIX)}>"


def _unknown_names() -> list[str]:
    known = {setting.variable for setting in SETTINGS}
    problems = []
    for name in sorted(os.environ):
        if not name.startswith(PREFIX) or name in known or name.removesuffix(FILE_SUFFIX) in known:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=NEAR)
        remedy = f"Did you mean {near[0]}?" if near else "`python -m job variables` lists them all."
        problems.append(f"{name} is not a variable of this job. {remedy}")
    return problems


def _lost_outputs(config: Config) -> list[str]:
    if config.output.startswith("s3://") or not process.is_scratch(Path(config.output)):
        return []
    problem = (
        f"TUNE_OUTPUT={config.output!r} lies in the scratch directory (TMPDIR), which is gone with its machine or pod. "
        "Name a volume that stays, or s3://bucket/prefix."
    )
    return [problem]


def _doubled_names() -> list[str]:
    return [
        f"{s.variable} and {s.variable}{FILE_SUFFIX} are both set. Keep one of them."
        for s in SETTINGS
        if os.environ.get(s.variable) and os.environ.get(s.variable + FILE_SUFFIX)
    ]


def asked_log_format() -> Any:
    """`TUNE_LOG_FORMAT` before anything is validated, so that the error itself is shown in that format."""
    try:
        return _read(next(setting for setting in SETTINGS if setting.name == "log_format")) or "auto"
    except ValueError:
        return "auto"
