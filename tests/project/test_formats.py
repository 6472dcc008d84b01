"""What docs/formats says of the output is what a run writes: every object, field and type, in every example as well."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from job.config.schema import Config
from job.observability.memory import Judge, Usage
from job.runtime.gpus import Gpus
from job.state.attempts import Attempts
from job.state.compile_cache import key as compile_key
from job.state.json_object import LAYOUT
from job.storage.open import open_store
from tests import documents
from tests.jobs import ROOT, run, start, stop_at

pytestmark = pytest.mark.process

FORMATS = ROOT / "docs/formats"
INDEX, RECORD, LEDGER, CACHE = (FORMATS / f"{name}.md" for name in ("README", "record", "ledger", "compile-cache"))
TYPES = {
    "text": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "object": dict,
    "list": list,
    "null": type(None),
    "any": object,
}
SHORT = {"max_steps": 30, "max_length": 128, "samples": 1, "batch_size": 4, "lora_r": 4, "checkpoint_steps": 1}
LINES = ("train_progress", "evaluated", "sample")
MEMORY = "attempts/<n>.memory.json"
"""Only an attempt whose memory runs out writes one."""
KINDS = ("fence", "fresh", "checkpoint", "final", "published")
OBJECTS = {
    "attempts/0003.json": "attempts/<n>.json",
    "attempts/0002.end.json": "attempts/<n>.end.json",
    "attempts/0003.end.json": "attempts/<n>.end.json",
    "attempts/0004.end.json": "attempts/<n>.end.json",
    "failure.json": "failure.json",
    "run.json": "run.json",
    "inputs.json": "inputs.json",
    "lives/0005/run.json": "run.json",
    "lives/0005/inputs.json": "inputs.json",
    "done.json": "done.json",
    "../latest.json": "latest.json",
}
"""Objects of the run below, and the headings that describe them."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """A row of a table of fields."""

    kinds: tuple[str, ...]
    optional: bool


def parts(document: Path) -> dict[str, str]:
    """What stands under each heading of the third level, by its title without backticks."""
    pieces = re.split(r"^### (.+)\n", document.read_text(), flags=re.MULTILINE)[1:]
    return {title.replace("`", ""): text for title, text in zip(pieces[::2], pieces[1::2], strict=True)}


def fields(text: str, *, under: str = "") -> dict[str, Field]:
    """The fields of a table, by their paths."""
    found = {}
    for path, kinds in re.findall(r"^\| `([\w.\[\]]+)` \| ([a-z ,]+?) \|", text, re.MULTILINE):
        words = kinds.removesuffix(", optional")
        found[f"{under}{path}"] = Field(kinds=tuple(words.split(" or ")), optional=words != kinds)
    return found


def wrong(body: object, described: dict[str, Field], *, at: str = "") -> list[str]:
    """How an object differs from its description: fields that are missing, undescribed or of another type."""
    here = {path.removeprefix(at): field for path, field in described.items() if path.startswith(at)}
    own = {path: field for path, field in here.items() if not {".", "["} & set(path)}
    found = [f"{at}{name} is missing" for name, field in own.items() if name not in body and not field.optional]
    for name, value in body.items():
        if name not in own:
            found.append(f"{at}{name} is not described")
            continue
        found += [] if _is(value, own[name].kinds) else [f"{at}{name} is {value!r}, not {' or '.join(own[name].kinds)}"]
        if isinstance(value, dict) and any(path.startswith(f"{name}.") for path in here):
            found += wrong(value, described, at=f"{at}{name}.")
        for item in value if isinstance(value, list) else ():
            if isinstance(item, dict):
                found += wrong(item, described, at=f"{at}{name}[].")
    return found


def _is(value: object, kinds: tuple[str, ...]) -> bool:
    """Whether a value is of one of these types; JSON's booleans are not numbers."""
    return any(
        isinstance(value, TYPES[kind]) and isinstance(value, bool) <= (kind in ("boolean", "any")) for kind in kinds
    )


def examples(text: str) -> list[dict]:
    """The JSON examples of a piece of a document."""
    return [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


@pytest.fixture(scope="module")
def record() -> dict[str, dict[str, Field]]:
    """The described objects of record.md by their headings; where there is a plan, it is described in full."""
    found = {title: fields(text) for title, text in parts(RECORD).items()}
    plan = fields(parts(RECORD)["The plan"], under="plan.")
    return {title: {**table, **plan} if "plan" in table else table for title, table in found.items()}


@pytest.fixture(scope="module")
def ledger(record) -> dict[str, dict[str, Field]]:
    """The kinds of records in ledger.md, each with the fields that all have, and with the plan in full."""
    found = parts(LEDGER)
    every, plan = fields(found["Every record"]), fields(parts(RECORD)["The plan"], under="plan.")
    shared = {path: field for path, field in record["run.json"].items() if path.startswith("asked.")}
    shared |= {path: field for path, field in record["done.json"].items() if path.startswith("results.")} | plan
    return {kind: {**every, **fields(found[kind]), **shared} for kind in KINDS}


@pytest.fixture(scope="module")
def output(tiny_model, rows, tmp_path_factory) -> Path:
    """The folder of a run that met everything: a mistake, a signal, a damaged checkpoint, its end, and a start over
    that failed."""
    place = tmp_path_factory.mktemp("formats")
    same = {
        **SHORT,
        "model": tiny_model,
        "dataset": rows,
        "output": place / "out",
        "run_id": "demo",
        "eval_fraction": 0.2,
    }
    assert run(place, **same, lora_targets="k_porj").code == 78
    assert stop_at(start(place, **same), "checkpoint_committed").code == 75
    commits = [json.loads(path.read_text()) for path in sorted((place / "out/demo/checkpoints/commits").iterdir())]
    damaged = place / "out" / commits[-1]["data"] / "scheduler.pt"
    damaged.write_bytes(damaged.read_bytes()[::-1])
    resumed = run(place, **same)
    assert resumed.code == 0, resumed.lines[-2:]
    assert run(place, **same, lora_targets="k_porj", resume="fresh").code == 78
    assert stop_at(start(place, **same, resume="fresh"), "checkpoint_committed").code == 75
    return place / "out/demo"


def test_every_object_is_listed(output):
    """Each file that a run leaves is one of those in the index, and each of the index is one that this run left."""
    listed = re.findall(
        r"^\| `([^`]+)` \|", documents.section(INDEX.read_text(), "Every object of a run"), re.MULTILINE
    )
    patterns = {name: re.escape(name).replace("<n>", r"\d+").replace(r"\.\.\.", ".+") for name in listed}
    patterns["../latest.json"] = "latest.json"
    paths = [path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()]
    paths += [path.name for path in output.parent.iterdir() if path.is_file()]
    assert [path for path in paths if sum(bool(re.fullmatch(p, path)) for p in patterns.values()) != 1] == []
    assert [name for name, p in patterns.items() if not any(re.fullmatch(p, path) for path in paths)] == [
        MEMORY,
        "results/<n>/merged_16bit/...",
    ]


@pytest.mark.parametrize("path", OBJECTS, ids=list(OBJECTS))
def test_the_record_is_as_described(output, record, path):
    """Each object has the fields of its description, all of them and no others, with their types."""
    body = json.loads((output / path).read_text())
    assert wrong(body, record[OBJECTS[path]]) == []
    assert body["layout"] == LAYOUT


def test_the_note_on_memory_is_as_described(record, tmp_path):
    """What an attempt writes when its memory runs out has the fields of its description."""
    store = open_store(str(tmp_path))
    attempts = Attempts(store=store, closing=lambda _: store, run_id="demo", number=1, owner="0" * 32)
    judge, usage = Judge(kind="container"), Usage(limit_bytes=1 << 34, in_use_bytes=(1 << 34) - 1)
    attempts.note_memory(judge.look(usage, 0))
    body = json.loads((tmp_path / "demo/attempts/0001.memory.json").read_text())
    assert wrong(body, record[MEMORY]) == []
    assert body["layout"] == LAYOUT


def test_every_field_occurs(output, record):
    """No description has a field that nothing writes: of the optional ones each is in some object of this run, but for
    what a crash in the last moment adds."""
    ends = [json.loads(path.read_text()) for path in (output / "attempts").glob("*.end.json")]
    described = set(record["attempts/<n>.end.json"])
    assert described - {name for body in ends for name in body} == {"noted"}


def test_the_ledger_is_as_described(output, ledger):
    """Each record is of a described kind and has its fields; all kinds occur; numbers rise by one."""
    paths = sorted((output / "checkpoints/commits").iterdir())
    bodies = [json.loads(path.read_text()) for path in paths]
    assert [f"{number:06d}.json" for number in range(1, len(paths) + 1)] == [path.name for path in paths]
    assert set(KINDS) == {body["kind"] for body in bodies}
    assert [problem for body in bodies for problem in wrong(body, ledger[body["kind"]])] == []
    assert {LAYOUT} == {body["layout"] for body in bodies}
    kinds = [(body["attempt"], body["kind"]) for body in bodies]
    fresh = kinds.index((5, "fresh"))
    assert kinds[fresh - 3 : fresh + 2] == [(4, "fence"), (4, "fresh"), (5, "fence"), (5, "fresh"), (5, "fence")]
    final, published = (bodies[kinds.index((3, kind))] for kind in ("final", "published"))
    assert {
        name: final[name] for name in ("steps", "plan", "fingerprint", "results", "versions")
    }.items() <= published.items()
    done = json.loads((output / "done.json").read_text())
    assert all(published[name] == value for name, value in done.items() if name not in {"uri", "record", "run_id"})
    assert done["record"] == kinds.index((3, "published")) + 1


def test_the_notes_on_damage_are_as_described(output):
    """A damaged checkpoint leaves the note that is described."""
    (path,) = (output / "checkpoints/damaged").iterdir()
    body = json.loads(path.read_text())
    assert wrong(body, fields(parts(LEDGER)["checkpoints/damaged/<n>.json"])) == []
    assert f"{body['commit']:06d}.json" == path.name


@pytest.mark.parametrize("name", ["attempts/0003.metrics.jsonl", "metrics.jsonl"])
def test_the_metrics_are_as_described(output, record, name):
    """Each line is of a described event and has its fields; there is one `train_progress` for each step."""
    lines = [json.loads(line) for line in (output / name).read_text().splitlines()]
    assert [problem for line in lines for problem in wrong(line, record[f"Lines: {line['event']}"])] == []
    assert [line["step"] for line in lines if line["event"] == "train_progress"] == list(
        range(1, SHORT["max_steps"] + 1)
    )


def test_a_checkpoint_has_the_described_files(output):
    """The table of files is what a checkpoint holds, and what is read back: all but the scaler, which needs a GPU."""
    described = set(re.findall(r"^\| `([\w.]+)` \|", parts(LEDGER)["Files of a checkpoint"], re.MULTILINE))
    newest = max((output / "checkpoints/data").rglob("history.jsonl")).parent
    assert described - {path.name for path in newest.iterdir()} == {"scaler.pt"}
    read = (ROOT / "job/tuning/checkpoint_files.py").read_text()
    assert {name for name in described if f'"{name}"' not in read} == {"history.jsonl"}


def test_the_examples_are_as_described(record, ledger):
    """Every JSON example follows the description above it; only mappings without a description are shortened."""
    titles = [title for title, text in parts(RECORD).items() if examples(text)]
    assert {*OBJECTS.values(), MEMORY, *(f"Lines: {event}" for event in LINES)} == set(titles)
    for title in titles:
        assert [wrong(body, record[title]) for body in examples(parts(RECORD)[title])] == [[]], title
    for kind in KINDS:
        (body,) = examples(parts(LEDGER)[kind])
        described = {path: field for path, field in ledger[kind].items() if not path.startswith("plan.")}
        assert wrong(body, described) == [], kind
        assert body["kind"] == kind


def test_the_label_of_an_archive_is_as_described(tmp_path):
    """What an archive of compiled code says that it was made for is what the document says."""
    config = Config(model="/m", dataset=("/d",), output="/o")
    facts = compile_key.facts(config.as_variables(), {"hidden_size": 64}, gpus=Gpus(), scratch=tmp_path)
    described = fields(parts(CACHE)["label.json"])
    assert wrong({"key": compile_key.key(facts), "made_for": json.loads(json.dumps(facts))}, described) == []
    assert f"`format` {compile_key.FORMAT}." in CACHE.read_text()


def test_a_difference_is_found():
    """The comparison itself: a field too many, one too few, one of another type, also further down."""
    described = fields("| `a` | integer |\n| `b` | text or null, optional |\n| `c` | list |\n| `c[].d` | number |\n")
    assert wrong({"a": 1, "b": None, "c": [{"d": 0.5}]}, described) == []
    assert wrong({"a": True, "c": []}, described) == ["a is True, not integer"]
    assert wrong({"c": [{"e": 1}], "b": 3}, described) == [
        "a is missing",
        "c[].d is missing",
        "c[].e is not described",
        "b is 3, not text or null",
    ]
