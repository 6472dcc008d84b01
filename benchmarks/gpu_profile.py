"""What a training step costs on this machine's GPU, and what pays: kernels against launches, variant by variant.

Builds the job's own trainer (`job.tuning`) on a Llama shape with random weights and trains a few steps of the same
batches in each variant:

    eager      every kernel launched from Python: 4-bit base, one micro-batch of 8 sequences, no checkpointing
    dense      the same with the base weights dequantised once, instead of at each use
    unsloth    the same as eager with Unsloth's checkpointing
    graphs     the decoder replayed from CUDA graphs
    auto       what the plan chooses
    tight      graphs, with a limit set during the run on the process's share of the card

A variant named twice must end with the same adapter, bit for bit. Steps are timed between synchronised ends; one more
runs under torch's profiler for the kernels' own time.

    python benchmarks/gpu_profile.py <output directory> [--size 1b|8b|tiny] [--variants eager,graphs,graphs]
"""

import argparse
import contextlib
import cProfile
import hashlib
import json
import os
import pstats
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

START = time.monotonic()
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
WARM_UP = 6
LONGEST = 2048


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", choices=SHAPES, default="1b")
    parser.add_argument("--variants", default="eager,unsloth,graphs,graphs,auto,tight,dense")
    parser.add_argument("--profile-import", action="store_true")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--rows", type=int, default=8)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        measure(asked, Path(scratch))
    return 0


def measure(asked: argparse.Namespace, scratch: Path) -> None:
    from job.config import environment
    from job.runtime import gpus, libraries

    cpu = asked.size == "tiny" and not gpus.present()
    libraries.prepare(libraries.LibrarySettings(scratch=scratch, expect_gpu=not cpu, cpu_only=cpu))
    times = {}
    profiler = cProfile.Profile()
    with timed(times, "import"):
        if asked.profile_import:
            profiler.enable()
        from job.tuning import finetune  # noqa: F401

        profiler.disable()
    if asked.profile_import:
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(70)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    with timed(times, "make model"):
        make_model(scratch / "model", SHAPES[asked.size], cpu=cpu)
    os.environ.update(
        TUNE_MODEL=str(scratch / "model"),
        TUNE_DATASET="/none.jsonl",
        TUNE_OUTPUT=str(scratch / "out"),
        TUNE_MICRO_BATCH=str(asked.rows),
        TUNE_BATCH_SIZE=str(asked.rows),
        TUNE_GRADIENT_CHECKPOINTING="off",
        TUNE_MAX_STEPS=str(asked.steps),
        TUNE_LEARNING_RATE="1e-4",
        TUNE_WARMUP="0",
        TUNE_MAX_LENGTH=str(LONGEST),
        TUNE_DEVICE="cpu" if cpu else "cuda",
    )
    config = environment.load()
    from job.model import base_model
    from job.tuning import model as models
    from job.tuning.device import choose

    device = choose(requested=config.device)
    base = base_model.inspect(scratch / "model", name="random")
    with timed(times, "load"):
        loaded = models.load(base, config, device, directory=base.path)
    print(json.dumps(times), flush=True)
    start = {name: p.detach().clone() for name, p in loaded.model.named_parameters() if p.requires_grad}
    results: dict[str, Any] = {"size": asked.size, "times": times, "variants": {}}
    for number, variant in enumerate(asked.variants.split(",")):
        if variant == "dense":
            dequantise(loaded.model)
        for name, parameter in loaded.model.named_parameters():
            if name in start:
                parameter.data.copy_(start[name])
        try:
            row = train(asked, config, base, loaded, device, scratch, variant)
        except Exception as error:  # noqa: BLE001 - the next variant may do
            traceback.print_exc()
            row = {"failed": f"{type(error).__name__}: {error}"[:500]}
        results["variants"][f"{number} {variant}"] = row
        print(variant, json.dumps({k: v for k, v in row.items() if not isinstance(v, list)}), flush=True)
        for line in row.get("kernels", []):
            print("   ", line, flush=True)
        (asked.output / f"gpu-profile-{asked.size}.json").write_text(json.dumps(results, indent=1) + "\n")


@contextlib.contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    times[name] = round(time.monotonic() - began, 2)


def make_model(path: Path, shape: dict[str, int], *, cpu: bool) -> None:
    """Random weights, made where they are quickest made."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import tokenizer

    fast = tokenizer()
    vocabulary = len(fast) if shape["hidden_size"] == 64 else 128_256
    config = LlamaConfig(
        **shape,
        num_key_value_heads=shape["num_attention_heads"] // 4,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=shape["hidden_size"] == 2048,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cpu" if cpu else "cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(path, max_shard_size="4GB")
    fast.save_pretrained(path)
    del model
    if not cpu:
        torch.cuda.empty_cache()


def dequantise(model: Any) -> None:
    """Put plain bf16 weights, as NF4 has rounded them, in the place of the 4-bit ones."""
    import bitsandbytes as bnb
    import torch

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(child.weight.data, child.weight.quant_state)
                plain = torch.nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                plain.weight = torch.nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
                setattr(module, name, plain)


def rows(count: int, vocabulary: int) -> Any:
    """Log-normal lengths, mean about 520, at most 2048; the first quarter is not learned."""
    import datasets

    generator = random.Random(0)
    made: dict[str, list] = {"input_ids": [], "labels": [], "length": []}
    for _ in range(count):
        length = max(16, min(int(generator.lognormvariate(6.0, 0.7)), LONGEST))
        ids = [generator.randrange(vocabulary) for _ in range(length)]
        made["input_ids"].append(ids)
        made["labels"].append([-100] * (length // 4) + ids[length // 4 :])
        made["length"].append(length)
    return datasets.Dataset.from_dict(made)


def train(asked: Any, config: Any, base: Any, loaded: Any, device: Any, scratch: Path, variant: str) -> dict[str, Any]:
    """Train one variant from the loaded adapter, and say what came of it."""
    import torch

    gpu = device.kind == "cuda"
    dataset = rows(asked.rows * asked.steps, loaded.model.get_base_model().config.vocab_size)
    trainer, search = trainer_of(config, base, loaded, device, dataset, scratch / "trainer")
    fixed = None if variant == "auto" else pass_config(asked.rows, dataset["length"][:], variant, gpu=gpu)
    tight_at = WARM_UP if gpu and variant == "tight" else None
    watched = watch(trainer, lambda: search.choose(reused=fixed), asked.steps, tight_at)
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        trainer.train()
    finally:
        if gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)
    seconds = [after - before for before, after in pairwise(watched.ends)]
    steady = slice(WARM_UP, asked.steps - 2)
    found = {
        "step_seconds": seconds,
        "tokens": watched.tokens,
        "losses": watched.losses,
        "grad_norms": watched.norms,
        "median_step": round(statistics.median(seconds[steady]), 4),
        "least_step": round(min(seconds[steady]), 4),
        "tokens_per_second": round(sum(watched.tokens[steady]) / sum(seconds[steady])),
        "first_step": round(seconds[0], 2),
        "peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if gpu else 0,
        "recorded": trainer.passes.recorded_lengths,
        "settle_seconds": watched.planning["seconds"],
        "plan": trainer.passes.plan.as_json(),
        "adapter": adapter_hash(loaded.model),
    }
    trainer.passes.remove_graphs()
    return found | (kernels(watched.profiler) if gpu else {})


def trainer_of(config: Any, base: Any, loaded: Any, device: Any, dataset: Any, directory: Path) -> tuple[Any, Any]:
    """The job's own trainer, and its search for what fits."""
    from job.model import shape
    from job.tuning.fit.candidates import Workload
    from job.tuning.fit.plan import make_plan
    from job.tuning.fit.search import PassSearch
    from job.tuning.trainer.build import build
    from tests.tiny import tokenizer

    lengths = dataset["length"][:]
    plan = make_plan(config, device, lengths=lengths, learning_rate=1e-4)
    trainer = build(loaded.model, dataset, tokenizer(), config=config, plan=plan, device=device, directory=directory)
    workload = Workload(lengths=lengths, shape=shape.of(base), state_bytes=2 * loaded.trainable_parameters)
    search = PassSearch(trainer=trainer, collate=trainer.data_collator, config=config, device=device, workload=workload)
    return trainer, search


def pass_config(micro_batch: int, lengths: list[int], variant: str, *, gpu: bool) -> Any:
    """The variant's pass configuration."""
    from job.tuning.fit.micro_batches import tokens_of_longest
    from job.tuning.fit.plan import PassConfig

    return PassConfig(
        micro_batch=micro_batch,
        tokens_in_pass=tokens_of_longest(lengths, micro_batch) if gpu else None,
        gradient_checkpointing="unsloth" if variant == "unsloth" else "off",
        cuda_graphs=gpu and variant in {"graphs", "tight"},
    )


def watch(trainer: Any, choose: Callable[[], None], steps: int, tight_at: int | None) -> SimpleNamespace:
    """Callbacks that put the pass configuration in force, time steps, and keep losses."""
    import torch
    from transformers import TrainerCallback

    from job.tuning.callbacks.planning import Planning

    gpu = torch.cuda.is_available()
    inner = trainer.data_collator
    both = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    kept = SimpleNamespace(
        ends=[time.perf_counter()],
        losses=[],
        norms=[],
        tokens=[],
        planning={},
        profiler=torch.profiler.profile(activities=both),
    )

    def count(batch: Any) -> Any:
        kept.tokens.append(sum(len(row["input_ids"]) for row in batch))
        return inner(batch)

    def plan() -> None:
        with timed(kept.planning, "seconds"):
            choose()
        kept.tokens.clear()

    class Watch(TrainerCallback):
        def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if gpu and state.global_step == steps - 2:
                kept.profiler.start()

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            {tight_at: tighten, steps - 1: kept.profiler.stop if gpu else int}.get(state.global_step, int)()
            kept.ends.append(time.perf_counter())

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                kept.losses.append(logs["loss"])
                kept.norms.append(logs["grad_norm"])

    trainer.data_collator = count
    trainer.add_callback(Planning(plan, SimpleNamespace(ready=lambda: None)))
    trainer.add_callback(Watch())
    return kept


def tighten() -> None:
    """Leave the process little more of the card than it holds."""
    import torch

    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (700 << 20)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)


def kernels(profiler: Any) -> dict[str, Any]:
    """Of one profiled step: the kernels' own time, how many there were, which took longest, and what waited."""
    by_name: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for event in profiler.events():
        if event.device_type.name == "CUDA":
            by_name.setdefault(event.name, []).append(event.device_time_total)
        elif "ynchronize" in event.name or event.name.startswith("cudaMemcpy"):
            counts[event.name] = counts.get(event.name, 0) + 1
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:22]
    return {
        "kernel_seconds": round(sum(map(sum, by_name.values())) / 1e6, 4),
        "kernel_count": sum(map(len, by_name.values())),
        "kernels": [f"{sum(v) / 1e3:9.2f} ms {len(v):6d} x {name[:90]}" for name, v in top],
        "syncs": counts,
    }


def adapter_hash(model: Any) -> str:
    """SHA-256 of the trained weights."""
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
