"""The table of variables for people and programs: text, JSON, or Markdown."""

from __future__ import annotations

import json

from job.config.field import Setting
from job.config.schema import SETTINGS

MARK = "*"


def render(form: str) -> str:
    """The table as `text`, `json` or `markdown`."""
    return {"text": _text, "json": _json, "markdown": _markdown}[form]()


def _text() -> str:
    blocks = [
        f"{s.variable}{MARK if s.fingerprint else ''}\n    {s.meaning}\n    {s.kind.rule}; default: {s.default_text}\n"
        for s in SETTINGS
    ]
    return "\n".join([*blocks, f"{MARK} decides the result: part of the run's identity.\n"])


def _json() -> str:
    return json.dumps([_as_json(s) for s in SETTINGS], indent=2) + "\n"


def _as_json(setting: Setting) -> dict[str, object]:
    return {
        "name": setting.variable,
        "default": setting.default,
        "required": setting.required,
        "fingerprint": setting.fingerprint,
        "rule": setting.kind.rule,
        "meaning": setting.meaning,
        "schema": setting.kind.schema,
    }


def _markdown() -> str:
    rows = [
        f"| `{s.variable}`{MARK if s.fingerprint else ''} | {s.default_text} | {s.meaning}. {_rule(s)} |"
        for s in SETTINGS
    ]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _rule(setting: Setting) -> str:
    return f"Value: {setting.kind.rule}."
