"""The control for the promise of an exact resume: what stock transformers/TRL checkpoints do when a run is killed.

No code of this project trains here. Each row is a real child process: a tiny random Llama under Unsloth and TRL's
SFTTrainer on a CPU, with `save_steps`, resumed with `trainer.train(resume_from_checkpoint=True)` as tutorials do, and
`trainer.save_model()` at the end. Adapters are compared by SHA-256, losses step by step, with a run that nobody
disturbed (which runs twice, to show that on one machine it repeats itself), and with a resume of the same checkpoint
left untouched, since that one alone may differ already.

How the harm is done: a callback halts the child after a step and the child gets SIGKILL or SIGTERM there; in the middle
of a save the child sends itself SIGKILL (an audit hook) at the moment that stock code opens a certain file of
`checkpoint-12` for writing; damaged, cut and missing files are made by hand in a copy of the killed run's folder.

    python benchmarks/resume_control.py [--json FILE]

Takes about four minutes on one core, needs no network and no GPU, and cleans up behind itself.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVE, KILL_AT, TERM_AT = 24, 6, 15, 9
LAST = f"checkpoint-{KILL_AT // SAVE * SAVE}"
HOLD_S, GRACE_S, LIMIT_S = 30, 6, 120  # the JIT checkpoint waits 3 s after SIGTERM before it does anything
RATE, OTHER_RATE = 1e-3, 1e-5
ADAPTER, OPTIMIZER = "adapter_model.safetensors", "optimizer.pt"
PACKAGES = ("transformers", "trl", "peft", "accelerate", "torch", "unsloth", "bitsandbytes")
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_AUTO_INSTALL": "0",
    "UNSLOTH_FORCE_CPU": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "WANDB_DISABLED": "true",
    "OMP_NUM_THREADS": "1",
}
CACHES = ("HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "UNSLOTH_COMPILE_LOCATION", "XDG_CACHE_HOME")


# ---- the child: what a tutorial's training script does ----


@dataclass(frozen=True, kw_only=True)
class Order:
    """What one child is to do; it gets this as JSON."""

    resume: bool = False
    four_bit: bool = True
    learning_rate: float = RATE
    data: str = "sums"
    hold_at: int = 0
    hold_s: int = HOLD_S
    die_at_open: str = ""
    jit: bool = False


def child(order: Order, model_directory: str) -> int:
    """Train in the current directory as a tutorial does: train (or resume), then save the adapter."""
    import unsloth  # noqa: F401, PLC0415 - first, since TRL alone cannot train on a CPU here
    from datasets import Dataset  # noqa: PLC0415
    from trl import SFTConfig, SFTTrainer  # noqa: PLC0415
    from unsloth import FastLanguageModel  # noqa: PLC0415

    if order.die_at_open:
        sys.addaudithook(die_when_opened(order.die_at_open))
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_directory, max_seq_length=128, load_in_4bit=order.four_bit, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(model, r=8, lora_dropout=0.1, use_gradient_checkpointing=False)
    arguments = SFTConfig(
        output_dir="out",
        max_steps=STEPS,
        save_steps=SAVE,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=order.learning_rate,
        seed=3407,
        enable_jit_checkpoint=order.jit,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows(order.data)),
        processing_class=tokenizer,
        callbacks=[witness(order)],
    )
    trainer.train(resume_from_checkpoint=order.resume or None)
    trainer.save_model("final")
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    Path("curve.json").write_text(json.dumps([[e["step"], e["loss"], e["learning_rate"]] for e in logged]))
    return 0


def rows(data: str) -> list[dict[str, Any]]:
    """96 conversations; `data` names which."""
    sign, other = ("+", 7) if data == "sums" else ("-", 5)
    pairs = [(i, i * other % 13) for i in range(96)]
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {a}{sign}{b}?"},
                {"role": "assistant", "content": f"It is {a + b if sign == '+' else a - b}."},
            ]
        }
        for a, b in pairs
    ]


def witness(order: Order) -> Any:
    """A callback that writes down each finished step, and halts after the asked one."""
    from transformers import TrainerCallback  # noqa: PLC0415

    class Witness(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            with Path("steps.txt").open("a") as file:
                file.write(f"{state.global_step}\n")
            if state.global_step == order.hold_at:
                Path("held").touch()
                time.sleep(order.hold_s)

    return Witness()


def die_when_opened(ending: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook: SIGKILL to this very process when a file whose path ends so is opened for writing."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(ending) and "w" in str(arguments[1]):
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


# ---- the parent: starts, kills and compares ----


@dataclass(kw_only=True)
class Run:
    """What was seen of one child."""

    exit: str
    error: str
    steps: list[int]
    curve: dict[int, tuple[float, float]]
    adapter: str | None
    dtype: str | None
    log: set[str]

    def text(self) -> str:
        """In a few words."""
        span = f"steps {self.steps[0]}-{self.steps[-1]}" if self.steps else "no step"
        return f"{self.exit}, {span}" + (f": {self.error}" if self.error else "")


@dataclass(kw_only=True)
class Row:
    """One scenario as it was observed."""

    scenario: str
    runs: list[str]
    same_as_uninterrupted: bool | None = None
    same_as_untouched_resume: bool | None = None
    largest_loss_difference: float | None = None
    adapter_dtype: str | None = None
    new_log_lines: list[str] | None = None
    seen: list[str] = field(default_factory=list)


class Bench:
    """The temporary directory with the model, the caches and one folder per run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = os.environ | SETTINGS | {name: str(directory / "caches" / name.lower()) for name in CACHES}
        self.model = directory / "model"
        command = [sys.executable, "-m", "tests.tiny", str(self.model)]
        subprocess.run(command, cwd=ROOT, env=self.environment, check=True, capture_output=True, timeout=LIMIT_S)

    def folder(self, name: str, *, like: str | None = None) -> Path:
        """A new folder for a run, empty or with the checkpoints of another."""
        path = self.directory / name
        path.mkdir()
        if like:
            shutil.copytree(self.directory / like / "out", path / "out")
        return path

    def run(self, folder: Path, order: Order, *, send: signal.Signals | None = None) -> Run:
        """Run one child in `folder` to its end; with `send`, once it halts at the asked step."""
        for leftover in ("steps.txt", "curve.json", "held"):
            (folder / leftover).unlink(missing_ok=True)
        command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(asdict(order)), str(self.model)]
        with (folder / "log.txt").open("wb") as log, (folder / "output.txt").open("wb") as output:
            process = subprocess.Popen(command, cwd=folder, env=self.environment, stdout=output, stderr=log)
            try:
                if send:
                    wait_until_held(process, folder / "held")
                    process.send_signal(send)
                code = process.wait(timeout=LIMIT_S)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return self.observed(folder, code)

    def observed(self, folder: Path, code: int) -> Run:
        """What the child left behind."""
        lines = [line.strip() for line in re.split(r"[\r\n]+", self.clean((folder / "log.txt").read_text()))]
        steps, curve, adapter = folder / "steps.txt", folder / "curve.json", folder / "final" / ADAPTER
        raw = json.loads(curve.read_text()) if curve.exists() else []
        return Run(
            exit=f"exit {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}",
            error=next((line for line in reversed(lines) if line), "") if code > 0 else "",
            steps=[int(line) for line in steps.read_text().split()] if steps.exists() else [],
            curve={step: (loss, rate) for step, loss, rate in raw},
            adapter=hashlib.sha256(adapter.read_bytes()).hexdigest() if adapter.exists() else None,
            dtype=tensors(adapter)[0]["dtype"] if adapter.exists() else None,
            log={re.sub(r"[\d.]+", "#", line) for line in lines if line and "%|" not in line},
        )

    def clean(self, text: str) -> str:
        """`text` without the places of this machine."""
        text = re.sub(re.escape(str(self.directory)) + r"/[^/'\" ]*", "<run>", text)
        return text.replace(str(ROOT), "<repository>").replace(sys.prefix, "<python>")


def wait_until_held(process: subprocess.Popen[bytes], marker: Path) -> None:
    """Until the child halts after its step."""
    deadline = time.monotonic() + LIMIT_S
    while not marker.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the child ended before the step at which it should have been killed")
        time.sleep(0.05)


def gap(one: Run, other: Run) -> float | None:
    """The largest difference of losses over the steps that both logged."""
    common = one.curve.keys() & other.curve.keys()
    differences = [abs(one.curve[step][0] - other.curve[step][0]) for step in common]
    return max(differences, key=lambda d: (math.isnan(d), d)) if differences else None


def row(scenario: str, runs: list[Run], reference: Run, untouched: Run | None = None) -> Row:
    """Compare the last of `runs` with the uninterrupted run and with the resume of the untouched checkpoint."""
    last = runs[-1]
    return Row(
        scenario=scenario,
        runs=[run.text() for run in runs],
        same_as_uninterrupted=last.adapter == reference.adapter if last.adapter else None,
        same_as_untouched_resume=last.adapter == untouched.adapter if untouched and last.adapter else None,
        largest_loss_difference=gap(last, reference),
        adapter_dtype=last.dtype,
        new_log_lines=sorted(last.log - untouched.log) if untouched and last.exit == "exit 0" else None,
    )


# ---- harm to files ----


def tensors(path: Path) -> list[dict[str, Any]]:
    """The entries of a safetensors header, without its metadata, in the order of the file."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return sorted((v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"])


def numbers(path: Path) -> bytes:
    """The content of a bf16 or fp32 safetensors file as fp32, so that the same numbers in either are equal."""
    raw = path.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    if tensors(path)[0]["dtype"] == "F32":
        return data
    return b"".join(b"\0\0" + data[at : at + 2] for at in range(0, len(data), 2))


def flip(path: Path, offset: int) -> None:
    """Flip the sign bit of the little-endian number whose last byte lies at `offset`."""
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0x80
    path.write_bytes(raw)


def flip_adapter(checkpoint: Path) -> None:
    """The sign of one weight in the middle of the first tensor."""
    path = checkpoint / ADAPTER
    start, end = tensors(path)[0]["data_offsets"]
    flip(path, 8 + int.from_bytes(path.read_bytes()[:8], "little") + (start + end) // 8 * 4 + 3)


def flip_optimizer(checkpoint: Path) -> None:
    """The sign of one number in the middle of the first state tensor (Adam's first moment)."""
    path = checkpoint / OPTIMIZER
    with zipfile.ZipFile(path) as archive:
        record = next(i for i in archive.infolist() if "/data/" in i.filename and i.file_size > 8)
    raw = path.read_bytes()
    name, extra = (int.from_bytes(raw[record.header_offset + at :][:2], "little") for at in (26, 28))
    flip(path, record.header_offset + 30 + name + extra + record.file_size // 8 * 4 + 3)


def cut_optimizer(checkpoint: Path) -> None:
    """Half of the file, as a full disk or a lost write leaves it."""
    path = checkpoint / OPTIMIZER
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(name: str) -> Callable[[Path], None]:
    """Harm: one file is missing."""
    return lambda checkpoint: (checkpoint / name).unlink()


# ---- scenarios ----


def killed_between_saves(bench: Bench, tag: str, *, four_bit: bool) -> tuple[Run, Run, list[Row]]:
    """The uninterrupted run (twice), a run killed between saves, and its resume."""
    words = "4-bit" if four_bit else "16-bit"
    order = Order(four_bit=four_bit)
    reference = bench.run(bench.folder(f"{tag}-whole"), order)
    again = bench.run(bench.folder(f"{tag}-again"), order)
    killed = bench.run(bench.folder(f"{tag}-killed"), Order(four_bit=four_bit, hold_at=KILL_AT), send=signal.SIGKILL)
    resumed = bench.run(bench.folder(f"{tag}-resumed", like=f"{tag}-killed"), Order(four_bit=four_bit, resume=True))
    rows = [
        row(f"{words}: the uninterrupted run once more, nothing killed", [again], reference),
        row(f"{words}: SIGKILL between saves, resume", [killed, resumed], reference),
    ]
    rows[0].seen.append(f"the uninterrupted run's adapter is {reference.dtype}")
    return reference, resumed, rows


def killed_in_save(bench: Bench, name: str, reference: Run) -> Row:
    """SIGKILL at the moment that a file of the newest checkpoint is opened for writing; resume twice."""
    folder = bench.folder(f"in-save-{name}")
    runs = [bench.run(folder, Order(die_at_open=f"{LAST}/{name}"))]
    left = sorted(path.name for path in (folder / "out" / LAST).iterdir())
    runs += [bench.run(folder, Order(resume=True)) for _ in range(2)]
    result = row(f"SIGKILL in a save, as {LAST}/{name} is opened; resume twice", runs, reference)
    older = sorted(path.name for path in (folder / "out").glob("checkpoint-*") if path.name != LAST)
    result.seen += [
        f"left in {LAST}: {', '.join(left)}",
        f"whole older checkpoints there: {', '.join(older) or 'none'}",
    ]
    return result


def changed(bench: Bench, scenario: str, reference: Run, untouched: Run, change: Any) -> Row:
    """Resume the run killed between saves with harm to its newest checkpoint, or with another order."""
    name = re.sub(r"\W+", "-", scenario)
    folder = bench.folder(name, like="4bit-killed")
    order = change if isinstance(change, Order) else Order(resume=True)
    if not isinstance(change, Order):
        change(folder / "out" / LAST)
    result = row(scenario, [resumed := bench.run(folder, order)], reference, untouched)
    rates = [(step, rate) for step, (_, rate) in sorted(resumed.curve.items()) if step in resumed.steps]
    if rates:
        step, rate = rates[0]
        result.seen.append(f"learning rate at step {step}: {rate:.3g} (uninterrupted {reference.curve[step][1]:.3g})")
    if order.learning_rate != RATE:
        result.seen.append(f"learning rate asked: {order.learning_rate:g}")
    return result


def finished(bench: Bench, reference: Run) -> Row:
    """Resume a run that has finished."""
    folder = bench.folder("finished", like="4bit-whole")
    shutil.copytree(bench.directory / "4bit-whole" / "final", folder / "final")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    result = row("resume of a finished run", [bench.run(folder, Order(resume=True))], reference)
    touched = [path for path, (mtime, _) in before.items() if path.exists() and path.stat().st_mtime_ns != mtime]
    other = [path.relative_to(folder).as_posix() for path in touched if path.read_bytes() != before[path][1]]
    same = numbers(bench.directory / "4bit-whole" / "final" / ADAPTER) == numbers(folder / "final" / ADAPTER)
    result.seen.append(f"the adapter's numbers are {'the same' if same else 'others'}")
    result.seen += [f"files written again: {len(touched)}", f"with other content: {', '.join(sorted(other)) or 'none'}"]
    return result


def terminated(bench: Bench, reference: Run, *, jit: bool) -> list[Row]:
    """SIGTERM after a step, with or without the JIT checkpoint; then resume."""
    folder = bench.folder(f"term-{jit}")
    order = Order(jit=jit, hold_at=TERM_AT, hold_s=GRACE_S)
    stopped = bench.run(folder, order, send=signal.SIGTERM)
    words = f"SIGTERM at step {TERM_AT}, {'enable_jit_checkpoint' if jit else 'no JIT checkpoint'}"
    first = row(words, [stopped], reference)
    first.seen.append(f"checkpoints: {', '.join(sorted(p.name for p in (folder / 'out').glob('checkpoint-*')))}")
    first.seen.append("final adapter saved" if stopped.adapter else "no final adapter")
    resumed = bench.run(folder, Order(resume=True, jit=jit))
    return [first, row(f"{words}; resumed", [stopped, resumed], reference)]


def observe(bench: Bench, tell: Callable[[str], None]) -> list[Row]:
    """All scenarios, one after the other."""
    reference, untouched, table = killed_between_saves(bench, "4bit", four_bit=True)
    tell("4-bit runs done")
    table += killed_between_saves(bench, "16bit", four_bit=False)[2]
    tell("16-bit runs done")
    table += [killed_in_save(bench, name, reference) for name in ("adapter_config.json", "trainer_state.json")]
    tell("kills in a save done")
    changes: dict[str, Any] = {
        f"{LAST}/{OPTIMIZER}: one bit flipped (sign)": flip_optimizer,
        f"{LAST}/{ADAPTER}: one bit flipped (sign)": flip_adapter,
        f"{LAST}/{OPTIMIZER}: cut to half": cut_optimizer,
        f"{LAST}/{OPTIMIZER}: missing": without(OPTIMIZER),
        f"{LAST}/rng_state.pth: missing": without("rng_state.pth"),
        f"{LAST}/scheduler.pt: missing": without("scheduler.pt"),
        f"resume with learning_rate={OTHER_RATE:g}": Order(resume=True, learning_rate=OTHER_RATE),
        "resume with another dataset": Order(resume=True, data="differences"),
    }
    table += [changed(bench, words, reference, untouched, change) for words, change in changes.items()]
    tell("changes done")
    table.append(finished(bench, reference))
    return table + terminated(bench, reference, jit=False) + terminated(bench, reference, jit=True)


def show(console: Console, rows: list[Row]) -> None:
    """Print the table."""
    table = Table(title="stock resume_from_checkpoint", show_lines=True)
    for column in (
        "scenario",
        "what happened",
        "as uninterrupted",
        "as untouched resume",
        "loss differs by",
        "adapter",
        "seen",
    ):
        table.add_column(column, overflow="fold")
    answer = {True: "yes", False: "no", None: "-"}
    for one in rows:
        notes = [*one.seen, *(f"log: {line}" for line in one.new_log_lines or [])]
        if one.new_log_lines == []:
            notes.append("nothing new in the log")
        loss = one.largest_loss_difference
        table.add_row(
            one.scenario,
            "\n".join(one.runs),
            answer[one.same_as_uninterrupted],
            answer[one.same_as_untouched_resume],
            "-" if loss is None else f"{loss:.3g}",
            one.adapter_dtype or "-",
            "\n".join(notes),
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the same as JSON")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        return child(Order(**json.loads(asked.child[0])), asked.child[1])
    console, started = Console(width=None if sys.stdout.isatty() else 170), time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        rows = observe(Bench(Path(directory).resolve()), console.log)
    show(console, rows)
    if asked.json:
        facts = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "run": {"max_steps": STEPS, "save_steps": SAVE, "killed_after_step": KILL_AT, "learning_rate": RATE},
            "rows": [asdict(one) for one in rows],
        }
        asked.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
