"""TUNE_ROLE_WEIGHTS on this machine's GPU: is the loss the one that it should be, and what does it cost?

1. One training step on a middling Llama shape with a real vocabulary's size (random weights), cut in three ways and in
   two precisions: loss and gradients by the trainer, against those by hand (tests/by_hand.py), with the same for
   weights that are all 1, which take the ordinary way, and for weights that are all but 1, which take the other.
   Are the batches still padding-free?
2. Weights of 0 and 1 against none at all, and weights twice: are the adapters equal, bit for bit? Does
   TUNE_DETERMINISTIC find a kernel for all of it?
3. The cost: a 1B shape with the same labelled tokens, all of weight 1 and of two weights, one after the other, alone on
   the card.

    python benchmarks/gpu_weights.py <output directory>

It prints what it found and ends with 1 if something is wrong.
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

from benchmarks.gpu_deterministic import make_model, settings  # noqa: E402
from benchmarks.gpu_resume import LIMIT_SECONDS, MIDDLING, Attempt  # noqa: E402
from benchmarks.gpu_run import LLAMA_1B, card  # noqa: E402

PassConfig = tuple[str, int, str]
ROWS, STEPS, STEADY = 8, 16, 5  # the first steps compile
WEIGHTS, ONES, ALMOST = "assistant=1,user=0.1", "assistant=1,user=1", "assistant=1,user=1.000001"
# Of bf16: by hand each row stands alone and has all its logits, in another kernel.
LOSS_OFF, GRADIENTS_OFF = 2e-3, 3e-2
CUTS = {
    "8 x 1": ("16bit", ROWS, WEIGHTS),
    "2 x 4": ("16bit", 2, WEIGHTS),
    "1 x 8": ("16bit", 1, WEIGHTS),
    "4 bit": ("4bit", ROWS, WEIGHTS),
    "all 1": ("16bit", ROWS, ONES),
    "all but 1": ("16bit", ROWS, ALMOST),
}
PAIRS = {
    "no weights": {"role_weights": ""},
    "0 and 1": {"role_weights": "assistant=1,user=0,tool=0"},
    "weights": {"role_weights": WEIGHTS},
    "weights again": {"role_weights": WEIGHTS},
    "weights, deterministic": {"role_weights": WEIGHTS, "deterministic": "true"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny shape, to try this script on a CPU")
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    result = {"date": time.strftime("%Y-%m-%d"), "card": card()}
    with tempfile.TemporaryDirectory() as scratch:
        for name, found in stages(asked, Path(scratch)):
            result[name] = found
            (asked.output / "gpu_weights.json").write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps({name: found}, indent=1), flush=True)
    wrong = problems(result, padding_free=asked.device == "cuda")
    print("\n".join(wrong) or "all is as it should be")
    return 1 if wrong else 0


def stages(asked: argparse.Namespace, scratch: Path):  # noqa: ANN201 - names and what was found
    vocabulary = {} if asked.small else {**MIDDLING, "vocab_size": LLAMA_1B["vocab_size"]}
    middling = make_model(scratch / "middling", vocabulary)
    rows = scratch / "rows.jsonl"
    lines = (ROOT / "examples/orders/train.jsonl").read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:ROWS]))
    started = time.monotonic()
    hands = {name: ByHand(scratch, asked, middling, rows, cut) for name, cut in CUTS.items()}
    common = {**settings(asked, scratch, middling), "max_steps": 6, "lora_dropout": 0.1}
    attempts = {
        name: Attempt(run_id(name), scratch, common, run_id=run_id(name), **more) for name, more in PAIRS.items()
    }
    large = make_model(scratch / "large", {} if asked.small else {**LLAMA_1B, "num_hidden_layers": 16})
    yield "by_hand", {name: process.answer() for name, process in hands.items()}
    yield "adapters", {name: adapter(scratch, name, attempt) for name, attempt in attempts.items()}
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    for number, (name, value) in enumerate({"all 1": ONES, "two weights": WEIGHTS}.items()):
        yield f"cost, {name}", cost(asked, scratch, large, number, value)
    print(f"{time.monotonic() - started:.0f} s", flush=True)


def run_id(name: str) -> str:
    return name.replace(" ", "-").replace(",", "")


class ByHand:
    """tests/by_hand.py in a process of its own: a model is compiled for one trainer."""

    def __init__(self, scratch: Path, asked: argparse.Namespace, model: Path, rows: Path, cut: PassConfig) -> None:
        self.log = scratch / f"by-hand-{id(self)}.log"
        command = [sys.executable, "-m", "tests.by_hand", str(model), str(rows), "--device", asked.device]
        command += ["--precision", cut[0], "--micro", str(cut[1]), "--weights", cut[2]]
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)

    def answer(self) -> dict:
        try:
            self.process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
        text = self.log.read_text()
        found = [line for line in text.splitlines() if line.startswith('{"weights"')]
        return json.loads(found[-1]) if found else {"error": text[-3000:]}


def adapter(scratch: Path, name: str, attempt: Attempt) -> dict:
    code = attempt.wait()
    if code:
        return {"exit_code": code, "error": attempt.last_words()}
    path = scratch / "runs" / run_id(name) / "adapter/adapter_model.safetensors"
    return {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "losses": [line["loss"] for line in attempt.events("train_progress")],
    }


def cost(asked: argparse.Namespace, scratch: Path, model: Path, number: int, weights: str) -> dict:
    # The same scratch for both, so that the second finds the first one's compiled kernels.
    attempt = Attempt(
        "cost", scratch, settings(asked, scratch, model), run_id=f"cost-{number}", max_steps=STEPS, role_weights=weights
    )
    code = attempt.wait()
    if code:
        return {"exit_code": code, "error": attempt.last_words()}
    steps = attempt.events("train_progress")[STEADY:]
    tokens = [line["tokens_per_second"] for line in steps]  # each over the 20 steps before it, compiling included
    return {
        "median_step_seconds": statistics.median(line["step_seconds"] for line in steps),
        "step_seconds": [line["step_seconds"] for line in steps],
        "last_tokens_per_second": tokens[-1],
        "labelled_tokens": attempt.events("dataset_ready")[0]["labelled_tokens"],
        "weight_by_role": attempt.events("dataset_ready")[0]["weight_by_role"],
        "batching": attempt.events("plan_made")[0]["plan"]["batching"],
        "gpu_memory_peak_bytes": steps[-1]["gpu_memory_peak_bytes"],
    }


def failures(result: dict):  # noqa: ANN201 - what broke, and its last words
    for stage, found in result.items():
        each = {stage: found} if stage.startswith("cost") else found
        if isinstance(each, dict):
            yield from ((name, one["error"]) for name, one in each.items() if "error" in one)


def problems(result: dict, *, padding_free: bool) -> list[str]:
    wrong = [f"{name}: {text}" for name, text in failures(result)]
    for name, found in result["by_hand"].items():
        if "error" in found:
            continue
        if found["loss_off"] > LOSS_OFF or found["gradients_off"] > GRADIENTS_OFF:
            wrong.append(f"{name}: off from what was computed by hand")
        if found["padding_free"] is not padding_free:
            wrong.append(f"{name}: padding_free is {found['padding_free']}")
        if found["weighted"] is (name == "all 1"):
            wrong.append(f"{name}: weighted is {found['weighted']}")
    adapters = {name: found.get("sha256") for name, found in result["adapters"].items()}
    for one, other in (("no weights", "0 and 1"), ("weights", "weights again")):
        if adapters[one] != adapters[other]:
            wrong.append(f"the adapters of {one!r} and {other!r} differ")
    if adapters["weights"] == adapters["no weights"]:
        wrong.append("weights change nothing")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
