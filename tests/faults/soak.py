"""Random faults, run after run: `make soak RUNS=200`. Every run must end with the adapter of an undisturbed one.

    python -m tests.faults.soak --runs 200 [--seed 7] [--workers 2] [--out summary.json]

Each run gets one to four disturbed attempts, one after the other: killed, asked to stop, frozen (and woken when the run
is over), their uploader killed, their store refusing, cutting and truncating, a file of their newest checkpoint
damaged; then one that nothing disturbs. The seed is printed, and repeats the choices, though not the exact moments.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil
from rich.console import Console

from job.commands.demo.local_s3 import serve
from tests import tiny
from tests.faults.conftest import make_bench
from tests.faults.harness import FENCED, INTERRUPTED, KILLED, Bench, Job, Zygote
from tests.servers import ACCESS_KEY, SECRET_KEY, serve_proxy

KINDS = ("kill", "kill", "kill in save", "stop", "freeze", "uploader", "store", "damage")
FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
LONGEST_SECONDS = 2.6  # a whole run takes about that long


@dataclass
class Tally:
    """What happened over all runs."""

    disturbances: Counter = field(default_factory=Counter)
    ends: Counter = field(default_factory=Counter)
    runs: int = 0
    resumed: int = 0
    damaged_passed_over: int = 0
    differences: list[str] = field(default_factory=list)


class Soak:
    """One worker's runs."""

    def __init__(self, bench: Bench, tally: Tally) -> None:
        self.bench, self.tally = bench, tally

    def run(self, seed: int) -> list[str]:
        """One run with its disturbances; returns what was done to it."""
        chance, done = random.Random(seed), []
        run_id = self.bench.name(f"soak-{seed}")
        zombies: list[Job] = []
        for _ in range(chance.randint(1, 4)):
            kind = chance.choice(KINDS)
            done.append(kind)
            self.disturb(kind, run_id, chance, zombies)
        self.finish(run_id)
        for zombie in zombies:
            with contextlib.suppress(ProcessLookupError):
                zombie.send(signal.SIGCONT)
            self.ended(zombie.wait(60), {0, FENCED, INTERRUPTED, KILLED})
        self.bench.check_whole(run_id)
        for name in self.bench.place.names(self.bench.key(run_id, "")):
            self.bench.place.delete(name)  # the server keeps its objects in memory
        return done

    def disturb(self, kind: str, run_id: str, chance: random.Random, zombies: list[Job]) -> None:
        """One attempt that something happens to."""
        self.tally.disturbances[kind] += 1
        pause = chance.random() * LONGEST_SECONDS
        if kind == "store":
            self.bad_store(run_id, chance)
            return
        hooks = [["kill_in_save", chance.choice(FILES), 2 * chance.randint(1, 6)]] if kind == "kill in save" else []
        grace = chance.choice((3, 6, 15))
        job = self.bench.start(run_id, hooks=hooks, grace_seconds=grace)
        if kind == "kill in save":
            self.ended(job.wait(), {KILLED, 0})
            return
        time.sleep(pause)
        if kind in {"kill", "damage"}:
            with contextlib.suppress(psutil.NoSuchProcess):
                job.kill()
            if kind == "damage":
                self.damage(run_id, chance)
        elif kind == "stop":
            time.sleep(0.1)  # before its first line a program has Python's own handlers
            with contextlib.suppress(ProcessLookupError):
                job.send(chance.choice((signal.SIGTERM, signal.SIGINT)))
            self.ended(job.wait(grace + 5), {INTERRUPTED, 0})
        elif kind == "freeze":
            with contextlib.suppress(ProcessLookupError):
                job.send(signal.SIGSTOP)
                zombies.append(job)
        else:
            with contextlib.suppress(StopIteration, psutil.NoSuchProcess):
                job.uploader().kill()
            self.ended(job.wait(), {0})

    def bad_store(self, run_id: str, chance: random.Random) -> None:
        """An attempt whose store is bad for a while; killed if that takes too long."""

        def rule(seen) -> None:
            draw = chance.random()
            if draw < 0.15:
                seen.refuse = (503, "SlowDown")
            elif draw < 0.20:
                seen.refuse = (500, "InternalError")
            elif draw < 0.25:
                seen.cut = True
            elif draw < 0.30 and seen.method == "GET":
                seen.truncate = True

        with serve_proxy(self.bench.place.endpoint, rule) as endpoint:
            job = self.bench.start(run_id, endpoint=endpoint)
            with contextlib.suppress(AssertionError):
                self.ended(job.wait(20), {0})

    def damage(self, run_id: str, chance: random.Random) -> None:
        """Harm a file of the newest checkpoint, if there is another one to go back to."""
        place = self.bench.place
        bodies = [place.json(key) for key in place.names(self.bench.key(run_id, "checkpoints/commits/"))]
        whole = [b for b in bodies if b["kind"] == "checkpoint" and place.names(f"out/{b['data']}/")]
        if len(whole) < 2 or any(b["kind"] == "final" for b in bodies):
            return
        key = chance.choice(place.names(f"out/{whole[-1]['data']}/"))
        data = place.get(key)
        how = chance.choice(("missing", "empty", "truncated", "flipped"))
        if how == "missing":
            place.delete(key)
        elif how == "flipped":
            at = chance.randrange(len(data))
            place.put(key, data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :])
        else:
            place.put(key, b"" if how == "empty" else data[: len(data) // 2])

    def finish(self, run_id: str) -> None:
        """An attempt that nothing disturbs: however the ones before it ended, the run is whole then."""
        job = self.bench.start(run_id)
        self.ended(job.wait(), {0})
        self.tally.resumed += bool(job.events("checkpoint_restored"))
        self.tally.damaged_passed_over += len(job.events("checkpoint_damaged"))

    def ended(self, code: int, allowed: set[int]) -> int:
        """Count an exit code, which must be one of these."""
        self.tally.ends[str(code)] += 1
        assert code in allowed, f"exit code {code}"
        return code


def main() -> int:
    """All runs; the exit code is 1 if one differed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so many")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    console = Console()
    console.print(f"seed {asked.seed}, {asked.runs} runs")
    for name in [name for name in os.environ if name.startswith("TUNE_") or name.upper().endswith("_PROXY")]:
        del os.environ[name]
    os.environ.update(
        AWS_ACCESS_KEY_ID=ACCESS_KEY,
        AWS_SECRET_ACCESS_KEY=SECRET_KEY,
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
    )
    tally, started = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, serve() as endpoint:
        soak(asked, tally, Path(scratch), endpoint, console)
    summary = {
        "date": time.strftime("%Y-%m-%d"),
        "seed": asked.seed,
        "runs": tally.runs,
        "differences": tally.differences,
        "disturbances": dict(tally.disturbances),
        "exit_codes": dict(tally.ends),
        "final_attempts_that_resumed": tally.resumed,
        "damaged_checkpoints_passed_over": tally.damaged_passed_over,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "versions": {name: metadata.version(name) for name in ("unsloth", "torch", "transformers", "trl", "moto")},
    }
    console.print_json(json.dumps(summary))
    if asked.out:
        asked.out.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if tally.differences else 0


def soak(asked: argparse.Namespace, tally: Tally, scratch: Path, endpoint: str, console: Console) -> None:
    """Share the runs among the workers."""
    model, rows = scratch / "model", scratch / "rows.jsonl"
    tiny.write(model)
    turns = (("Say the number {}.", "It is {}."),)
    rows.write_text("".join(json.dumps(row(ask, answer, n)) + "\n" for n in range(40) for ask, answer in turns))
    workers = []
    for number in range(asked.workers):
        (scratch / f"worker-{number}").mkdir()
        zygote = Zygote(scratch / f"worker-{number}")
        bench = make_bench(zygote, endpoint, scratch / f"worker-{number}", model, rows, f"soak-{number}")
        workers.append(Soak(bench, tally))
    seeds = [asked.seed * 100_000 + number for number in range(asked.runs)]

    end = time.monotonic() + asked.minutes * 60

    def work(number: int) -> None:
        for seed in seeds[number :: asked.workers]:
            begun = time.monotonic()
            if begun > end:
                return
            tally.runs += 1
            try:
                what = ", ".join(workers[number].run(seed))
                console.print(f"{seed}: same ({what}; {time.monotonic() - begun:.0f} s)")
            except Exception as error:  # noqa: BLE001 - the next run is another one
                tally.differences.append(f"{seed}: {type(error).__name__}: {error}"[:2000])
                console.print(f"[red]{seed}: {type(error).__name__}: {error}", markup=True)

    with ThreadPoolExecutor(asked.workers) as pool:
        list(pool.map(work, range(asked.workers)))
    for worker in workers:
        worker.bench.zygote.close()


def row(ask: str, answer: str, number: int) -> dict:
    """A conversation."""
    turns = (("user", ask.format(number)), ("assistant", answer.format(number * 7)))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


if __name__ == "__main__":
    sys.exit(main())
