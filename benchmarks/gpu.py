"""Four ways to train the same LoRA on the same rows, one after the other on this machine's card.

- plain: TRL + PEFT + bitsandbytes, 2 x 4 (gpu_sides/plain.py)
- tutorial: Unsloth's tutorial, padded by its DataCollatorForSeq2Seq, 2 x 4 (gpu_sides/tutorial.py)
- collator-free: the same without the collator, so padding-free (gpu_sides/tutorial.py --no-collator)
- job: `python -m job` with its defaults

Same model (a Llama shape with random weights), same tokens and labels in the same order, same seed, batch, rate and
optimizer. Each side is a process of its own with compile caches of its own. Parts:

- speed: steady tokens a second, GPU busy, model FLOPs utilisation, peak memory, losses; and, for tutorial and job, the
  time from process start to the end of the first step, with empty compile caches and with those of the first start
- adapter: from process start to process end for 1,000 conversations x 3 epochs, tutorial against job; the tutorial
  tokenises them itself
- batch32: steady tokens a second with batches of 32, tutorial (2 x 16) against job
- tight: 16 GiB of the card and rows that are all as long as the longest: the tutorial's largest micro-batch that
  survives 3 steps, and the one that the job takes

What was found is written to <output>/gpu-<size>.json after every process. Ends with 1 where a target is missed.

    python benchmarks/gpu.py run <output> --size 1b --parts speed --budget-seconds 520
    python benchmarks/gpu.py plot <output>/gpu-1b.json <output>/gpu-8b.json    # table, and SVG files in docs/
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_numbers as numbers  # noqa: E402
from benchmarks import gpu_plot  # noqa: E402
from benchmarks.gpu_numbers import BATCH, SEED, SIZES, WARM_UP  # noqa: E402
from benchmarks.machine import card, describe  # noqa: E402

HERE = Path(__file__).resolve().parent / "gpu_sides"
SIDES = ("job", "tutorial", "collator-free", "plain")
"""In the order in which they run: what matters most comes first, should time run out."""
PARTS = ("speed", "adapter", "batch32", "tight")
PACKAGES = (
    *("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "unsloth_zoo", "datasets"),
    *("accelerate", "xformers"),
)
LARGE_BATCH, LARGE_SKIP = 32, 3
TIGHT_GIB, TIGHT_STEPS = 16, 3
TIGHT_MICROS = ("1", "2", "4", "8")
PROFILED = 2
LAST_WORDS, SAID = 3000, 400
"""Characters of a failed process's log that are printed, and that are kept."""
SPARE_SECONDS = 60
"""What a process that was started in time may take beyond the budget."""
SAMPLE_MS = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("output", type=Path)
    run.add_argument("--size", choices=SIZES, default="1b")
    run.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    run.add_argument("--parts", default="speed", help=f"of {','.join(PARTS)}")
    run.add_argument("--sides", default=",".join(SIDES), help=f"of {','.join(SIDES)}")
    run.add_argument("--steps", type=int, default=20, help=f"steady steps, after {WARM_UP} that are not counted")
    run.add_argument("--large-steps", type=int, default=10, help=f"of batch32, after {LARGE_SKIP}")
    run.add_argument("--rows", type=int, default=1000, help="of the part adapter")
    run.add_argument("--epochs", type=int, default=3, help="of the part adapter")
    run.add_argument(
        "--caches", choices=("cold", "warm"), default="cold", help="of the part adapter; warm = those left"
    )
    run.add_argument("--no-warm", action="store_true", help="no second start for the time to the first step")
    run.add_argument("--profile", action="store_true", help=f"also time all kernels of {PROFILED} further steps")
    run.add_argument("--budget-seconds", type=float, default=540, help="after that nothing new is started")
    run.add_argument("--scratch", type=Path, help="instead of TMPDIR; weights go to /dev/shm if they fit")
    plot = commands.add_parser("plot", help="draw results, print the README's table")
    plot.add_argument("results", type=Path, nargs="+")
    plot.add_argument("--docs", type=Path, default=ROOT / "docs")
    asked = parser.parse_args()
    if asked.command == "plot":
        print(gpu_plot.draw([json.loads(path.read_text()) for path in asked.results], asked.docs))
        return 0
    asked.parts, asked.sides = chosen(asked.parts, PARTS), chosen(asked.sides, SIDES)
    asked.output.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=asked.scratch) as scratch,
        tempfile.TemporaryDirectory(dir=memory_disk(asked.size) or asked.scratch) as model,
    ):
        return Bench(asked=asked, scratch=Path(scratch), model=Path(model)).run()


def chosen(text: str, known: tuple[str, ...]) -> list[str]:
    """Names of a comma-separated list, in the order of `known`."""
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"{', '.join(unknown)}: not one of {', '.join(known)}")
    return [name for name in known if name in names]


def memory_disk(size: str) -> Path | None:
    """/dev/shm for the weights, which spares the disk's time, where there is room. Not for caches: kernels are loaded
    from there, which some machines forbid."""
    shared = Path("/dev/shm")
    needed = 3 * SIZES[size].frozen()
    return shared if shared.is_dir() and shutil.disk_usage(shared).free > needed else None


@dataclass(kw_only=True)
class Ended:
    """A process that ended, and when it began (Unix time)."""

    code: int
    began: float
    seconds: float
    log: Path

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-LAST_WORDS:]

    def events(self, name: str) -> list[dict]:
        """Of the job's log."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("event") == name:
                    found.append(entry)
        return found


@dataclass(kw_only=True)
class Bench:
    """One call: what was asked, where it works, what it found so far."""

    asked: argparse.Namespace
    scratch: Path
    model: Path
    result: dict[str, Any] = field(default_factory=dict)
    samples: list[tuple[float, float]] = field(default_factory=list)
    """Unix time, and the share of the time before it in which a kernel ran."""
    started: float = field(default_factory=time.monotonic)

    def run(self) -> int:
        asked = self.asked
        self.result = {
            "size": asked.size,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "card": card() if asked.device == "cuda" else "none (CPU)",
            **describe(PACKAGES),
            "options": {name: str(value) for name, value in vars(asked).items()},
            "shape": asdict(SIZES[asked.size]),
            "failures": [],
        }
        with self.sampling():
            self.prepare()
            for part in asked.parts:
                with self.noting(part):
                    getattr(self, part)()
                self.save()
        wrong = numbers.problems(self.result)
        self.result["problems"] = wrong
        self.save()
        gpu_plot.show(self.result)
        print("\n".join(wrong) or "all targets that were measured are met", flush=True)
        return 1 if wrong else 0

    def save(self) -> None:
        speed = self.result.get("speed", {})
        fast = {side: one["tokens_per_second"] for side, one in speed.items() if "tokens_per_second" in one}
        self.result["ratios"] = numbers.ratios(fast)
        self.result["agreement"] = numbers.agreement({side: one.get("losses", ()) for side, one in speed.items()})
        large = {
            side: one["tokens_per_second"]
            for side, one in self.result.get("batch32", {}).items()
            if "tokens_per_second" in one
        }
        self.result["batch32_ratios"] = numbers.ratios(large)
        self.result["seconds"] = round(time.monotonic() - self.started, 1)
        path = self.asked.output / f"gpu-{self.asked.size}.json"
        path.write_text(json.dumps(self.result, indent=1) + "\n")

    # -- the parts ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Model, rows and tokens; meanwhile another process reads the libraries from the disk, once for all sides."""
        asked = self.asked
        sets = {
            "speed": f"{BATCH * self.steps()}:lognormal:0",
            "adapter": f"{asked.rows}:lognormal:1",
            "batch32": f"{LARGE_BATCH * (LARGE_SKIP + asked.large_steps)}:lognormal:2",
            "tight": f"{BATCH * TIGHT_STEPS}:longest:3",
        }
        imports = "import unsloth, trl, peft, bitsandbytes, datasets"
        environment = self.environment("prime") | {"UNSLOTH_COMPILE_LOCATION": str(self.scratch / "prime")}
        prime = subprocess.Popen(
            [sys.executable, "-c", imports],
            env=environment,
            cwd=self.scratch,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        command = [str(HERE / "inputs.py"), str(self.scratch), "--size", asked.size, "--device", asked.device]
        command += ["--model", str(self.model)]
        command += [f"--set={part}={sets[part]}" for part in asked.parts]
        made = self.start("inputs", command, os.environ.copy())
        prime.wait()
        if made.code:
            raise SystemExit(f"no inputs:\n{made.last_words()}")
        print(f"inputs ready after {time.monotonic() - self.started:.0f} s", flush=True)
        if "speed" in asked.parts:
            counts = self.lengths()
            self.result["rows"] = {
                "count": len(counts),
                "mean_tokens": round(statistics.fmean(counts), 1),
                "max_tokens": max(counts),
            }

    def speed(self) -> None:
        found = self.result["speed"] = {}
        for side in self.asked.sides:
            with self.noting(f"{side}-speed"):
                record = self.measured("speed", side, steps=self.steps(), batch=BATCH, count=self.asked.steps)
                if record is not None:
                    found[side] = record
            self.save()
        for side in ("job", "tutorial"):
            if self.asked.no_warm or "first_step_seconds" not in found.get(side, {}):
                continue
            with self.noting(f"{side}-warm"):
                ended = self.side("speed", side, steps=1, batch=BATCH, name=f"{side}-warm")
                if ended is not None and not ended.code:
                    ends = self.step_ends(side, ended, f"{side}-warm")
                    found[side]["first_step_seconds"]["warm"] = round(ends[0] - ended.began, 1)
            self.save()

    def adapter(self) -> None:
        found = self.result["adapter"] = {}
        for side in ("job", "tutorial"):
            if side not in self.asked.sides:
                continue
            if self.asked.caches == "cold":
                shutil.rmtree(self.caches(side), ignore_errors=True)
            cold = self.is_cold(side)
            ended = self.side("adapter", side, steps=None, batch=BATCH, name=f"{side}-adapter")
            if ended is None:
                continue
            ends = [] if ended.code else self.step_ends(side, ended, f"{side}-adapter")
            found[side] = {
                "seconds": None if ended.code else round(ended.seconds, 1),
                "first_step_seconds": round(ends[0] - ended.began, 1) if ends else None,
                "steps": len(ends),
                "rows": self.asked.rows,
                "epochs": self.asked.epochs,
                "caches": "cold" if cold else "warm",
                **self.versions(),
            }
            self.save()

    def batch32(self) -> None:
        found = self.result["batch32"] = {}
        steps = LARGE_SKIP + self.asked.large_steps
        for side in ("job", "tutorial"):
            if side in self.asked.sides:
                count = self.asked.large_steps
                record = self.measured("batch32", side, steps=steps, batch=LARGE_BATCH, count=count, skip=LARGE_SKIP)
                if record is not None:
                    found[side] = record
                self.save()

    def tight(self) -> None:
        found = self.result["tight"] = {}
        for side in ("job", "tutorial"):
            if side not in self.asked.sides:
                continue
            name = f"{side}-tight"
            ended = self.side("tight", side, steps=TIGHT_STEPS, batch=BATCH, name=name, limit_gib=TIGHT_GIB)
            if ended is None:
                continue
            record = {"limit_gib": TIGHT_GIB, "row_tokens": SIZES[self.asked.size].longest, **self.versions()}
            if side == "job":
                plan = self.plan(ended)
                whole = not ended.code and len(ended.events("train_progress")) >= TIGHT_STEPS
                record |= {"largest_micro_batch": plan.get("micro_batch") if whole else 0, "plan": plan}
                peak = [line["gpu_memory_peak_bytes"] for line in ended.events("train_progress")]
                record["memory_peak_bytes"] = max(peak, default=0)
            else:
                said = self.said(name) or {}
                record |= {"largest_micro_batch": max(said.get("survived", []), default=0)}
                record["memory_peak_bytes"] = said.get("memory_peak_bytes", 0)
            found[side] = record
            self.save()

    # -- one side ----------------------------------------------------------------------------------------------------

    def measured(
        self, part: str, side: str, *, steps: int, batch: int, count: int, skip: int = WARM_UP
    ) -> dict[str, Any] | None:
        """Speed and all that is known of a process that trained on the rows of a part; None if it was not started."""
        name = f"{side}-{part}"
        cold = self.is_cold(side)
        ended = self.side(part, side, steps=steps, batch=batch, name=name)
        if ended is None:
            return None
        if ended.code:
            return {"exit_code": ended.code, **self.versions()}
        ends = self.step_ends(side, ended, name)
        sequences = numbers.by_step(self.lengths(part), batch=batch)
        tokens = [sum(step) for step in sequences]
        self.check_tokens(side, name, ended, tokens)
        speed = numbers.steady(ends, tokens, skip=skip, count=count)
        print(
            f"{name}: {speed.tokens_per_second:,.0f} tokens/s, first step after {ends[0] - ended.began:.0f} s",
            flush=True,
        )
        trained = [length for step in sequences[skip : skip + count] for length in step]
        size, hardware = SIZES[self.asked.size], self.result["card"]
        return {
            **asdict(speed),
            "gpu_busy_share": numbers.busy(self.samples, speed.began, speed.ended),
            "model_flops_utilisation": numbers.utilisation(size, trained, speed.seconds, hardware),
            "memory_peak_bytes": self.peak(side, ended, name),
            "first_step_seconds": {"cold" if cold else "warm": round(ends[0] - ended.began, 1)},
            "process_seconds": round(ended.seconds, 1),
            "losses": self.losses(side, ended, name),
            "step_seconds": [round(after - before, 4) for before, after in itertools.pairwise(ends)],
            "step_tokens": tokens,
            "kernels": self.kernels(name, sequences, speed),
            "settings": self.plan(ended) if side == "job" else self.settings(name),
            **self.versions(),
        }

    def side(
        self, part: str, side: str, *, steps: int | None, batch: int, name: str, limit_gib: float | None = None
    ) -> Ended | None:
        """Run a side on the rows of a part; None if there is no time left, or if it cannot run here."""
        if side == "plain" and self.asked.device == "cpu":
            self.result["skipped"] = ["plain: TRL's own trainer needs triton, so it is left out on a CPU"]
            return None
        if time.monotonic() - self.started > self.asked.budget_seconds:
            self.result.setdefault("skipped", []).append(f"{name}: no time left")
            return None
        environment = self.environment(side)
        outside = {"BENCH_GPU_LIMIT_GIB": str(limit_gib)} if limit_gib and self.asked.device == "cuda" else {}
        if self.asked.profile and part == "speed" and steps == self.steps():
            first = WARM_UP + self.asked.steps + 1
            outside["BENCH_GPU_PROFILE"] = f"{self.scratch / name}.kernels:{first}:{first + PROFILED - 1}"
        if outside:
            paths = [str(HERE / "outside"), *filter(None, [environment.get("PYTHONPATH")])]
            environment |= {**outside, "PYTHONPATH": os.pathsep.join(paths)}
        if side == "job":
            environment |= self.job_settings(part, steps=steps, batch=batch, name=name)
            command = ["-m", "job"]
        else:
            command = self.script(part, side, steps=steps, batch=batch, name=name)
        ended = self.start(name, command, environment)
        print(f"{name}: exit code {ended.code} after {ended.seconds:.0f} s", flush=True)
        if side == "job":
            shutil.copy(ended.log, self.asked.output / f"gpu-{self.asked.size}-{name}.jsonl")
        if ended.code:
            print(ended.last_words(), flush=True)
            self.result["failures"].append(f"{name} ended with {ended.code}: {ended.last_words()[-SAID:]}")
        return ended

    def script(self, part: str, side: str, *, steps: int | None, batch: int, name: str) -> list[str]:
        """A competitor's command line."""
        size = SIZES[self.asked.size]
        command = [str(HERE / ("plain.py" if side == "plain" else "tutorial.py"))]
        command += ["--model", str(self.model), "--output", str(self.scratch / name)]
        command += ["--max-length", str(size.longest), "--batch", str(batch)]
        if side == "collator-free":
            command.append("--no-collator")
        if part == "tight":
            command += ["--micro", *TIGHT_MICROS]
        if part == "adapter":
            return [*command, "--rows", str(self.scratch / "adapter.jsonl"), "--epochs", str(self.asked.epochs)]
        return [*command, "--tokens", str(self.scratch / f"{part}.tokens"), "--steps", str(steps)]

    def job_settings(self, part: str, *, steps: int | None, batch: int, name: str) -> dict[str, str]:
        """The job's variables: what all sides share, and its own defaults for the rest."""
        known = steps or math.ceil(self.asked.rows / batch) * self.asked.epochs
        settings = {
            "model": self.model,
            "dataset": self.scratch / f"{part}.jsonl",
            "output": self.scratch / "runs",
            "run_id": name,
            "device": self.asked.device,
            "max_length": SIZES[self.asked.size].longest,
            "batch_size": batch,
            "learning_rate": 2e-4,
            "warmup": min(WARM_UP, known - 1),
            "seed": SEED,
            "eval_fraction": 0,
            "samples": 0,
            "log_format": "json",
            **({"epochs": self.asked.epochs} if steps is None else {"max_steps": steps}),
        }
        if self.has_cache():
            settings["cache"] = self.caches("job")
        return {f"TUNE_{key.upper()}": str(value) for key, value in settings.items()}

    def environment(self, side: str) -> dict[str, str]:
        """Caches of the side's own, no network, nothing of the caller's TUNE_*.

        The job has a cache that outlives its machine, TUNE_CACHE; while it has none, what is kept is its scratch.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TUNE_")}
        caches = self.caches(side)
        caches.mkdir(parents=True, exist_ok=True)
        kept |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "PYTHONUNBUFFERED": "1"}
        if self.asked.device == "cpu":
            kept |= {"UNSLOTH_FORCE_CPU": "1", "CUDA_VISIBLE_DEVICES": "", "GOMP_SPINCOUNT": "10000"}
        if side == "job":
            scratch = self.scratch / f"tmp-{len(list(self.scratch.iterdir()))}" if self.has_cache() else caches
            scratch.mkdir(exist_ok=True)
            return kept | {"TMPDIR": str(scratch)}
        return kept | {
            "HF_HOME": str(caches / "huggingface"),
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "UNSLOTH_COMPILE_LOCATION": str(caches / "unsloth"),
            "XDG_CACHE_HOME": str(caches / "other"),
        }

    def caches(self, side: str) -> Path:
        return self.scratch / "caches" / side

    def is_cold(self, side: str) -> bool:
        """Whether a start now would find no compiled kernels."""
        directory = self.caches(side)
        return not (directory.is_dir() and any(path.is_file() for path in directory.rglob("*")))

    def has_cache(self) -> bool:
        """Whether the job knows TUNE_CACHE."""
        if "job_cache" not in self.result:
            command = [sys.executable, "-m", "job", "variables"]
            listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            self.result["job_cache"] = "TUNE_CACHE" if "TUNE_CACHE" in listed else "TMPDIR"
        return self.result["job_cache"] == "TUNE_CACHE"

    def start(self, name: str, command: list[str], environment: dict[str, str]) -> Ended:
        """Run Python with a command line to its end, or to the end of the time."""
        log = self.scratch / f"{name}.log"
        left = self.asked.budget_seconds + SPARE_SECONDS - (time.monotonic() - self.started)
        began, clock = time.time(), time.monotonic()
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            process.wait(max(left, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return Ended(code=process.returncode, began=began, seconds=time.monotonic() - clock, log=log)

    # -- what a process left -----------------------------------------------------------------------------------------

    def said(self, name: str) -> dict[str, Any] | None:
        path = self.scratch / name / "side.json"
        return json.loads(path.read_text()) if path.exists() else None

    def step_ends(self, side: str, ended: Ended, name: str) -> list[float]:
        """Unix time at the end of each step. The job logs a step when its loss was read, for which the card must have
        finished it; the scripts wait for the card."""
        if side != "job":
            return (self.said(name) or {})["step_ends"]
        stamps = [line["timestamp"] for line in ended.events("train_progress")]
        return [datetime.datetime.fromisoformat(stamp).timestamp() for stamp in stamps]

    def losses(self, side: str, ended: Ended, name: str) -> list[float]:
        if side != "job":
            return (self.said(name) or {})["losses"]
        return [line["loss"] for line in ended.events("train_progress")]

    def peak(self, side: str, ended: Ended, name: str) -> int:
        """Bytes that torch's allocator held on the card at most."""
        if side != "job":
            return (self.said(name) or {})["memory_peak_bytes"]
        return max(line["gpu_memory_peak_bytes"] for line in ended.events("train_progress"))

    def plan(self, ended: Ended) -> dict[str, Any]:
        """The job's last plan: it may change its mind when memory is short."""
        plans = [
            entry["plan"]
            for line in ended.log.read_text(errors="replace").splitlines()
            if line.startswith("{")
            and isinstance(entry := json.loads(line), dict)
            and isinstance(entry.get("plan"), dict)
        ]
        return plans[-1] if plans else {}

    def settings(self, name: str) -> dict[str, Any]:
        names = ("micro_batch", "accumulation", "padding_free", "collator", "optimizer", "gradient_checkpointing")
        said = self.said(name) or {}
        return {key: said.get(key) for key in (*names, "adapter_dtype", "memory_peak_allocated_bytes")}

    def check_tokens(self, side: str, name: str, ended: Ended, tokens: list[int]) -> None:
        """That a side was fed the rows in the order that `numbers.order` says. The job tells only a running mean, which
        may be ahead by a pass: the next one is fetched while one trains."""
        if side == "job":
            lines = ended.events("train_progress")[:20]
            seen = lines[-1]["tokens_per_second"] * sum(line["step_seconds"] for line in lines)
            least, most = sum(tokens[: len(lines)]), sum(tokens[: len(lines) + 1])
            right = least * 0.98 <= seen <= most * 1.02
        else:
            said = self.said(name) or {}
            passes, cut = said["pass_tokens"], said["accumulation"]
            right = [sum(passes[at : at + cut]) for at in range(0, len(tokens) * cut, cut)] == tokens
        if not right:
            self.result["failures"].append(f"{name} was not fed the rows in the order of the others")

    def kernels(self, name: str, sequences: list[list[int]], speed: numbers.Steady) -> dict[str, Any] | None:
        """Of the profiled steps: seconds in which a kernel ran, and that at the steady speed as a share of all time."""
        path = self.scratch / f"{name}.kernels"
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        first = WARM_UP + self.asked.steps
        tokens = sum(sum(step) for step in sequences[first : first + found["steps"]])
        share = found["kernel_seconds"] / tokens * speed.tokens_per_second
        return {**found, "tokens": tokens, "busy_share_at_steady_speed": round(share, 4)}

    def steps(self) -> int:
        return WARM_UP + self.asked.steps + (PROFILED if self.asked.profile else 0)

    def lengths(self, part: str = "speed") -> list[int]:
        count = BATCH * self.steps() if part == "speed" else LARGE_BATCH * (LARGE_SKIP + self.asked.large_steps)
        return numbers.lengths(SIZES[self.asked.size], count, seed=0 if part == "speed" else 2)

    def versions(self) -> dict[str, str | None]:
        """Beside every figure."""
        parts = [part.strip() for part in self.result["card"].split(",")]
        return {
            "torch": self.result["versions"]["torch"],
            "card": parts[0],
            "driver": parts[1] if len(parts) > 1 else None,
        }

    @contextlib.contextmanager
    def noting(self, name: str):  # noqa: ANN201 - a context
        """What breaks inside is written down, and the rest goes on: time on a card is dear."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is
            self.result["failures"].append(f"{name}: {type(error).__name__}: {error}")
            print(traceback.format_exc(), flush=True)

    @contextlib.contextmanager
    def sampling(self):  # noqa: ANN201 - a context
        """nvidia-smi's utilisation five times a second: the share of its last sampling period (a sixth of a second to
        one second) in which at least one kernel ran, however small."""
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", str(SAMPLE_MS)]
        if self.asked.device == "cpu" or shutil.which(command[0]) is None:
            self.result["gpu_busy_source"] = None
            yield
            return
        self.result["gpu_busy_source"] = f"nvidia-smi utilization.gpu every {SAMPLE_MS} ms"
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

        def read() -> None:
            for line in process.stdout or ():
                with contextlib.suppress(ValueError):
                    self.samples.append((time.time(), float(line) / 100))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            yield
        finally:
            process.terminate()
            process.wait()
            reader.join(5)


if __name__ == "__main__":
    sys.exit(main())
