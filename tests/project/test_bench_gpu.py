"""The parts of benchmarks/gpu.py that need no card: rows, order, statistics, FLOPs, verdicts, table and charts.

Numbers are worked out by hand. `python benchmarks/gpu.py run <directory> --size tiny --device cpu` tries the rest.
"""

import datetime
import importlib.util
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from benchmarks import gpu, gpu_plot
from benchmarks import gpu_numbers as numbers
from benchmarks.gpu_process import Ended
from benchmarks.machine import card, describe
from tests.jobs import ROOT
from tests.tiny import tokenizer

SMALL = numbers.Size(
    layers=1,
    hidden=2,
    intermediate=3,
    heads=1,
    kv_heads=1,
    vocabulary=5,
    positions=64,
    mean=60,
    longest=200,
)
OUTSIDE = ROOT / "benchmarks/gpu_sides/outside"
H100 = "NVIDIA H100 80GB HBM3, 580.159.04, 81559 MiB"


def side(tokens_per_second, losses=(), **more):
    return {
        "tokens_per_second": tokens_per_second,
        "gpu_busy_share": 0.5,
        "model_flops_utilisation": 0.125,
        "memory_peak_bytes": 3 << 30,
        "first_step_seconds": {"cold": 70.2, "warm": 31.7},
        "losses": list(losses),
        **more,
    }


def result(**more):
    """Of a run in which the job was four times as fast as the tutorial."""
    speed = {
        "job": side(20_000.0, [4.0, 2.0]),
        "tutorial": side(5_000.0, [4.0, 2.02]),
        "plain": side(2_500.0, [4.004, 2.0]),
    }
    fast = {name: one["tokens_per_second"] for name, one in speed.items()}
    losses = {name: one["losses"] for name, one in speed.items()}
    return {
        "size": "1b",
        "card": H100,
        "date": "2026-11-22",
        "versions": {"torch": "2.11.0", "unsloth": "2026.10.9"},
        "speed": speed,
        "ratios": numbers.ratios(fast),
        "agreement": numbers.agreement(losses),
        **more,
    }


def test_rows_have_the_lengths_that_were_drawn():
    """What the job and a stock tokenizer make of a row has exactly as many tokens as were asked for."""
    counts = numbers.lengths(numbers.SIZES["1b"], 40, seed=0)
    fast = tokenizer()
    made = numbers.rows([*counts, 29, 2048], seed=0)
    rendered = [fast.apply_chat_template(row["messages"], tokenize=True, return_dict=True) for row in made]
    assert [len(one["input_ids"]) for one in rendered] == [*counts, 29, 2048]
    assert {len(row["messages"]) for row in made} == {2, 4}
    assert made == numbers.rows([*counts, 29, 2048], seed=0)


def test_lengths_are_log_normal():
    """The mean is the one asked for, half of the rows are shorter than exp(-s^2/2) of it, and a few are cut."""
    counts = numbers.lengths(numbers.SIZES["1b"], 4000, seed=1)
    assert abs(sum(counts) / len(counts) - 500) < 15
    assert abs(sorted(counts)[2000] - 500 * 0.7827) < 15
    assert max(counts) == 2048
    assert 0.003 < counts.count(2048) / len(counts) < 0.02
    assert min(counts) >= 50


def test_order_is_the_trainers():
    """The same as accelerate's sampler in its first epoch."""
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(range(24), data_seed=numbers.SEED)
    assert numbers.order(24) == list(sampler)
    steps = numbers.by_step(range(24), batch=8)
    assert [row for step in steps for row in step] == numbers.order(24)
    assert [len(step) for step in steps] == [8, 8, 8]


def test_steady_speed_counts_from_the_end_of_a_step_to_the_end_of_another():
    """4 s between the ends of the 2nd and the 5th step, in which 20 + 30 + 40 tokens were learned."""
    found = numbers.steady([10, 12, 13, 15, 16], [900, 10, 20, 30, 40], skip=2, count=3)
    assert (found.seconds, found.tokens, found.tokens_per_second, found.median_step_seconds) == (4, 90, 22.5, 1)
    assert (found.began, found.ended) == (12, 16)
    with pytest.raises(ValueError, match="4 steps are too few for 3 after 2"):
        numbers.steady([10, 12, 13, 15], [1, 1, 1, 1], skip=2, count=3)


def test_flops_by_hand():
    """Four matrices of 4 and three of 6, a head of 10; rank 1: four adapters of 4 and three of 5."""
    assert (SMALL.frozen(), SMALL.adapter(1)) == (44, 31)
    attention = 6 * 1 * 2 * (3 * 3 + 1 * 1)
    assert numbers.flops(SMALL, [3, 1], rank=1) == 4 * (4 * 44 + 6 * 31) + attention == 1568
    operations = numbers.flops(SMALL, [3, 1])
    assert numbers.utilisation(SMALL, [3, 1], operations / 989.4e12 * 4, H100) == 0.25
    assert numbers.utilisation(SMALL, [3, 1], 1.0, "a card of tomorrow") is None


def test_sizes_are_llamas():
    """Parameters of the checkpoint that is written, counted by transformers: 1.5 G, as gpu_run.py's, and Llama 3's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    inputs = _module(ROOT / "benchmarks/gpu_sides/inputs.py")
    totals = {"1b": 1_498_482_688, "8b": 8_030_261_248}
    for name, total in totals.items():
        size = numbers.SIZES[name]
        with torch.device("meta"):
            wanted = LlamaForCausalLM(LlamaConfig(**size.config())).state_dict()
        written = {key: shape for part in inputs.parts(size) for key, shape in part.items()}
        assert written == {key: tuple(tensor.shape) for key, tensor in wanted.items()}
        assert sum(tensor.numel() for tensor in wanted.values()) == total


def test_busy_is_the_mean_of_the_samples_inside():
    assert numbers.busy([(0, 1.0), (1, 0.2), (2, 0.4), (3, 1.0)], 0.5, 2.5) == 0.3
    assert numbers.busy([(0, 1.0)], 1, 2) is None


def test_agreement_is_relative_to_the_job():
    """2.02 beside 2.0 is 1 % off; steps that only one side has are left out."""
    off = numbers.agreement({"job": [4.0, 2.0], "tutorial": [4.0, 2.02, 1.0], "plain": []})
    assert off == {"tutorial": {"steps": 2, "first": 0, "largest": pytest.approx(0.01), "mean": pytest.approx(0.005)}}


def test_problems_names_what_misses_its_target():
    """Nothing is wrong with four times the tutorial's speed; with less than three times it is, and so on."""
    assert numbers.problems(result()) == []
    assert numbers.problems(result(ratios={"tutorial": 2.9, "collator-free": 2.0})) == [
        "the job is 2.90 times as fast as tutorial, less than 3"
    ]
    assert numbers.problems(result(size="8b", ratios={"tutorial": 2.9, "collator-free": 1.4})) == [
        "the job is 1.40 times as fast as collator-free, less than 1.5"
    ]
    apart = numbers.agreement({"job": [4.0, 2.0], "plain": [4.01, 2.0]})
    (said,) = numbers.problems(result(agreement=apart))
    assert said.startswith("losses of plain and the job differ by 0.25% at the first step")
    slow = {"job": {"seconds": 101.0}, "tutorial": {"seconds": 300.0}}
    (said,) = numbers.problems(result(adapter=slow))
    assert said == "the job needs 101 s to an adapter, more than a third of the tutorial's 300 s"
    assert numbers.problems(result(failures=["tutorial ended with 1"])) == ["tutorial ended with 1"]
    (said,) = numbers.problems(result(speed={"job": {"first_step_seconds": {"cold": 40.0, "warm": 24.0}}}))
    assert said == "the job's second start takes 24 s to its first step, more than half of 40 s"
    (said,) = numbers.problems(
        result(tight={"job": {"largest_micro_batch": 4}, "tutorial": {"largest_micro_batch": 8}})
    )
    assert said == "the job's largest micro-batch is 4, the tutorial's 8"


def test_the_table_shows_every_side_and_what_it_was_measured_on():
    text = gpu_plot.markdown(
        result(
            adapter={
                "job": {"seconds": 90.0, "rows": 1000, "epochs": 3, "caches": "cold"},
                "tutorial": {"seconds": 300.0},
            },
            tight={
                "job": {
                    "largest_micro_batch": 8,
                    "limit_gib": 16,
                    "row_tokens": 2048,
                    "by_itself": {"largest_micro_batch": 2},
                },
                "tutorial": {"largest_micro_batch": 4},
            },
        )
    )
    assert "1B on NVIDIA H100 80GB HBM3, 580.159.04, 81559 MiB (torch 2.11.0, Unsloth 2026.10.9; 2026-11-22)" in text
    assert "| Unsloth's tutorial | 5,000 | 4.00 x | 50% | 12.5% | 3.0 | 70 / 32 |" in text
    assert "| finetune-job | 20,000 |  | 50% | 12.5% | 3.0 | 70 / 32 |" in text
    assert "1,000 rows x 3 epochs from process start to adapter (cold caches): 90 s, the tutorial 300 s." in text
    said = "Largest micro-batch of 2,048-token rows in 16 GiB: finetune-job 8, Unsloth's tutorial 4"
    assert f"{said}; finetune-job takes 2 by itself." in text
    assert "at most by: Unsloth's tutorial 0.000% / 1.00%, TRL + PEFT + bitsandbytes 0.100% / 0.10%." in text


def test_charts_are_drawn_to_scale(tmp_path):
    """A bar four times as long for four times the speed; a curve with a point for each step."""
    text = gpu_plot.draw([result()], tmp_path)
    assert "(../docs/gpu-speed.svg)" in text
    assert "(../docs/gpu-losses-1b.svg)" in text
    space = "{http://www.w3.org/2000/svg}"
    bars = ET.parse(tmp_path / "gpu-speed.svg").getroot().iter(f"{space}rect")
    widths = {bar.get("class"): float(bar.get("width")) for bar in bars}
    assert widths["job"] == pytest.approx(4 * widths["tutorial"], abs=0.5)
    assert widths["job"] == pytest.approx(8 * widths["plain"], abs=0.5)
    curves = list(ET.parse(tmp_path / "gpu-losses-1b.svg").getroot().iter(f"{space}polyline"))
    assert {curve.get("class"): len(curve.get("points").split()) for curve in curves} == {
        "plain": 2,
        "tutorial": 2,
        "job": 2,
    }


def test_kernels_that_overlap_are_counted_once():
    """[0, 3] and [2, 5] and, inside it, [3, 4]: five; [7, 8]: one more."""
    assert _module(OUTSIDE / "sitecustomize.py").covered([(0, 3), (2, 5), (3, 4), (7, 8)]) == 6


TRAINERS = """
class TrainerCallback: ...
class CallbackHandler:
    def __init__(self, callbacks, model):
        self.callbacks = list(callbacks)
    def add_callback(self, callback):
        self.callbacks.append(callback)
"""


@pytest.mark.process
def test_a_process_is_changed_from_outside(tmp_path):
    """The fraction waits for the card's first use, less memory is reported, and trainers get a callback more.

    A card and transformers' trainer, which takes ten seconds to import, are stood in for.
    """
    code = """
import torch
from transformers.trainer_callback import CallbackHandler
queued = [call.__name__ for call, _ in torch.cuda._queued_calls]
torch.cuda.memory_reserved = lambda device=None: 3 << 30
torch.cuda.cudart = lambda: type("Runtime", (), {"cudaMemGetInfo": lambda self, device: (70 << 30, 80 << 30)})()
torch.cuda.current_device = lambda: 0
added = CallbackHandler([], None).callbacks
print(queued.count("set_fraction"), torch.cuda.mem_get_info(0), [type(one).__name__ for one in added])
"""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers/__init__.py").touch()
    (tmp_path / "transformers/trainer_callback.py").write_text(TRAINERS)
    environment = {**os.environ, "PYTHONPATH": f"{OUTSIDE}{os.pathsep}{tmp_path}", "BENCH_GPU_LIMIT_GIB": "16"}
    environment["BENCH_GPU_PROFILE"] = f"{tmp_path / 'kernels'}:26:27"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"1 ({13 << 30}, {16 << 30}) ['Kernels']"


def test_what_a_process_left_is_read(tmp_path):
    """The job's log and a script's side.json give the same: ends of steps, losses, tokens, the settings said last."""
    stamps = ["2026-11-22T10:00:10.500000Z", "2026-11-22T10:00:12.000000Z"]
    lines = [
        {"event": "model_loaded", "plan": {"micro_batch": 8, "accumulation": 1}},
        {
            "event": "train_progress",
            "timestamp": stamps[0],
            "loss": 4.0,
            "step_seconds": 2.0,
            "tokens_per_second": 50.0,
        },
        {"event": "memory_short", "micro_batch": 4},
        {
            "event": "train_progress",
            "timestamp": stamps[1],
            "loss": 3.0,
            "step_seconds": 1.0,
            "tokens_per_second": 80.0,
        },
    ]
    log = tmp_path / "log"
    log.write_text("not JSON\n" + "".join(json.dumps({"gpu_memory_peak_bytes": 7, **line}) + "\n" for line in lines))
    began = datetime.datetime(2026, 11, 22, 10, tzinfo=datetime.UTC).timestamp()
    job = Ended(code=0, began=began, seconds=20.0, log=log)
    said = {"step_ends": [began + 10.5, began + 12], "losses": [4.0, 3.0], "memory_peak_bytes": 7}
    said |= {"pass_tokens": [60, 40, 70, 65], "accumulation": 2, "micro_batch": 4}
    script = Ended(code=0, began=began, seconds=20.0, log=log, said=said)
    for ended in (job, script):
        assert ended.first_step_seconds() == 10.5
        assert [end - began for end in ended.step_ends()] == [10.5, 12]
        assert (ended.losses(), ended.memory_peak()) == ([4.0, 3.0], 7)
        assert ended.settings()["micro_batch"] == 4
    assert script.was_fed([100, 135])
    assert not script.was_fed([135, 100])
    assert job.was_fed([104, 135, 60])  # 80 tokens/s over 3 s are 240: those of two steps, rounded
    assert not job.was_fed([100, 130, 60])


def test_parts_and_sides_are_chosen_by_name():
    assert gpu.chosen("tight,speed", gpu.PARTS) == ["speed", "tight"]
    with pytest.raises(SystemExit, match="fast: not one of"):
        gpu.chosen("fast", gpu.PARTS)


@pytest.mark.process
def test_the_machine_is_described():
    """Beside every figure: versions, also that a package is missing."""
    found = describe(["pytest", "no-such-package"])
    assert found["versions"] == {"pytest": pytest.__version__, "no-such-package": None}
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert card()


def _module(path):
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.meta_path)
    spec.loader.exec_module(module)
    sys.meta_path[:] = before
    return module
