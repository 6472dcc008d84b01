"""What is tried: everything that reads files, records, archives, settings and replies of stores."""

import functools
import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st
from pyarrow import parquet

from job.commands import checks
from job.config import environment
from job.config.schema import SETTINGS, Config
from job.model.schedule import schedule
from job.stages import claim
from job.state import fingerprint
from job.state.compile_cache import archive
from tests.fuzz import harness
from tests.fuzz.harness import CONFIG, DATA, Target, UnexpectedError, origin_of
from tests.fuzz.mutations import BYTES, STRANGE_TEXTS, changed, compressed, dumped, json_like, lines
from tests.state import bombs

TINY = Path(os.environ.get("FUZZ_MODEL", "/nonexistent"))
"""A tiny model, as `tests.tiny` makes it."""
ROW_KEYS = (
    "messages", "conversations", "role", "from", "content", "value", "text", "prompt", "completion", "instruction",
    "input", "output", "question", "answer", "system", "history", "tools", "tool_calls", "images", "weight", "train",
    "loss", "trainable", "loss_mask", "name", "thinking", "reasoning_content", "chosen", "rejected", "label",
)  # fmt: skip
ROWS: list[Any] = [
    {"messages": [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "It is 7."}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "q"}]},
                  {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function":
                      {"name": "f", "arguments": '{"a": 1}'}}]},
                  {"role": "tool", "content": "r", "tool_call_id": "1"}, {"role": "assistant", "content": "a"}],
     "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"instruction": "i", "input": "", "output": "o"},
    {"prompt": "p", "completion": "c"},
    {"question": "q", "answer": "a"},
    {"text": "t"},
]  # fmt: skip
GOOD = json.dumps(ROWS[0]).encode() + b"\n"
JSONL = lines(ROWS, ROW_KEYS) | changed([GOOD * 3, b"\n".join(dumped(row) for row in ROWS)]) | BYTES
CSV = changed(
    [
        b"prompt,completion\nq,a\nq,a\n",
        b'"prompt";"completion"\r\n"a ""b""";c\r\n',
        b"text\n\xef\xbb\xbfx\n",
        b"a,b,c\n1,2\n",
    ],
    [b'"', b",", b";", b"\t", b"\r\n", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"""', b"\r", b"x" * 200_000],
)


# --- Files of the model and the data, through the whole of `python -m job check`.


def checked(replaced: str) -> Callable[[bytes, Path], None]:
    """Check a run in which one file is the input; the model's others are the tiny one's."""

    def run(data: bytes, directory: Path) -> None:
        model = directory / "model"
        model.mkdir()
        for path in TINY.iterdir():
            (model / path.name).hardlink_to(path)
        rows = directory / (replaced if replaced.startswith("rows.") else "rows.jsonl")
        rows.write_bytes(GOOD * 2)
        target = rows if replaced.startswith("rows.") else model / replaced
        target.unlink(missing_ok=True)
        target.write_bytes(data)
        _check({"TUNE_MODEL": model, "TUNE_DATASET": rows, "TUNE_OUTPUT": directory / "out", "TMPDIR": directory})

    return run


def _check(variables: dict[str, Any]) -> None:
    settings = {"TUNE_MAX_LENGTH": 128, "TUNE_EVAL_FRACTION": 0, "TUNE_SAMPLES": 1, **variables}
    harness.failed.clear()
    found = checks.Checked()
    with _environment({name: str(value) for name, value in settings.items()}):
        checks.check(found)
    for problem in found.problems:
        code = problem.error.exit_code
        if harness.failed:
            error = harness.failed[0]
            raise UnexpectedError(origin_of(error), f"{type(error).__name__}: {error}"[:500]) from error
        if code not in (DATA, CONFIG):
            raise UnexpectedError(f"exit-{code}-{problem.check}", str(problem.error)[:500])


class _environment:  # noqa: N801 - a context manager
    """The variables of one input, in the place of those before it."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._variables = variables

    def __enter__(self) -> None:
        for name in [name for name in os.environ if name.startswith("TUNE_")]:
            del os.environ[name]
        os.environ.update(self._variables)

    def __exit__(self, *_: object) -> None:
        for name in self._variables:
            os.environ.pop(name, None)


def _seed(name: str) -> Any:
    path = TINY / name
    return json.loads(path.read_text()) if path.exists() else {}


CONFIG_KEYS = (
    "architectures", "model_type", "num_hidden_layers", "hidden_size", "vocab_size", "quantization_config",
    "text_config",
    "vision_config", "auto_map", "num_experts", "layer_types", "rope_scaling", "max_position_embeddings", "torch_dtype",
    "tie_word_embeddings", "head_dim", "intermediate_size", "eos_token_id",
)  # fmt: skip
TOKENIZER_KEYS = (
    "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "vocab", "merges", "type",
    "pattern", "Regex", "behavior", "unk_token", "truncation", "padding", "pretokenizers", "special_tokens", "id",
    "content", "tokenizer_class", "chat_template", "eos_token", "pad_token", "add_bos_token", "added_tokens_decoder",
    "model_max_length", "extra_special_tokens", "auto_map", "clean_up_tokenization_spaces", "backend",
)  # fmt: skip
PATTERNS = [{"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False} for r in
            ("(a+)+$", "(?:x|x)*y", "(.*)*", "[", "\\p{L}+|\\s", "(?=a)*")]  # fmt: skip


@st.composite
def header(draw: st.DrawFn) -> bytes:
    """A file of safetensors whose header says something about the tensors that are there, or not."""
    data = min(TINY.glob("*.safetensors")).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    seed = json.loads(data[8 : 8 + size])
    text = draw(json_like([seed], ["dtype", "shape", "data_offsets", "__metadata__"]) | changed([data[8 : 8 + size]]))
    said = draw(st.sampled_from([len(text)] * 6 + [0, 1, 2**20, 2**31, 2**63, 2**64 - 1, max(len(text) - 1, 0)]))
    weights = len(data) - 8 - size  # zeros: nobody looks at them here, and what is found stays small
    return struct.pack("<Q", said) + text + bytes(min(weights, draw(st.sampled_from([10**9, 10**9, 0, 100]))))


FRAGMENTS: list[str] = json.loads(Path(__file__).with_name("fragments.json").read_text())
"""Of templates: what they are made of, and what wants too much."""
TEMPLATES = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(lambda parts: "".join(parts).encode()) | changed(
    [(TINY / "chat_template.jinja").read_bytes() if TINY.exists() else b"x"], [f.encode() for f in FRAGMENTS]
)


def _parquet(column: Any, rows: int) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"messages": column}).slice(0, rows), buffer, compression="zstd")
    return buffer.getvalue()


@functools.cache
def _parquets() -> list[bytes]:
    turns = [ROWS[0]["messages"]] * 3
    columns = [
        pa.array(turns),
        pa.array(["a", None, "b"]),
        pa.array([b"\xff", b"", None]),
        pa.array([1.5, float("nan"), None]),
        pa.array([[{"role": "user", "content": "x", "n": 2**60}], None, []]),
        pa.array(["a", "b", "a"]).dictionary_encode(),
        pa.array([{"a": {"b": {"c": [1]}}}] * 3),
        pa.array([10**17, 5, 7], pa.timestamp("ns")),
        pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    ]
    return [_parquet(column, 3) for column in columns]


# --- Settings.

NAMES = [setting.variable for setting in SETTINGS]
TEXTS = (
    st.sampled_from([t for t in STRANGE_TEXTS if "\0" not in t and "\ud800" not in t])
    | st.sampled_from(
        ["auto", "1.1", "3", "1e308", "1_000", "٣", " 5 ", "a,b", "a=b,c=d", "assistant=1,tool=0.2", "fresh"]
    )
    | st.integers().map(str)
    | st.floats().map(str)
    | st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=30)
)
VARIABLES = st.dictionaries(
    st.sampled_from([*NAMES, *(f"{name}_FILE" for name in NAMES), "TUNE_", "TUNE_X", "RANK", "WORLD_SIZE"]),
    TEXTS,
    max_size=5,
).map(dumped)


def settings(data: bytes, directory: Path) -> None:
    """Read an environment; what is accepted can be used, shown and compared."""
    given = json.loads(data)
    required = {"TUNE_MODEL": "org/m", "TUNE_DATASET": "/d.jsonl", "TUNE_OUTPUT": str(directory)}
    variables: dict[str, str] = {}
    for name, value in given.items():
        variables[name] = value
        if name.endswith("_FILE") and value.isalnum():
            (directory / "value").write_text(value)
            variables[name] = str(directory / "value")
            required.pop(name.removesuffix("_FILE"), None)
    with _environment({**required, **variables}):
        config = environment.load()
    config.identity()
    json.dumps(config.as_variables(), allow_nan=False)
    fingerprint.settings(config)
    planned = schedule(config, examples=1000)
    if not 0 <= planned.warmup_steps < planned.steps:
        raise UnexpectedError("warm-up", str(planned))


# --- Records of an earlier attempt.

RECORDS = {
    "run.json": {"layout": 2, "run_id": "r", "config": {}, "fingerprint": {"TUNE_SEED": 3407}, "versions": {}},
    "inputs.json": {"layout": 2, "date": "2026-11-28", "files": [{"name": "/d.jsonl", "size": 3, "sha256": "0"}]},
    "checkpoints/commits/000001.json": {
        "layout": 2, "kind": "fence", "attempt": 1, "owner": "o", "life": 0, "nonce": "n",
    },
    "checkpoints/commits/000002.json": {
        "layout": 2, "kind": "checkpoint", "attempt": 1, "owner": "o", "life": 0, "nonce": "n", "step": 2,
        "data": "r/checkpoints/data/0001/step-000002", "files": [{"name": "optimizer.pt", "size": 1, "sha256": "0"}],
        "fingerprint": {}, "plan": {}, "device": "cpu", "asked": {}, "versions": {},
    },
    "checkpoints/commits/000003.json": {
        "layout": 2, "kind": "published", "attempt": 1, "owner": "o", "life": 0, "nonce": "n", "final": 2,
        "prefix": "results/000002", "steps": 2, "plan": {}, "fingerprint": {}, "results": {}, "versions": {},
        "artifacts": [{"name": "adapter/a", "size": 1, "sha256": "0"}], "promoted": True, "published_at": "x",
    },
    "attempts/0001.json": {"layout": 2, "attempt": 1, "nonce": "n", "host": "h", "from_step": 0},
    "attempts/0001.end.json": {"layout": 2, "attempt": 1, "outcome": "unknown", "step": 3},
    "attempts/0001.memory.json": {
        "layout": 2, "attempt": 1, "nonce": "n", "running_out": True, "limit_bytes": 9, "peak_in_use_bytes": 9,
        "oom_kills": 1,
    },
    "done.json": {"layout": 2, "run_id": "r", "artifacts": [], "fingerprint": {}, "attempt": 1},
    "../latest.json": {"layout": 2, "run_id": "r", "uri": "/x", "published_at": "x"},
}  # fmt: skip
RECORD = st.sampled_from(list(RECORDS)).flatmap(
    lambda name: (
        json_like([RECORDS[name]], ["kind", "step", "attempt", "files", "life"])
        | changed([dumped(RECORDS[name])])
        | BYTES
    ).map(lambda data: name.encode() + b"\n" + data)
)
OWN_CODES = frozenset({DATA, CONFIG, 70, 74, 76})


def records(data: bytes, directory: Path) -> None:
    """Begin an attempt at a run whose output has one strange record among good ones; and check it."""
    name, _, content = data.partition(b"\n")
    place = directory / "out/r"
    for known, body in RECORDS.items():
        path = place / known
        path.parent.mkdir(parents=True, exist_ok=True)
        if known.startswith(("run", "inputs", "attempts/0001.json", "checkpoints/commits/000001")):
            path.write_bytes(dumped(body))
    if name.decode(errors="replace") in RECORDS:
        (place / name.decode()).write_bytes(content)
    config = Config(model="/m", dataset=("/d.jsonl",), output=str(directory / "out"), run_id="r")
    os.environ["TMPDIR"] = str(directory)
    output = claim.open_output(config)
    if claim.already_complete(config, output):
        return
    with claim.attempt(config, output) as context:
        context.ledger.fence()
        list(context.ledger.newest_first())
        context.record.first()
        context.record.inputs()
        context.publication.published()


# --- Archives of compile caches.

TARS = [
    b"".join(part * min(times, 2) for part in pieces)
    for _, pieces, times in bombs.tars()
    if sum(map(len, pieces)) < 10**6
]
TAR_WORDS = [
    bombs.header("files/a", 5),
    bombs.pax("path=files/b"),
    bombs.LABEL,
    bombs.END,
    b"GNU.sparse.size=-1",
    bytes(512),
]


def archives(data: bytes, directory: Path) -> None:
    """Unpack it: no file outside, and no more bytes than allowed."""
    (directory / "archive").write_bytes(data)
    try:
        archive.unpack(directory / "archive", directory / "files", most_bytes=1 << 20)
    finally:
        size = sum(path.lstat().st_size for path in (directory / "files").rglob("*") if path.is_file())
        if size > 1 << 20 or {path.name for path in directory.iterdir()} - {"archive", "files"}:
            raise UnexpectedError("bound", f"{size} bytes")


# --- All of them.


def _all() -> list[Target]:
    files: dict[str, st.SearchStrategy[bytes]] = {
        "rows.jsonl": JSONL,
        "rows.json": st.lists(json_like(ROWS, ROW_KEYS), max_size=3).map(lambda rows: b"[" + b",".join(rows) + b"]")
        | JSONL,
        "rows.csv": CSV | BYTES,
        "rows.parquet": st.deferred(lambda: changed(_parquets(), [b"PAR1", b"\xff" * 8])),
        "rows.jsonl.gz": compressed(JSONL, "gz"),
        "rows.jsonl.zst": compressed(JSONL, "zst"),
        "config.json": json_like([_seed("config.json")], CONFIG_KEYS) | BYTES,
        "generation_config.json": json_like([_seed("generation_config.json")], CONFIG_KEYS) | BYTES,
        "tokenizer.json": json_like([_seed("tokenizer.json")], TOKENIZER_KEYS)
        | st.sampled_from(PATTERNS).map(lambda p: dumped({**_seed("tokenizer.json"), "pre_tokenizer": p})),
        "tokenizer_config.json": json_like([_seed("tokenizer_config.json")], TOKENIZER_KEYS) | BYTES,
        "special_tokens_map.json": json_like([{"eos_token": "</s>", "pad_token": {"content": "x"}}], TOKENIZER_KEYS),
        "added_tokens.json": json_like([{"<x>": 300, "<y>": 1}], TOKENIZER_KEYS),
        "chat_template.jinja": TEMPLATES,
        "model.safetensors.index.json": json_like([_seed("model.safetensors.index.json")], ["weight_map", "metadata"])
        | BYTES,
        "model-00001-of-00002.safetensors": st.deferred(header) | BYTES,
        "adapter_config.json": json_like([{"peft_type": "LORA", "base_model_name_or_path": "x"}], CONFIG_KEYS),
    }
    made = [Target(name=name, inputs=inputs, run=checked(name)) for name, inputs in files.items()]
    packed = (changed(TARS, TAR_WORDS)).map(lambda tar: bytes(pa.compress(tar, "zstd", asbytes=True)) if tar else b"")
    return [
        *made,
        Target(name="settings", inputs=VARIABLES, run=settings, codes=frozenset({CONFIG})),
        Target(name="records", inputs=RECORD, run=records, codes=OWN_CODES),
        Target(
            name="archive", inputs=packed | changed([zlib.compress(b"x")]), run=archives, errors=(ValueError, OSError)
        ),
    ]


@functools.cache
def targets() -> dict[str, Target]:
    """All targets, by name."""
    from tests.fuzz import replies

    return {target.name: target for target in [*_all(), *replies.targets()]}
