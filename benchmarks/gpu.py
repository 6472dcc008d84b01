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
- tight: 16 GiB of the card, batches of 32 and rows that are all as long as the longest: the tutorial's largest
  micro-batch that survives 3 steps, whether the job survives with that one too, and which it takes by itself
- squeezed: the job on such rows, alone on the card, and again with most of the card taken away meanwhile: its losses

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
import os
import shutil
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
from benchmarks.gpu_numbers import BATCH, SIZES, WARM_UP  # noqa: E402
from benchmarks.gpu_process import HERE, Ended, Sides  # noqa: E402
from benchmarks.machine import card, describe, utilisation  # noqa: E402
from job.state.compile_cache import bytecode  # noqa: E402

SIDES = ("job", "tutorial", "collator-free", "plain")
"""In the order in which they run: what matters most comes first, should time run out."""
PARTS = ("speed", "adapter", "batch32", "tight", "squeezed")
PACKAGES = (
    *("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "unsloth_zoo", "datasets"),
    *("accelerate", "xformers"),
)
LARGE_BATCH, LARGE_SKIP = 32, 3
TIGHT_GIB, TIGHT_STEPS = 16, 3
SQUEEZED_GIB, SQUEEZED_STEPS, SQUEEZED_FROM = 8, 6, 3
PROFILED = 2
PADDING_FREE = {"tutorial": False, "plain": False}
"""What else a side does would make it another side."""
SAMPLE_SECONDS = 0.2


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
    plot = commands.add_parser("plot", help="draw results, print the tables of benchmarks/README.md")
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
        sides = Sides(asked=asked, scratch=Path(scratch), model=Path(model))
        return Bench(asked=asked, sides=sides).run()


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
class Bench:
    """One call: what was asked, and what it found so far."""

    asked: argparse.Namespace
    sides: Sides
    result: dict[str, Any] = field(default_factory=dict)
    samples: list[tuple[float, float]] = field(default_factory=list)
    """Unix time, and the share of the time before it in which a kernel ran."""

    def run(self) -> int:
        asked = self.asked
        self.result = {
            "size": asked.size,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "card": card() if asked.device == "cuda" else "none (CPU)",
            **describe(PACKAGES),
            "packages_have_compiled_modules": not bytecode.missing(),
            "options": {name: str(value) for name, value in vars(asked).items()},
            "shape": asdict(SIZES[asked.size]),
            "failures": self.sides.failures,
            "skipped": self.sides.skipped,
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
        for part, name in (("speed", "ratios"), ("batch32", "batch32_ratios")):
            measured = self.result.get(part, {}).items()
            fast = {side: one["tokens_per_second"] for side, one in measured if "tokens_per_second" in one}
            self.result[name] = numbers.ratios(fast)
        losses = {side: one.get("losses", ()) for side, one in self.result.get("speed", {}).items()}
        self.result["agreement"] = numbers.agreement(losses)
        self.result["seconds"] = round(self.sides.elapsed(), 1)
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
            "tight": f"{LARGE_BATCH * TIGHT_STEPS}:longest:3",
            "squeezed": f"{BATCH * SQUEEZED_STEPS}:longest:4",
        }
        imports = "import unsloth, trl, peft, bitsandbytes, datasets"
        scratch = self.sides.scratch
        prime = subprocess.Popen(
            [sys.executable, "-c", imports],
            env=self.sides.environment("prime"),
            cwd=scratch,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        command = [str(HERE / "inputs.py"), str(scratch), "--size", asked.size, "--device", asked.device]
        command += ["--model", str(self.sides.model)]
        command += [f"--set={part}={sets[part]}" for part in asked.parts]
        made = self.sides.start("inputs", command, os.environ.copy())
        prime.wait()
        if made.code:
            raise SystemExit(f"no inputs:\n{made.last_words()}")
        print(f"inputs ready after {self.sides.elapsed():.0f} s", flush=True)
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
                ended = self.sides.run("speed", side, steps=1, batch=BATCH, name=f"{side}-warm")
                if ended is not None and not ended.code:
                    found[side]["first_step_seconds"]["warm"] = ended.first_step_seconds()
            self.save()

    def adapter(self) -> None:
        found = self.result["adapter"] = {}
        for side in ("job", "tutorial"):
            if side not in self.asked.sides:
                continue
            if self.asked.caches == "cold":
                shutil.rmtree(self.sides.caches(side), ignore_errors=True)
            cold = self.sides.is_cold(side)
            ended = self.sides.run("adapter", side, steps=None, batch=BATCH, name=f"{side}-adapter")
            if ended is None or ended.code:
                continue
            found[side] = {
                "seconds": round(ended.seconds, 1),
                "first_step_seconds": ended.first_step_seconds(),
                "steps": len(ended.step_ends()),
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
        limit = {"BENCH_GPU_LIMIT_GIB": str(TIGHT_GIB)} if self.asked.device == "cuda" else {}
        if "tutorial" in self.asked.sides and (ended := self.tightly("tutorial", limit)):
            # Its script ends well when a micro-batch fails, and names those that survived before it.
            survived = ended.said.get("survived", []) if ended.said else []
            found["tutorial"] = self.in_16_gib(ended, largest=max(survived, default=0))
            self.save()
        if "job" in self.asked.sides and (ended := self.tightly("job", limit)):
            chosen = ended.settings()["micro_batch"] if ended.lived(TIGHT_STEPS) else 0
            found["job"] = self.in_16_gib(ended, largest=chosen)
            self.save()
        theirs = found.get("tutorial", {}).get("largest_micro_batch", 0)
        if "job" in found and theirs > found["job"]["largest_micro_batch"]:
            asked = limit | {"TUNE_MICRO_BATCH": str(theirs)}
            if (ended := self.tightly("job", asked, name="job-tight-asked")) and ended.lived(TIGHT_STEPS):
                by_itself = found["job"]
                found["job"] = self.in_16_gib(ended, largest=ended.settings()["micro_batch"])
                found["job"]["by_itself"] = by_itself
            self.save()

    def tightly(self, side: str, outside: dict[str, str], *, name: str = "") -> Ended | None:
        name = name or f"{side}-tight"
        return self.sides.run("tight", side, steps=TIGHT_STEPS, batch=LARGE_BATCH, name=name, outside=outside)

    def in_16_gib(self, ended: Ended, *, largest: int) -> dict[str, Any]:
        ends = ended.step_ends()
        return {
            "limit_gib": TIGHT_GIB,
            "batch": LARGE_BATCH,
            "row_tokens": SIZES[self.asked.size].longest,
            "largest_micro_batch": largest,
            "memory_peak_bytes": ended.memory_peak(),
            "last_step_seconds": round(ends[-1] - ends[-2], 4) if len(ends) > 1 else None,
            "settings": ended.settings(),
            **self.versions(),
        }

    def squeezed(self) -> None:
        if "job" not in self.asked.sides or self.asked.device == "cpu":
            self.sides.skipped.append("squeezed: it is about the job on a card")
            return
        squeeze = {"BENCH_GPU_SQUEEZE": f"{SQUEEZED_FROM}:{SQUEEZED_GIB}"}
        free, tight = (
            self.sides.run("squeezed", "job", steps=SQUEEZED_STEPS, batch=BATCH, name=name, outside=outside)
            for name, outside in (("job-free", {}), ("job-squeezed", squeeze))
        )
        if free is None or tight is None or free.code or tight.code:
            return
        cuts = [line for line in tight.lines() if line.get("event") == "out_of_memory"]
        self.result["squeezed"] = {
            "limit_gib": SQUEEZED_GIB,
            "from_step": SQUEEZED_FROM,
            "cuts": [{key: line[key] for key in ("step", "was", "now")} for line in cuts],
            "losses": {"free": free.losses(), "squeezed": tight.losses()},
            **numbers.agreement({"job": free.losses(), "squeezed": tight.losses()})["squeezed"],
            "memory_peak_bytes": free.memory_peak(),
            **self.versions(),
        }

    # -- one side ----------------------------------------------------------------------------------------------------

    def measured(
        self, part: str, side: str, *, steps: int, batch: int, count: int, skip: int = WARM_UP
    ) -> dict[str, Any] | None:
        """Speed and all that is known of a process that trained on the rows of a part; None if it was not started."""
        name = f"{side}-{part}"
        cold = self.sides.is_cold(side)
        outside = {}
        if self.asked.profile and part == "speed":
            first = WARM_UP + self.asked.steps + 1
            outside["BENCH_GPU_PROFILE"] = f"{self.sides.scratch / name}.kernels:{first}:{first + PROFILED - 1}"
        ended = self.sides.run(part, side, steps=steps, batch=batch, name=name, outside=outside)
        if ended is None:
            return None
        if ended.code:
            return {"exit_code": ended.code, **self.versions()}
        ends = ended.step_ends()
        sequences = numbers.by_step(self.lengths(part), batch=batch)
        tokens = [sum(step) for step in sequences]
        if not ended.was_fed(tokens):
            self.sides.failures.append(f"{name} was not fed the rows in the order of the others")
        settings = ended.settings()
        if self.asked.device == "cuda" and settings.get("padding_free") is not PADDING_FREE.get(side, True):
            self.sides.failures.append(f"{name}: padding_free is {settings.get('padding_free')}")
        speed = numbers.steady(ends, tokens, skip=skip, count=count)
        first_step = ended.first_step_seconds()
        print(f"{name}: {speed.tokens_per_second:,.0f} tokens/s, first step after {first_step:.0f} s", flush=True)
        trained = [length for step in sequences[skip : skip + count] for length in step]
        size, hardware = SIZES[self.asked.size], self.result["card"]
        return {
            **asdict(speed),
            "gpu_busy_share": numbers.busy(self.samples, speed.began, speed.ended),
            "model_flops_utilisation": numbers.utilisation(size, trained, speed.seconds, hardware),
            "memory_peak_bytes": ended.memory_peak(),
            "first_step_seconds": {"cold" if cold else "warm": first_step},
            "process_seconds": round(ended.seconds, 1),
            "losses": ended.losses(),
            "step_seconds": [round(after - before, 4) for before, after in itertools.pairwise(ends)],
            "step_tokens": tokens,
            "kernels": self.kernels(name, sequences, speed),
            "settings": settings,
            **self.versions(),
        }

    def kernels(self, name: str, sequences: list[list[int]], speed: numbers.Steady) -> dict[str, Any] | None:
        """Of the profiled steps: seconds in which a kernel ran, and that at the steady speed as a share of all time."""
        path = self.sides.scratch / f"{name}.kernels"
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
        """What breaks inside is written down, and the rest continues: time on a card is dear."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is
            self.sides.failures.append(f"{name}: {type(error).__name__}: {error}")
            print(traceback.format_exc(), flush=True)

    @contextlib.contextmanager
    def sampling(self):  # noqa: ANN201 - a context
        """Reads the card's utilisation five times a second while the body runs."""
        read = utilisation() if self.asked.device == "cuda" else None
        self.result["gpu_busy_source"] = "NVML utilization.gpu" if read else None
        over = threading.Event()

        def keep_reading() -> None:
            while read and not over.wait(SAMPLE_SECONDS):
                with contextlib.suppress(OSError):
                    self.samples.append((time.time(), read()))

        reader = threading.Thread(target=keep_reading, daemon=True)
        reader.start()
        try:
            yield
        finally:
            over.set()
            reader.join()


if __name__ == "__main__":
    sys.exit(main())
