"""Kill and resume on this machine's GPU: is the adapter that of an undisturbed run, bit for bit?

A Llama shape of 1B parameters (random weights), 4-bit, padding-free batches, with and without dropout. For each: one
run that nothing disturbs; one that is killed (SIGKILL, all of it) after a checkpoint and some steps more; and its
resume. Meanwhile another is asked to stop (SIGTERM) while its first step compiles. Then a run whose adapter is so large
that its checkpoints are gigabytes shows how long training waits for one.

The runs of one stage share the card, so their speed means nothing; the last stage has it to itself.

    python benchmarks/gpu_resume.py <output directory>
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_run import LLAMA_1B, card  # noqa: E402

STEPS, EVERY, KILLED_AFTER = 14, 5, 8
MIDDLING = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
DROPOUTS = {f"dropout {value}": {"lora_dropout": value} for value in (0.0, 0.1)}
VARIANTS = {
    "8 bit": {"precision": "8bit"},
    "8 bit, deterministic": {"precision": "8bit", "deterministic": "true"},
    "16 bit, no checkpointing": {"precision": "16bit", "gradient_checkpointing": "off"},
    "paged_adamw_8bit": {"optimizer": "paged_adamw_8bit"},
    "2 x 4, plain checkpointing, fused AdamW": {
        "micro_batch": 2,
        "gradient_checkpointing": "on",
        "optimizer": "adamw_torch_fused",
    },
}
LIMIT_SECONDS = 230


class Attempt:
    """A job in its own process group."""

    def __init__(self, name: str, scratch: Path, settings: dict, **changes: object) -> None:
        self.log = scratch / f"{name}.jsonl"
        (scratch / f"tmp-{name}").mkdir(exist_ok=True)
        variables = {f"TUNE_{key.upper()}": str(value) for key, value in {**settings, **changes}.items()}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TUNE_")} | variables
        environment["TMPDIR"] = str(scratch / f"tmp-{name}")
        self.started = time.monotonic()
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "job"], cwd=ROOT, env=environment, stdout=file, stderr=file
            )

    def lines(self) -> list[dict]:
        text = self.log.read_bytes()
        return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]

    def has(self, event: str, **fields: object) -> bool:
        return any(
            line["event"] == event and all(line.get(k, -1) >= v for k, v in fields.items()) for line in self.lines()
        )

    def events(self, name: str) -> list[dict]:
        return [line for line in self.lines() if line["event"] == name]

    def kill(self) -> None:
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            process.kill()
        self.process.wait()

    def wait(self) -> int:
        try:
            return self.process.wait(max(1, LIMIT_SECONDS - (time.monotonic() - self.started)))
        except subprocess.TimeoutExpired:
            self.kill()
            return -1

    def last_words(self) -> str:
        return "\n".join(json.dumps(line)[:1500] for line in self.lines()[-6:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny shape, to try this script on a CPU")
    parser.add_argument("--variants", action="store_true", help="other settings, on a middling shape")
    parser.add_argument("--only", choices=VARIANTS, action="append", help="with --variants, just this one")
    parser.add_argument("--rank", type=int, default=512, help="of the large adapter")
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        return measure(asked, Path(scratch))


def measure(asked: argparse.Namespace, scratch: Path) -> int:
    model = scratch / "model"
    shape = MIDDLING if asked.variants else {**LLAMA_1B, "num_hidden_layers": 16}
    shape = {} if asked.small else shape
    pairs = [f"{key}={value}" for key, value in shape.items()]
    subprocess.run([sys.executable, "-m", "tests.tiny", str(model), *pairs], cwd=ROOT, check=True)
    settings = {
        "model": model,
        "dataset": ROOT / "examples/orders/train.jsonl",
        "eval_dataset": ROOT / "examples/orders/eval.jsonl",
        "output": scratch / "runs",
        "device": asked.device,
        "max_steps": STEPS,
        "max_length": 512,
        "checkpoint_steps": EVERY,
        "eval_steps": 100,
        "samples": 0,
        "learning_rate": "1e-3",
        "log_format": "json",
    }
    result = {"date": time.strftime("%Y-%m-%d"), "card": card(), "steps": STEPS}
    cases = {name: {"lora_dropout": 0.1, **case} for name, case in VARIANTS.items() if name in (asked.only or VARIANTS)}
    cases = cases if asked.variants else DROPOUTS
    result["resume"] = kill_and_resume(scratch, settings, cases, asked.output)
    (asked.output / "gpu_resume.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1), flush=True)
    if not asked.variants:
        result["large_checkpoint"] = large_checkpoint(scratch, settings, 8 if asked.small else asked.rank, asked.output)
        (asked.output / "gpu_resume.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result["large_checkpoint"], indent=1))
    return 0


def kill_and_resume(scratch: Path, settings: dict, cases: dict[str, dict], output: Path) -> list[dict]:
    rows = []
    undisturbed, killed = {}, {}
    for number, (case, changes) in enumerate(cases.items()):
        undisturbed[case] = Attempt(f"whole-{number}", scratch, settings, run_id=f"whole-{number}", **changes)
        killed[case] = Attempt(f"killed-{number}", scratch, settings, run_id=f"killed-{number}", **changes)
    stopped = Attempt("stopped", scratch, settings, run_id="stopped")
    waiting, asked_at, took = set(killed), 0.0, None
    end = time.monotonic() + LIMIT_SECONDS
    resumed = {}
    while time.monotonic() < end and (waiting or took is None):
        for number, case in enumerate(cases):
            if case not in waiting:
                continue
            attempt = killed[case]
            after = attempt.has("checkpoint_committed", step=EVERY) and attempt.has("train_progress", step=KILLED_AFTER)
            if after or attempt.process.poll() is not None:
                waiting.discard(case)
                if attempt.process.poll() is None:
                    attempt.kill()
                changes = {"run_id": f"killed-{number}", **cases[case]}
                resumed[case] = Attempt(f"resumed-{number}", scratch, settings, **changes)
        if not asked_at and stopped.has("model_loaded"):
            time.sleep(2)  # the first step compiles now
            stopped.process.send_signal(signal.SIGTERM)
            asked_at = time.monotonic()
        if asked_at and took is None and stopped.process.poll() is not None:
            took = time.monotonic() - asked_at
        time.sleep(0.1)
    for number, (case, attempt) in enumerate(undisturbed.items()):
        rows.append({"what": case} | compared(scratch, number, attempt, killed[case], resumed.get(case), output))
    rows.append(
        {
            "what": "SIGTERM while the first step compiles",
            "exit_code": stopped.process.poll(),
            "seconds_to_exit": round(took, 2) if took else None,
            "steps": len(stopped.events("train_progress")),
        }
    )
    return rows


def compared(
    scratch: Path, number: int, whole: Attempt, killed: Attempt, resumed: Attempt | None, output: Path
) -> dict:
    codes = [whole.wait(), killed.process.poll(), resumed.wait() if resumed else None]
    for attempt, code in ((whole, codes[0]), (resumed, codes[2])):
        if attempt and code:
            print(attempt.last_words())
    row = {"exit_codes": codes}
    if codes[0] or codes[2]:
        return row
    (output / f"gpu_resume-{number}.jsonl").write_bytes(resumed.log.read_bytes())
    adapters, losses = [], []
    for name in (f"whole-{number}", f"killed-{number}"):
        run = scratch / "runs" / name
        adapters.append(run / "adapter/adapter_model.safetensors")
        history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in history if line["event"] == "train_progress"])
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in adapters]
    event = resumed.events("resumed")[-1]
    return row | {
        "same_adapter": hashes[0] == hashes[1],
        "sha256": hashes,
        "same_losses": losses[0] == losses[1],
        "losses": losses,
        "largest_difference": difference(*adapters),
        "resumed_step": event["resumed_step"],
        "seconds_to_first_step": event["seconds_to_first_step"],
        "resume_not_bitwise": resumed.events("resume_not_bitwise"),
        "checkpoints": checkpoints(whole),
    }


def difference(one: Path, two: Path) -> float:
    first, second = load_file(one), load_file(two)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def checkpoints(attempt: Attempt) -> list[dict]:
    names = ("step", "bytes", "stall_seconds", "upload_seconds")
    return [{name: line[name] for name in names} for line in attempt.events("checkpoint_committed")]


def large_checkpoint(scratch: Path, settings: dict, rank: int, output: Path) -> dict:
    changes = {"run_id": "large", "lora_r": rank, "lora_alpha": rank, "max_steps": 6, "checkpoint_steps": 2}
    attempt = Attempt("large", scratch, settings, **changes)
    code = attempt.wait()
    if code:
        print(attempt.last_words())
        return {"rank": rank, "exit_code": code}
    (output / "gpu_resume-large.jsonl").write_bytes(attempt.log.read_bytes())
    steps = [line["step_seconds"] for line in attempt.events("train_progress")]
    return {"rank": rank, "exit_code": code, "checkpoints": checkpoints(attempt), "step_seconds": steps}


if __name__ == "__main__":
    sys.exit(main())
