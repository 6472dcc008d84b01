"""What all sides read: a random Llama checkpoint, rows of conversations, and their tokens and labels by the job.

    python benchmarks/gpu_sides/inputs.py <directory> --size 1b --device cuda --set speed=200:lognormal:0 ...

A set `<name>=<rows>:<lognormal or longest>:<seed>` becomes `<name>.jsonl` and, as a dataset with input_ids and labels,
`<name>.tokens/`. The weights are drawn and rounded on the device and written by several threads: a CPU would take
minutes for 8B.
"""

import argparse
import datetime
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_numbers import SEED, SIZES, Size, lengths, rows  # noqa: E402

SHARD_LAYERS = 4
WRITERS = 4
STD = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", type=Path, help="where the checkpoint goes; default: <directory>/model")
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--set", action="append", default=[])
    asked = parser.parse_args()
    size = SIZES[asked.size]
    model = asked.model or asked.directory / "model"
    write_model(model, size, asked.device)
    for one in asked.set:
        name, _, description = one.partition("=")
        count, kind, seed = description.split(":")
        write_rows(asked.directory, name, counts(size, int(count), kind, int(seed)), int(seed))
        write_tokens(asked.directory, name, size, model)


def counts(size: Size, count: int, kind: str, seed: int) -> list[int]:
    return [size.longest] * count if kind == "longest" else lengths(size, count, seed=seed)


def write_rows(directory: Path, name: str, tokens: list[int], seed: int) -> None:
    lines = [json.dumps(row) + "\n" for row in rows(tokens, seed=seed)]
    (directory / f"{name}.jsonl").write_text("".join(lines))


def write_tokens(directory: Path, name: str, size: Size, model: Path) -> None:
    """By the job's own reading and rendering, so that the other sides learn exactly what it learns."""
    from job.data.reading.dataset import ExampleStream, Source  # noqa: PLC0415
    from job.data.rendering.renderer import Renderer  # noqa: PLC0415
    from job.data.tokenized.arrow import DatasetPlan, write_datasets  # noqa: PLC0415
    from job.data.tokenized.draft import Draft  # noqa: PLC0415
    from job.data.tokenizer.load import load_tokenizer  # noqa: PLC0415

    path = directory / f"{name}.jsonl"
    tokenizer = load_tokenizer(model, date=datetime.datetime.now(datetime.UTC).date())
    renderer = Renderer(tokenizer=tokenizer, max_length=size.longest)
    work = directory / f"{name}.work"
    work.mkdir()
    with Draft(work) as draft:
        draft.add(ExampleStream([Source(name=path.name, path=path)]), renderer)
        draft.check()
        plan = DatasetPlan(name=name, rows=b"\1" * draft.rows, renderer=renderer)
        (made,) = write_datasets(draft, [plan], directory=work, micro_batch=1)
    made.dataset.select_columns(["input_ids", "labels"]).save_to_disk(str(directory / f"{name}.tokens"))


def write_model(directory: Path, size: Size, device: str) -> None:
    import torch  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415
    from transformers import GenerationConfig, LlamaConfig  # noqa: PLC0415

    from tests.tiny import tokenizer  # noqa: PLC0415

    fast = tokenizer()
    fast.model_max_length = size.positions
    fast.save_pretrained(directory)
    ids = {"bos_token_id": fast.bos_token_id, "eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}
    config = LlamaConfig(**size.config(), **ids, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(directory)
    GenerationConfig(**ids).save_pretrained(directory)

    shards = [dict(part) for part in parts(size)]
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]

    def write(number: int) -> int:
        generator = torch.Generator(device).manual_seed(SEED + number)
        tensors = {}
        for name, shape in shards[number].items():
            if len(shape) == 1:
                tensor = torch.ones(shape, dtype=torch.bfloat16)
            else:
                tensor = torch.empty(shape, device=device, dtype=torch.bfloat16)
                tensor = tensor.normal_(0, STD, generator=generator).cpu()
            tensors[name] = tensor
        save_file(tensors, directory / names[number], metadata={"format": "pt"})
        return sum(tensor.nbytes for tensor in tensors.values())

    with ThreadPoolExecutor(WRITERS) as pool:
        total = sum(pool.map(write, range(len(shards))))
    where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def parts(size: Size):  # noqa: ANN201 - name and shape of each tensor, a shard at a time
    yield {"model.embed_tokens.weight": (size.vocabulary, size.hidden)}
    for start in range(0, size.layers, SHARD_LAYERS):
        shard = {}
        for layer in range(start, min(start + SHARD_LAYERS, size.layers)):
            prefix = f"model.layers.{layer}"
            for name, (inputs, outputs) in size.linears().items():
                shard[f"{prefix}.{name}.weight"] = (outputs, inputs)
            for name in ("input_layernorm", "post_attention_layernorm"):
                shard[f"{prefix}.{name}.weight"] = (size.hidden,)
        yield shard
    yield {"model.norm.weight": (size.hidden,), "lm_head.weight": (size.vocabulary, size.hidden)}


if __name__ == "__main__":
    main()
