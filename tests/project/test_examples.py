"""The examples in the documents: configuration is accepted, filters find lines, alerts ask for metrics that are there,
sizes follow from their rules."""

import ast
import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jq
import jsonschema
import promql_parser
import pytest
import yaml

from job.commands import variables
from job.config.schema import FORMATS, SETTINGS
from job.data.reading import formats
from job.model import memory, shape
from job.observability import prometheus
from job.state.model_card import Card
from tests import documents, messages
from tests.jobs import ROOT

README = ROOT / "README.md"
MONITORING = ROOT / "docs/monitoring.md"
SIZING = ROOT / "docs/sizing.md"
JQ = r"jq -c '(.+?)' run\.log"


@pytest.mark.parametrize("block", documents.every_block("yaml"), ids=lambda block: block.where)
def test_yaml_parses(block):
    """Every YAML example is valid YAML."""
    assert list(yaml.safe_load_all(block.text))


@pytest.mark.parametrize("block", documents.every_block("ini"), ids=lambda block: block.where)
def test_ini_parses(block):
    """Every example of AWS's configuration file is valid INI."""
    parser = configparser.ConfigParser()
    parser.read_string(block.text)
    assert parser.sections()


@pytest.mark.process
@pytest.mark.parametrize(
    "text",
    [pytest.param(block.text, id=block.where) for block in documents.every_block("env")]
    + [pytest.param(path.read_text(), id=path.name) for path in sorted((ROOT / "examples").rglob("*.env"))],
)
def test_environment_examples_are_accepted(text):
    """An example of environment variables, read as `docker run --env-file` reads it, is a valid configuration."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    given = dict(line.split("=", 1) for line in lines)
    assert not any(value != value.strip("\"' ") for value in given.values())  # quotes would be part of the value
    done = _load(given)
    assert done.returncode == 0, done.stderr


def _load(given: dict[str, str]) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TUNE_")}
    return subprocess.run(
        [sys.executable, "-c", "from job.config import environment; environment.load()"],
        cwd=ROOT,
        env=kept | given,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.process
@pytest.mark.parametrize("block", documents.every_block("yaml"), ids=lambda block: block.where)
def test_configuration_in_yaml_is_valid(block):
    """Each `config` map of chart values holds variables with values that the job's schema allows."""
    schema = {row["name"]: row for row in json.loads(variables.render("json"))}
    for document in yaml.safe_load_all(block.text):
        config = document.get("config") if isinstance(document, dict) else None
        for name in config or {}:
            assert name in schema or name.startswith(("AWS_", "HF_")), name
        tuned = {name: str(value) for name, value in (config or {}).items() if name.startswith("TUNE_")}
        if tuned:
            assert _load(tuned).returncode == 0, tuned


def paths(values: dict, prefix: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    inner = (paths(value, (*prefix, name)) if isinstance(value, dict) else set() for name, value in values.items())
    return {(*prefix, name) for name in values}.union(*inner)


def test_values_exist_in_the_chart():
    """Every value in an example for the chart, or after `--set`, is one that the chart has."""
    known = paths(yaml.safe_load((ROOT / "helm/finetune-job/values.yaml").read_text()))
    examples = [yaml.safe_load(block.text) for block in documents.every_block("yaml")]
    used = set().union(*(paths(example) for example in examples if not {"groups", "dependencies"} & example.keys()))
    shell = " ".join(block.text for block in documents.every_block("sh"))
    used |= {tuple(name.split(".")) for name in re.findall(r"--set '?([\w.]+)=", shell)}
    assert used
    assert {path for path in used if path[0] != "config" and path not in known} == set()
    settings = {row["name"] for row in json.loads(variables.render("json"))}
    assert {path[1] for path in used if path[0] == "config" and len(path) > 1} <= settings


def over(base: dict, more: dict) -> dict:
    """Values as Helm puts them over a chart's own."""
    both = {name: over(base[name], value) for name, value in more.items() if isinstance(base.get(name), dict)}
    return {**base, **more, **both}


def test_the_charts_schema_accepts_the_values():
    """The chart's schema, which Helm checks before it renders, accepts every example of values."""
    chart = ROOT / "helm/finetune-job"
    schema = json.loads((chart / "values.schema.json").read_text())
    base = yaml.safe_load((chart / "values.yaml").read_text())
    for block in documents.every_block("yaml"):
        values = yaml.safe_load(block.text)
        if not {"groups", "dependencies"} & values.keys():  # Prometheus' rules, another chart's Chart.yaml
            jsonschema.validate(over(base, values), schema)


def logged() -> list[dict]:
    """A log: the lines of a real run on a GPU, and one of each kind that it had no reason to log."""
    recorded = ROOT / "benchmarks/results/gpu-run-2026-11-22-h100.jsonl"
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    warned = {"level": "warning", "timestamp": "", "run_id": "a", "attempt": 1, "event": "storage_retry", "error": "x"}
    failed = {"level": "error", "event": "run_failed", "kind": "data", "exit_code": 65, "message": "m", "remedy": "r"}
    return [*lines, warned, failed]


def filters() -> list:
    """The filters of all jq commands in the documents that claim to be run here: `jq -c '...' run.log`."""
    here = str(Path(__file__).relative_to(ROOT))
    found = [(b.where, b.text) for b in documents.every_block("sh") if b.value == here]
    return [
        pytest.param(f, id=f"{where}-{i}") for where, t in found for i, f in enumerate(re.findall(JQ, t, re.DOTALL))
    ]


@pytest.mark.parametrize("program", filters())
def test_jq_filters_find_what_they_are_for(program):
    """Each jq filter of the documents is valid and finds lines in a log, where each field that it names has a value."""
    found = list(jq.compile(program).input_values(logged()))
    assert found
    assert None not in (found[0].values() if isinstance(found[0], dict) else found[0]) or "problems" in program


def rules() -> list[dict]:
    """The alerting rules in the documents."""
    files = [yaml.safe_load(block.text) for block in documents.every_block("yaml")]
    return [rule for file in files if "groups" in file for group in file["groups"] for rule in group["rules"]]


def test_alerts_use_metrics_that_exist():
    """Each Prometheus rule parses, and asks for metrics that the job has, or kube-state-metrics'."""
    known = {prometheus.name(event, field) for event, fields in prometheus.EVENTS.items() for field in fields}
    known |= {"finetune_job_checkpoint_timestamp_seconds", "kube_job_failed"}
    assert rules()
    for rule in rules():
        assert promql_parser.parse(rule["expr"])
        assert set(re.findall(r"\b(?:finetune_job|kube)_\w+", rule["expr"])) <= known, rule["alert"]


@pytest.mark.parametrize("section", ["Logs", "Alerts"])
def test_events_named_for_monitoring_exist(section):
    """Every event in the tables of the monitoring page is one that the program logs."""
    rows = re.findall(r"^\| (`.+?) \|", documents.section(MONITORING.read_text(), section), re.MULTILINE)
    named = {span for row in rows for span in documents.spans(row)}
    assert named
    assert named - messages.all_events() == set()


SHAPES = {
    "1.5B": (2048, 8192, 16, 512, 128_256),
    "7B": (4096, 11_008, 32, 4096, 32_000),
    "8B": (4096, 14_336, 32, 1024, 128_256),
    "13B": (5120, 13_824, 40, 5120, 32_000),
    "70B": (8192, 28_672, 80, 1024, 128_256),
}
"""Llama shapes: hidden size, intermediate size, layers, width of keys and values, vocabulary."""
TOKENS = 16_384


def sizes(dimensions: tuple[int, ...]) -> list[str]:
    """The column of the sizing table, by the formulas that `python -m job check` estimates with."""
    hidden, inner, layers, keys, vocabulary = dimensions
    llama = shape.llama(hidden=hidden, inner=inner, layers=layers, keys=keys, vocabulary=vocabulary)
    adapter = llama.adapter(16)
    on_card = [memory.weight_bytes(llama, precision) for precision in ("4bit", "8bit", "16bit")]
    trained = adapter * (memory.ADAPTER_BYTES + memory.GRADIENT_BYTES + memory.STATE_BYTES["adamw_8bit"])
    giga = [*on_card, trained, 2 * llama.parameters, memory.moved_bytes(llama, TOKENS)]
    four, eight, sixteen, states, files, moved = (f"{size / 1e9:.1f}" for size in giga)
    checkpoint = f"{6 * adapter / 1e6:.0f}"  # adapter in 32 bit, and two states of a byte each
    parameters = f"{llama.parameters / 1e9:.2f}"
    return [parameters, f"{adapter / 1e6:.1f}", four, eight, sixteen, states, checkpoint, files, moved]


def test_sizes_follow_from_the_shapes():
    """The sizing table is what its rules give for the shapes, and the rules give what was measured for the first."""
    section = documents.section(SIZING.read_text(), "By model")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    assert table[0][1:] == list(SHAPES)
    columns = list(zip(*(row[1:] for row in table[2:]), strict=True))
    assert [list(column) for column in columns] == [sizes(dimensions) for dimensions in SHAPES.values()]
    measured = json.loads((ROOT / "benchmarks/results/gpu-run-2026-11-22-h100.json").read_text())["model_loaded"]
    first = sizes(SHAPES["1.5B"])
    assert first[0] == f"{measured['parameters'] / 1e9:.2f}"
    assert first[1] == f"{measured['trainable_parameters'] / 1e6:.1f}"
    assert first[2] == f"{measured['gpu_memory_allocated_bytes'] / 1e9:.1f}"


@pytest.mark.parametrize("block", documents.every_block("jsonl"), ids=lambda block: block.where)
def test_rows_are_read(block):
    """Every example of rows is valid, and its format is detected; together they show all formats."""
    for line in block.text.splitlines():
        row = json.loads(line)
        found = formats.detect_format(block.where, formats.columns_of(row))
        formats.parse_row(row, format=found, source=block.where, line=1)
    shown = {
        formats.detect_format("", set(json.loads(line)))
        for b in documents.every_block("jsonl")
        for line in b.text.splitlines()
    }
    assert shown == set(FORMATS)


def test_the_log_in_the_readme_was_logged():
    """Each log line in the README is part of one of a recorded run, and the program still logs its event."""
    shown = re.findall(r'\{"event": [^{}]+\}', README.read_text())
    assert len(shown) > 5
    for line in map(json.loads, shown):
        assert any(line.items() <= recorded.items() for recorded in logged() if recorded["event"] == line["event"]), (
            line
        )
        assert line["event"] in messages.all_events()


def test_the_readmes_settings_have_the_codes_defaults():
    """The README's table of settings shows ten variables with their defaults."""
    section = documents.section(README.read_text(), "The ten settings that matter")
    shown = dict(re.findall(r"^\| `(TUNE_\w+)` \| (.+?) \|", section, re.MULTILINE))
    assert len(shown) == 10
    assert shown.items() <= {setting.variable: setting.default_text for setting in SETTINGS}.items()


def test_the_adapter_is_loaded_as_its_card_says():
    """The README loads the base with the same quantisation as the model card."""
    (block,) = documents.every_block("python")
    facts = {"base_revision": None, "base_hashes": {}, "data": (), "plan": {}, "metrics": {}, "versions": {}}
    card = Card(base="org/name", settings={"TUNE_PRECISION": "4bit"}, template="", **facts).text()
    ours, cards = quantisation(block.text), quantisation(card.split("```python\n")[1].split("```")[0])
    assert ours == cards != {}


def quantisation(source: str) -> dict[str, str]:
    """The arguments of `BitsAndBytesConfig` in a piece of Python."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return {
        k.arg: ast.unparse(k.value) for c in calls if ast.unparse(c.func) == "BitsAndBytesConfig" for k in c.keywords
    }
