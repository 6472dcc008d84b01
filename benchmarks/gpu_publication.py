"""Kill and publish on this machine's GPU: is every published result the same, bit for bit, wherever the run was killed?

A Llama shape of 8 layers (random weights), 4-bit, adapter and merged weights. One run that nothing disturbs, and runs
that are killed (SIGKILL, with their uploader): after two checkpoints, with dropout 0 and 0.1; inside the upload of the
results; and right after the `published` record. Each is started again, and what `done.json` names is compared.

    python benchmarks/gpu_publication.py <output directory>
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_run import card  # noqa: E402

SHAPE = (
    "hidden_size=2048 intermediate_size=8192 num_attention_heads=32 num_key_value_heads=8 vocab_size=32000 "
    "max_position_embeddings=8192 num_hidden_layers=8"
)
LIMIT_SECONDS = 200


class Run:
    """A run under an output of its own, and its attempts."""

    def __init__(self, place: Path, name: str, dropout: str = "0.1") -> None:
        self.output, self.scratch, self.name = place / name / "out", place / name / "scratch", name
        self.scratch.mkdir(parents=True)
        self.codes: list[int] = []
        self._environment = os.environ | {
            "TUNE_MODEL": str(place / "model"),
            "TUNE_DATASET": str(ROOT / "examples/orders/train.jsonl"),
            "TUNE_EVAL_DATASET": str(ROOT / "examples/orders/eval.jsonl"),
            "TUNE_OUTPUT": str(self.output),
            "TUNE_RUN_ID": "x",
            "TUNE_DEVICE": "cuda",
            "TUNE_MAX_STEPS": "20",
            "TUNE_MAX_LENGTH": "512",
            "TUNE_SAMPLES": "2",
            "TUNE_EXPORT": "adapter,merged_16bit",
            "TUNE_CHECKPOINT_STEPS": "5",
            "TUNE_LORA_DROPOUT": dropout,
            "TMPDIR": str(self.scratch),
        }

    def start(self) -> subprocess.Popen[bytes]:
        """An attempt; what it prints goes to a file of its own."""
        log = (self.scratch / f"{len(self.codes)}.jsonl").open("wb")
        command = [sys.executable, "-m", "job"]
        return subprocess.Popen(command, cwd=ROOT, env=self._environment, stdout=log, stderr=log)

    def finish(self) -> "Run":
        """An attempt that nothing disturbs."""
        self.codes.append(self.start().wait(LIMIT_SECONDS))
        return self

    def killed(self, when: Callable[[], bool]) -> "Run":
        """An attempt that is killed as soon as something is true of the output."""
        attempt, end = self.start(), time.monotonic() + LIMIT_SECONDS
        while attempt.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError, ValueError):
                if when():
                    break
            time.sleep(0.01)
        family = [psutil.Process(attempt.pid), *psutil.Process(attempt.pid).children(recursive=True)]
        for process in family:
            process.send_signal(signal.SIGKILL)
        self.codes.append(attempt.wait())
        return self

    def records(self) -> list[str]:
        """The kinds of the ledger's records."""
        paths = sorted((self.output / "x/checkpoints/commits").glob("*.json"))
        return [json.loads(path.read_text())["kind"] for path in paths]

    def result(self) -> dict[str, object]:
        """What `done.json` names, and whether it is as listed."""
        run = self.output / "x"
        done, latest = (json.loads(path.read_text()) for path in (run / "done.json", self.output / "latest.json"))
        files = {one["name"]: _sha256(run / done["prefix"] / one["name"]) for one in done["artifacts"]}
        lines = map(json.loads, (run / done["prefix"] / "metrics.jsonl").read_text().splitlines())
        merged = [files[name] for name in sorted(files) if name.startswith("merged_16bit/") and "safetensors" in name]
        return {
            "codes": self.codes,
            "records": self.records(),
            "prefix": done["prefix"],
            "results": sorted(path.name for path in (run / "results").iterdir()),
            "all_as_listed": files == {one["name"]: one["sha256"] for one in done["artifacts"]},
            "latest_agrees": latest["artifacts"] == done["artifacts"],
            "adapter": files["adapter/adapter_model.safetensors"],
            "copy": _sha256(run / "adapter/adapter_model.safetensors"),
            "merged": hashlib.sha256("".join(merged).encode()).hexdigest(),
            "losses": [line["loss"] for line in lines if line["event"] == "train_progress"],
        }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _same(results: list[dict[str, object]]) -> bool:
    return len({json.dumps([one[name] for name in ("adapter", "copy", "merged", "losses")]) for one in results}) == 1


def main() -> int:
    """Run them all, and write what was found."""
    output = Path(sys.argv[1])
    place = Path(tempfile.mkdtemp())
    subprocess.run([sys.executable, "-m", "tests.tiny", str(place / "model"), *SHAPE.split()], cwd=ROOT, check=True)
    found = {}
    for dropout in ("0", "0.1"):
        found[f"whole-{dropout}"] = Run(place, f"whole-{dropout}", dropout).finish().result()
        run = Run(place, f"killed-{dropout}", dropout)
        run.killed(lambda run=run: run.records().count("checkpoint") >= 2).finish()
        found[run.name] = run.result()
    run = Run(place, "killed-in-upload")
    uploads = run.output / "x/results"
    run.killed(lambda: "final" in run.records() and any(uploads.rglob("*.safetensors"))).finish()
    found[run.name] = run.result()
    run = Run(place, "killed-after-published")
    found[run.name] = run.killed(lambda: "published" in run.records()).finish().result()
    bitwise = {
        "dropout 0": _same([found[name] for name in ("whole-0", "killed-0")]),
        "dropout 0.1": _same([body for name, body in found.items() if not name.endswith("-0")]),
    }
    body = {"card": card(), "runs": found, "bitwise": bitwise}
    (output / f"gpu-publication-{time.strftime('%Y-%m-%d')}.json").write_text(json.dumps(body, indent=1) + "\n")
    sys.stdout.write(json.dumps(bitwise) + "\n")
    return 0 if all(bitwise.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
