"""A Llama-shaped model of 1B parameters (random weights) through `python -m job` on this machine's GPU.

Shows that the same program that the tests run on a CPU trains in 4-bit on a card, that the memory fields come from
the card, and that adapter and merged weights load in plain transformers and agree. Prints a summary as JSON.

    python benchmarks/gpu_run.py <output directory> [--steps 30] [--layers 16]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import card  # noqa: E402 - found through the line above

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny shape, to try this script on a CPU")
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        return measure(asked, Path(scratch))


def measure(asked: argparse.Namespace, scratch: Path) -> int:
    model = scratch / "model"
    shape = {} if asked.small else {**LLAMA_1B, "num_hidden_layers": asked.layers}
    pairs = [f"{key}={value}" for key, value in shape.items()]
    subprocess.run([sys.executable, "-m", "tests.tiny", str(model), *pairs], cwd=ROOT, check=True)

    log = asked.output / "gpu_run.jsonl"
    settings = {
        "TUNE_MODEL": str(model),
        "TUNE_DATASET": str(ROOT / "examples/orders/train.jsonl"),
        "TUNE_EVAL_DATASET": str(ROOT / "examples/orders/eval.jsonl"),
        "TUNE_OUTPUT": str(scratch / "runs"),
        "TUNE_RUN_ID": "gpu-run",
        "TUNE_DEVICE": asked.device,
        "TUNE_MAX_STEPS": str(asked.steps),
        "TUNE_MAX_LENGTH": "512",
        "TUNE_CHECKPOINT_STEPS": str(max(1, asked.steps // 2)),
        "TUNE_EXPORT": "adapter,merged_16bit",
        "TUNE_SAMPLES": "2",
    }
    started = time.monotonic()
    with log.open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "job"], cwd=ROOT, env=os.environ | settings, stdout=file, stderr=file, check=False
        )
    seconds = time.monotonic() - started
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    print(f"exit code {done.returncode} after {seconds:.0f} s, {len(lines)} lines of JSON")
    if done.returncode:
        print("\n".join(json.dumps(line)[:3000] for line in lines[-12:]))
        return done.returncode
    run = scratch / "runs" / "gpu-run"
    compared = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/compare_adapter.py"), str(model), str(run)],
        capture_output=True,
        text=True,
        check=False,
    )
    print(compared.stdout[-2000:], compared.stderr[-3000:] if compared.returncode else "")
    events = {line["event"]: line for line in lines}
    summary = {
        "date": time.strftime("%Y-%m-%d"),
        "card": card(),
        "versions": events["run_started"]["versions"],
        "seconds": round(seconds, 1),
        "model_loaded": events["model_loaded"],
        "last_progress": events["train_progress"],
        "run_complete": events["run_complete"],
        "plain_transformers": json.loads(compared.stdout.splitlines()[-1]) if not compared.returncode else "failed",
    }
    (asked.output / "gpu_run.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    return compared.returncode


if __name__ == "__main__":
    sys.exit(main())
