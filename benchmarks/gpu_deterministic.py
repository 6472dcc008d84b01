"""Does a run repeat itself bit for bit on this machine's GPU, where does it not, and what does TUNE_DETERMINISTIC cost?

1. The 8-bit layer by itself: the same input through the same layer many times, forward and backward, with and without
   torch's deterministic algorithms.
2. Pairs of undisturbed runs of a middling Llama shape (random weights, dropout 0.1), 8 bit and 4 bit, with and without
   TUNE_DETERMINISTIC: are adapters and losses equal? All runs share the card.
3. The cost: a 1B shape with and without, one after the other, alone on the card.

    python benchmarks/gpu_deterministic.py <output directory>
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_resume import MIDDLING, Attempt, difference  # noqa: E402
from benchmarks.gpu_run import LLAMA_1B, card  # noqa: E402

STEADY = 5  # the first steps compile
LAYER = """
import json, sys, torch, bitsandbytes as bnb
torch.use_deterministic_algorithms(sys.argv[1] == "on")
torch.manual_seed(0)
found = {}
for outliers in (0, 3):
    layer = bnb.nn.Linear8bitLt(512, 1024, bias=False, has_fp16_weights=False, threshold=6.0).cuda()
    x = torch.randn(1, 900, 512, device="cuda", dtype=torch.bfloat16)
    x[..., :outliers] *= 10
    x.requires_grad_(True)
    up = torch.randn(1, 900, 1024, device="cuda", dtype=torch.bfloat16)
    outputs, gradients = set(), set()
    for _ in range(200):
        x.grad = None
        y = layer(x)
        y.backward(up)
        outputs.add(y.detach().float().cpu().numpy().tobytes())
        gradients.add(x.grad.float().cpu().numpy().tobytes())
    found[f"{outliers} outlier columns"] = {"outputs": len(outputs), "gradients": len(gradients)}
print(json.dumps(found))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny shape, to try this script on a CPU")
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    result = {"date": time.strftime("%Y-%m-%d"), "card": card()}
    with tempfile.TemporaryDirectory() as scratch:
        for stage in (layer_alone, pairs, cost):
            result[stage.__name__] = stage(asked, Path(scratch))
            (asked.output / "gpu_deterministic.json").write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps({stage.__name__: result[stage.__name__]}, indent=1), flush=True)
    return 0


def layer_alone(asked: argparse.Namespace, scratch: Path) -> dict:
    """Numbers of different results in 200 repetitions: 1 is what repeats itself."""
    if asked.device == "cpu":
        return {}
    found = {}
    for mode in ("off", "on"):
        done = subprocess.run(
            [sys.executable, "-c", LAYER, mode], capture_output=True, text=True, cwd=scratch, check=False
        )
        found[f"deterministic {mode}"] = json.loads(done.stdout) if done.returncode == 0 else done.stderr[-500:]
    return found


def pairs(asked: argparse.Namespace, scratch: Path) -> list[dict]:
    precisions = ("4bit", "16bit") if asked.small else ("8bit", "4bit")
    model = make_model(scratch / "middling", {} if asked.small else MIDDLING)
    cases = [(precision, flag) for precision in precisions for flag in ("false", "true")]
    attempts = {}
    for precision, flag in cases:
        for twin in "ab":
            name = f"{precision}-{flag}-{twin}"
            changes = {"precision": precision, "deterministic": flag, "lora_dropout": 0.1, "max_steps": 12}
            attempts[name] = Attempt(name, scratch, settings(asked, scratch, model), run_id=name, **changes)
    return [compared(scratch, attempts, f"{precision}-{flag}") for precision, flag in cases]


def compared(scratch: Path, attempts: dict[str, Attempt], name: str) -> dict:
    twins = [attempts[f"{name}-{twin}"] for twin in "ab"]
    codes = [twin.wait() for twin in twins]
    if any(codes):
        print(twins[0].last_words())
        return {"what": name, "exit_codes": codes}
    files = [scratch / "runs" / f"{name}-{twin}" / "adapter/adapter_model.safetensors" for twin in "ab"]
    losses = [[line["loss"] for line in twin.events("train_progress")] for twin in twins]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return {
        "what": name,
        "same_adapter": hashes[0] == hashes[1],
        "same_losses": losses[0] == losses[1],
        "first_different_step": next((n for n, (a, b) in enumerate(zip(*losses, strict=True), 1) if a != b), None),
        "largest_difference": difference(*files),
        "losses": losses,
    }


def cost(asked: argparse.Namespace, scratch: Path) -> list[dict]:
    model = make_model(scratch / "large", {} if asked.small else {**LLAMA_1B, "num_hidden_layers": 16})
    rows = []
    for precision in ("4bit",) if asked.small else ("4bit", "8bit"):
        for flag in ("false", "true"):
            name = f"cost-{precision}-{flag}"
            changes = {"precision": precision, "deterministic": flag, "max_steps": 25}
            attempt = Attempt(name, scratch, settings(asked, scratch, model), run_id=name, **changes)
            code = attempt.wait()
            seconds = [line["step_seconds"] for line in attempt.events("train_progress")][STEADY:]
            row = {"what": name, "exit_code": code, "step_seconds": seconds}
            rows.append(row | ({} if code else {"median_step_seconds": statistics.median(seconds)}))
    return rows


def settings(asked: argparse.Namespace, scratch: Path, model: Path) -> dict:
    return {
        "model": model,
        "dataset": ROOT / "examples/orders/train.jsonl",
        "eval_fraction": 0,
        "output": scratch / "runs",
        "device": asked.device,
        "max_length": 512,
        "samples": 0,
        "learning_rate": "1e-3",
        "log_format": "json",
    }


def make_model(path: Path, shape: dict) -> Path:
    pairs = [f"{key}={value}" for key, value in shape.items()]
    subprocess.run([sys.executable, "-m", "tests.tiny", str(path), *pairs], cwd=ROOT, check=True)
    return path


if __name__ == "__main__":
    sys.exit(main())
