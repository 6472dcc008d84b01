"""What is generated of `helm/finetune-job` and `k8s/`. `make chart-schema` writes it; tests compare.

The table of variables (`job.config.schema.SETTINGS`) makes the schema of `config` and `files/variables.json`; the
comments in `values.yaml` make the schema's descriptions and the README's table; the chart itself makes the manifests of
`k8s/`.
"""

import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from job.config.field import Setting
from job.config.schema import SETTINGS, Config
from tests import kustomize, manifests

CHART = manifests.CHART
HINTS = typing.get_type_hints(Config)
FLOAT = r"[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?"


def kind_of(setting: Setting) -> str:
    """How the chart's templates treat a value; a `switch` has words that YAML takes for booleans (`on`, `off`)."""
    if typing.get_origin(HINTS[setting.name]) is tuple:
        return "list"
    plain = _plain(setting)
    if plain["type"] in ("integer", "number"):
        return "number"
    if plain["type"] == "boolean":
        return "flag"
    return "switch" if {"on", "off"} & set(plain.get("enum", ())) else "text"


def _plain(setting: Setting) -> dict[str, Any]:
    """The schema without `auto`."""
    schema = setting.kind.schema
    return schema["anyOf"][-1] if "anyOf" in schema else schema


def accepted(setting: Setting) -> dict[str, Any]:
    """What YAML may hold for a variable: its own type, or the text that the environment would have; null leaves it out.

    One schema with several types and not `anyOf`: a keyword binds only its own type, and the message names the rule.
    """
    plain, kind = _plain(setting), kind_of(setting)
    auto = "auto|" if "anyOf" in setting.kind.schema else ""
    if kind == "number":
        whole = plain["type"] == "integer"
        bounds = {key: value for key, value in plain.items() if key != "type"}
        text = "[0-9]+" if whole else FLOAT
        return {"type": [plain["type"], "string", "null"], **bounds, "pattern": f"^(?:{auto}{text})$"}
    if kind == "flag":
        return {"type": ["boolean", "string", "null"], "pattern": "^(?:true|false)$"}
    if kind == "list":
        items = {"allOf": [plain["items"], {"pattern": "^[^,]*$"}]}
        text = {"pattern": _listed(plain["items"]["enum"])} if "enum" in plain["items"] else {"minLength": 1}
        return {"type": ["string", "array", "null"], **text, "minItems": 1, "items": items}
    if "enum" in plain:
        return {"enum": [*plain["enum"], *((True, False) if kind == "switch" else ()), None]}
    return {"type": ["string", "null"], "pattern": plain["pattern"]}


def _listed(words: list[str]) -> str:
    one = "(?:" + "|".join(words) + ")"
    return f"^ *{one}(?: *, *{one})* *$"


def config_schema() -> dict[str, Any]:
    """The schema of the chart's `config`."""
    names = "|".join(s.variable for s in SETTINGS)
    file = {
        "description": "Path of a mounted file that holds the value.",
        "type": ["string", "null"],
        "pattern": "^/.+",
    }
    return {
        "description": "Generated from the table of variables.",
        "type": "object",
        "additionalProperties": False,
        "patternProperties": {f"^(?:{names})_FILE$": file},
        "properties": {s.variable: {"description": _described(s), **accepted(s)} for s in SETTINGS},
    }


def _described(setting: Setting) -> str:
    return f"{setting.meaning}. Value: {setting.kind.rule}. Default: {setting.default_text}."


def variables() -> str:
    """`files/variables.json`: what the templates need to know of each variable."""
    rows = [
        {
            "name": s.variable,
            "type": kind_of(s),
            "required": s.required,
            "fingerprint": s.fingerprint,
            "default": "" if s.default_text in ("required", "none") else s.default_text,
            "rule": s.kind.rule,
            "meaning": s.meaning,
            **{k: v for k, v in _plain(s).items() if k in ("minimum", "exclusiveMinimum", "maximum")},
        }
        for s in SETTINGS
    ]
    return json.dumps(rows, indent=1) + "\n"


def cron_schema() -> dict[str, Any]:
    """Five fields as the CronJob controller reads them, or a nickname; empty where no schedule is needed.

    A failed `pattern` would show 2,000 characters of it. A failed `const` shows its text: the rule in words.
    """
    months = "|".join((names := "jan feb mar apr may jun jul aug sep oct nov dec").split() + names.upper().split())
    days = "|".join((names := "sun mon tue wed thu fri sat").split() + names.upper().split())
    values = [
        "[0-5]?[0-9]",
        "[01]?[0-9]|2[0-3]",
        "0?[1-9]|[12][0-9]|3[01]",
        f"0?[1-9]|1[0-2]|{months}",
        f"0?[0-6]|{days}",
    ]
    parts = [rf"(?:[*?]|(?:{value})(?:-(?:{value}))?)(?:/[1-9][0-9]*)?" for value in values]
    fields = " +".join(f"{part}(?:,{part})*" for part in parts)
    nicknames = "@(?:yearly|annually|monthly|weekly|daily|midnight|hourly)"
    rule = (
        "five fields: minute 0-59, hour 0-23, day 1-31, month 1-12 or JAN-DEC, weekday 0-6 or SUN-SAT (0 is Sunday), "
        "such as 0 3 * * 0; or one of @hourly, @daily, @weekly, @monthly, @yearly"
    )
    return {"type": "string", "if": {"pattern": f"^(?:{fields}|{nicknames})?$"}, "else": {"const": rule}}


def values_rows(text: str) -> Iterator[tuple[str, str, str]]:
    """Path, default and meaning of each value: the meaning is the comment above the key."""
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        if found := re.fullmatch(r"( *)# ?(.*)", line):
            comment.append(found[2])
        elif found := re.fullmatch(r"( *)([A-Za-z0-9]+):(.*)", line):
            indent = len(found[1])
            path = [*((depth, key) for depth, key in path if depth < indent), (indent, found[2])]
            dotted = ".".join(key for _, key in path)
            if comment:
                yield dotted, found[3].strip(), " ".join(comment)
            comment = []
        elif not line:
            comment = []


def values_table() -> str:
    """The chart README's table of values."""
    text = (CHART / "values.yaml").read_text()
    defaults = yaml.safe_load(text)
    lines = ["| value | default | meaning |", "|---|---|---|"]
    for path, _, meaning in values_rows(text):
        default: Any = defaults
        for key in path.split("."):
            default = default[key]
        lines.append(f"| `{path}` | `{json.dumps(default)}` | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def rendered_schema(text: str) -> str:
    """The schema with its generated parts as the code has them now; the rest is written by hand."""
    schema = json.loads(text)
    schema["properties"]["config"] = config_schema()
    schema["properties"]["cron"]["properties"]["schedule"] = cron_schema()
    for path, _, meaning in values_rows((CHART / "values.yaml").read_text()):
        node = schema
        for key in path.split("."):
            node = node["properties"][key]
        if path != "config":
            node["description"] = meaning
    return json.dumps(schema, indent=2) + "\n"


def rendered_readme(text: str) -> str:
    """The chart's README with its table of values."""
    pattern = r"(<!-- values: written by make chart-schema -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda found: found[1] + values_table() + found[2], text, flags=re.DOTALL)


def chart_files() -> dict[Path, str]:
    """Every file of the chart that is generated, wholly or in part, and its text."""
    schema, readme = CHART / "values.schema.json", CHART / "README.md"
    return {
        schema: rendered_schema(schema.read_text()),
        readme: rendered_readme(readme.read_text()),
        CHART / "files" / "variables.json": variables(),
    }


def write(files: dict[Path, str]) -> None:
    """Write what changed."""
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


if __name__ == "__main__":
    write(chart_files())
    write(kustomize.generated())  # after the chart, which it is rendered from
