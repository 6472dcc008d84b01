"""Data preparation and `check` in this clone and in another one, an earlier version say: is one slower than the other?

Both take turns on the same rows in the same run, each in processes of its own. Seconds of computing are recorded, too:
what others do on the machine matters less to them.

    python benchmarks/data_clones.py ANOTHER_CLONE [--rows 20000] [--repeats 5] [--model .demo/model]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from data import CHECKED_ROWS, ROOT, cpu_seconds, write_rows
from machine import describe

TASKS = ("prepare", "check")


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", type=Path, default=ROOT / ".demo" / "model", help="a directory with a tokenizer")
    options = parser.parse_args()
    clones = {"other": options.other.resolve(), "this": ROOT}
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        space = Path(directory)
        write_rows(space / "rows.jsonl", options.rows)
        write_rows(space / "checked.jsonl", CHECKED_ROWS)
        for turn in range(options.repeats):
            for name in list(clones)[:: 1 if turn % 2 == 0 else -1]:
                for task in TASKS:
                    measured.append({"side": name, "task": task, **timed(clones[name], task, space, options.model)})
                    print(measured[-1], flush=True)
    medians = {f"{name}, {task}": median(measured, name, task) for name in clones for task in TASKS}
    print(json.dumps(medians, indent=2))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = ROOT / "benchmarks" / "results" / f"data-clones-{today}.json"
    revisions = {name: revision(clone) for name, clone in clones.items()}
    body = {"rows": options.rows, "checked_rows": CHECKED_ROWS, "revisions": revisions, **describe(("tokenizers",))}
    path.write_text(json.dumps({**body, "medians": medians, "measurements": measured}, indent=2) + "\n")


def timed(clone: Path, task: str, space: Path, model: Path) -> dict[str, float]:
    """One process of a clone: its seconds, and those of computing with its children's."""
    with tempfile.TemporaryDirectory(dir=space) as work:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNE_")}
        environment |= {"HF_HOME": f"{work}/home", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        if task == "check":
            settings = {"MODEL": model.resolve(), "DATASET": space / "checked.jsonl", "OUTPUT": f"{work}/output"}
            environment |= {f"TUNE_{name}": str(value) for name, value in (settings | {"DEVICE": "cpu"}).items()}
            (scratch := Path(work, "scratch")).mkdir()
            environment["TMPDIR"] = str(scratch)
            command = ["-m", "job", "check"]
        else:
            ours = runpy.run_path(str(clone / "benchmarks/data.py"))["OURS"]
            command = ["-c", ours, str(space / "rows.jsonl"), str(model.resolve()), work]
        started, used = time.monotonic(), cpu_seconds()
        done = subprocess.run(
            [sys.executable, *command], env=environment, cwd=clone, check=True, stdout=subprocess.PIPE, text=True
        )
        seconds, computing = time.monotonic() - started, cpu_seconds() - used
    said = json.loads(done.stdout.splitlines()[-1]) if task == "prepare" else {}
    return {
        "process_seconds": round(seconds, 2),
        "cpu_seconds": round(computing, 2),
        **({"seconds": round(said["seconds"], 2), "tokens": said["tokens"]} if said else {}),
    }


def median(measured: list[dict[str, Any]], name: str, task: str) -> dict[str, float]:
    """Of each number that a task has."""
    mine = [one for one in measured if (one["side"], one["task"]) == (name, task)]
    return {key: statistics.median(one[key] for one in mine) for key in mine[0] if key not in {"side", "task"}}


def revision(clone: Path) -> str:
    """The commit of a clone."""
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=clone, text=True).strip()


if __name__ == "__main__":
    main()
