"""A dataset from its file to token ids and labels: this project beside TRL's own way, on the same rows in the same run.

TRL's way is what its SFTTrainer does first: `apply_chat_template(tokenize=True)` for each row through `datasets.map`
with two processes, which gives token ids and no labels. Its further passes over the data (labels, truncation, rows
left without labels) are left out, and so is the import of TRL. Ours is what a run does: read and check every row, look
for duplicates and secrets, split, render with labels, count, write. Both read the same file of generated conversations,
each in a process of its own, and take turns, so that whatever else the machine does hits them alike.

Then `python -m job check` on 1,000 of the rows, from process start to process end.

    python benchmarks/data.py [--rows 100000] [--repeats 3] [--model .demo/model]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import pydoc_data.topics
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from machine import describe
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
ROWS = 100_000
SIDES = ("ours", "trl")
LIMIT_MIB = 2048
CHECKED_ROWS, CHECK_SECONDS = 1000, 10
SAMPLE_SECONDS = 0.2
OURS = """
import datetime, json, logging, sys, time
from pathlib import Path
import structlog
from job.config.schema import Config
from job.data.prepare import prepare, validate_head
from job.inputs.files import File
from job.inputs.pull import Inputs
from transformers import AutoTokenizer  # imported by both before the clock starts
import datasets
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
rows, model, work = map(Path, sys.argv[1:])
config = Config(model=str(model), dataset=(str(rows),), output=str(work), samples=0)
file = File(name=rows.name, path=rows, size=rows.stat().st_size, etag=None, version=None)
pulled = Inputs(model=model, model_files=(), model_revision=None, dataset=(file,), eval_dataset=(), template_text=None,
                template_files=(), date=datetime.date(2026, 1, 1))
began = time.perf_counter()
validate_head(config, pulled)
read = time.perf_counter()
made = prepare(config, pulled, directory=work)
sets = [made.train.counts, *([made.evaluation.counts] if made.evaluation else [])]
print(json.dumps({"read": read - began, "seconds": time.perf_counter() - began,
                  "sequences": sum(one.sequences for one in sets), "tokens": sum(one.tokens for one in sets)}))
"""
TRL = """
import sys, time, json
import datasets
from transformers import AutoTokenizer
datasets.disable_progress_bars()
rows, model, work = sys.argv[1:]
began = time.perf_counter()
loaded = datasets.load_dataset("json", data_files=rows, split="train", cache_dir=work)
read = time.perf_counter()
tokenizer = AutoTokenizer.from_pretrained(model)
def tokenize(example, processing_class):
    return {"input_ids": processing_class.apply_chat_template(
        example["messages"], tokenize=True, return_dict=True)["input_ids"]}
made = loaded.map(tokenize, fn_kwargs={"processing_class": tokenizer}, num_proc=2, remove_columns=["messages"])
seconds = time.perf_counter() - began
import pyarrow.compute as pc
tokens = pc.sum(pc.list_value_length(made.data.column("input_ids"))).as_py()
print(json.dumps({"read": read - began, "seconds": seconds, "sequences": len(made), "tokens": tokens}))
"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One process that prepared all rows once."""

    side: str
    seconds: float
    """From the first row to the last, without imports."""
    read_seconds: float
    process_seconds: float
    """The whole process."""
    cpu_seconds: float
    """The same, of all its threads and children: what others do on the machine matters less to it."""
    peak_rss_mib: float
    """Of the process and its children together; pages that they share count for each."""
    sequences: int
    tokens: int


def main() -> None:
    """Measure, print, record; fails if ours is slower or needs more memory than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", type=Path, default=ROOT / ".demo" / "model", help="a directory with a tokenizer")
    options = parser.parse_args()
    if not options.model.is_dir():
        raise SystemExit(f"{options.model} does not exist: `make demo` makes it, or give --model.")
    with tempfile.TemporaryDirectory() as directory:
        measured = measure(Path(directory), options.rows, options.repeats, options.model)
        checks = [check(Path(directory), options.model) for _ in range(options.repeats)]
    show(measured, options.rows)
    print(f"check of {CHECKED_ROWS:,} rows: {statistics.median(checks):.1f} s")
    if options.rows == ROWS:
        print(record(measured, checks, options.rows).relative_to(ROOT))
    if reason := failing(measured, checks):
        raise SystemExit(reason)


def measure(space: Path, rows: int, repeats: int, model: Path) -> list[Measured]:
    """Both sides in turn, `repeats` times; who goes first alternates."""
    path = space / "rows.jsonl"
    write_rows(path, rows)
    measured = []
    for turn in range(repeats):
        for side in SIDES[:: 1 if turn % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory(dir=space) as work:
                measured.append(timed(side, path, model, Path(work)))
            print(measured[-1], flush=True)
    return measured


def write_rows(path: Path, count: int) -> None:
    """Conversations of two questions and two answers in English prose, the same in every run."""
    prose = " ".join(pydoc_data.topics.topics.values()).split()
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            messages = [
                {"role": role, "content": words(prose, generator, typical)}
                for role, typical in (("user", 35), ("assistant", 95)) * 2
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def words(prose: list[str], generator: random.Random, typical: int) -> str:
    """A stretch of the prose, its length log-normal."""
    length = max(1, min(int(generator.lognormvariate(0, 0.6) * typical), 4 * typical))
    start = generator.randrange(len(prose) - length)
    return " ".join(prose[start : start + length])


def timed(side: str, rows: Path, model: Path, work: Path) -> Measured:
    """One process; its memory is looked at all the time."""
    code = {"ours": OURS, "trl": TRL}[side]
    environment = os.environ | {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1"}
    if side == "ours":
        environment["TOKENIZERS_PARALLELISM"] = "true"  # as in a run; with two processes the library turns it off
    started, used = time.monotonic(), cpu_seconds()
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(rows), str(model), str(work)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    peak = 0.0
    while child.poll() is None:
        peak = max(peak, rss_mib(child.pid))
        time.sleep(SAMPLE_SECONDS)
    said = json.loads(child.stdout.read().splitlines()[-1]) if child.returncode == 0 and child.stdout else {}
    if not said:
        raise SystemExit(f"{side} failed with {child.returncode}")
    return Measured(
        side=side,
        seconds=round(said["seconds"], 2),
        read_seconds=round(said["read"], 2),
        process_seconds=round(time.monotonic() - started, 2),
        cpu_seconds=round(cpu_seconds() - used, 2),
        peak_rss_mib=round(peak, 1),
        sequences=said["sequences"],
        tokens=said["tokens"],
    )


def check(space: Path, model: Path) -> float:
    """Seconds of `python -m job check` on the first rows."""
    rows = space / "checked.jsonl"
    with (space / "rows.jsonl").open(encoding="utf-8") as file:
        rows.write_text("".join(itertools.islice(file, CHECKED_ROWS)), encoding="utf-8")
    settings = {"MODEL": model.resolve(), "DATASET": rows, "OUTPUT": space / "output", "DEVICE": "cpu"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNE_")}
    environment |= {f"TUNE_{name}": str(value) for name, value in settings.items()}
    started = time.monotonic()
    command = [sys.executable, "-m", "job", "check"]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return round(time.monotonic() - started, 2)


def cpu_seconds() -> float:
    """Of all children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def rss_mib(pid: int) -> float:
    """Of a process and its children, now."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total / (1 << 20)


def medians(measured: list[Measured]) -> dict[str, dict[str, float]]:
    """Per side: the median time, the highest memory."""
    table = {}
    for side in SIDES:
        mine = [one for one in measured if one.side == side]
        table[side] = {
            "seconds": statistics.median(one.seconds for one in mine),
            "process_seconds": statistics.median(one.process_seconds for one in mine),
            "cpu_seconds": statistics.median(one.cpu_seconds for one in mine),
            "peak_rss_mib": max(one.peak_rss_mib for one in mine),
        }
    return table


def failing(measured: list[Measured], checks: list[float]) -> str:
    """What is not as it must be; empty if all is."""
    table = medians(measured)
    if table["ours"]["seconds"] > table["trl"]["seconds"]:
        return f"ours is slower: {table['ours']['seconds']} s, TRL's way {table['trl']['seconds']} s"
    if table["ours"]["peak_rss_mib"] > LIMIT_MIB:
        return f"ours needs {table['ours']['peak_rss_mib']:.0f} MiB, more than {LIMIT_MIB}"
    if statistics.median(checks) > CHECK_SECONDS:
        return f"a check of {CHECKED_ROWS:,} rows takes {statistics.median(checks)} s, more than {CHECK_SECONDS}"
    return ""


def show(measured: list[Measured], rows: int) -> None:
    """A table for people."""
    tokens = measured[0].tokens / measured[0].sequences
    title = f"{rows:,} conversations of {tokens:.0f} tokens, median of {len(measured) // len(SIDES)}"
    table = Table(title=title)
    for column in ("side", "seconds", "rows/s", "with start-up", "peak RSS MiB"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for side, values in medians(measured).items():
        speed = rows / values["seconds"]
        memory = f"{values['peak_rss_mib']:.0f}"
        table.add_row(side, f"{values['seconds']:.1f}", f"{speed:,.0f}", f"{values['process_seconds']:.1f}", memory)
    Console(width=80).print(table)


def record(measured: list[Measured], checks: list[float], rows: int) -> Path:
    """The raw numbers, for whoever doubts the table."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = ROOT / "benchmarks" / "results" / f"data-{today}.json"
    path.parent.mkdir(exist_ok=True)
    packages = ("datasets", "pyarrow", "tokenizers", "transformers", "trl")
    body = {
        "rows": rows,
        **describe(packages),
        "medians": medians(measured),
        "measurements": [asdict(one) for one in measured],
        "check_seconds": {"rows": CHECKED_ROWS, "measurements": checks},
    }
    path.write_text(json.dumps(body, indent=2) + "\n")
    return path


if __name__ == "__main__":
    main()
