"""The weighted loss and its gradients, once by the trainer and once by hand, on whatever device is there.

`python -m tests.by_hand <model> <rows> [--micro 4 2 1] [...]` trains one step on all rows for each way to split it, and
prints one line of JSON for each: losses, and how far the gradients are from those by hand. By hand is: each row alone,
unpadded, all logits, torch's cross-entropy in fp32, a sum of products, one division at the end. As a control: how far
the gradients by hand are from those with all weights 1.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from job.config.schema import Config
from job.data.prepare import read, render
from job.data.rendering.labels import IGNORED
from job.inputs import pull
from job.model import base_model
from job.runtime import libraries

RATE = 1e-9  # the step must not change what the next one starts from


def main(asked: argparse.Namespace, scratch: Path) -> None:
    """Load once, then train a step for each micro-batch."""
    gpu = asked.device == "cuda"
    libraries.prepare(libraries.LibrarySettings(scratch=scratch, expect_gpu=gpu, cpu_only=not gpu))
    from job.tuning.finetune import Finetune

    with asked.rows.open() as file:
        rows = sum(1 for _ in file)
    loaded = None
    for number, weights in enumerate(asked.weights):
        config = _config(asked, rows, scratch, weights)
        puller = pull.Puller.of(pull.Sources.of(config), scratch=scratch, pinned=None)
        pulled = puller.rest(puller.model(config.model), date=None)
        data = render(config, pulled, read(config, pulled), directory=scratch / f"data-{number}")
        if loaded is None:
            base = base_model.inspect(pulled.model, name=config.model)
            loaded = Finetune.load(base, config, data, directory=scratch)
            _stir(loaded.model)
        tuned = replace(loaded, config=config, dataset=data.train.dataset)
        by_hand = _by_hand(tuned)
        for micro in asked.micro:
            split = replace(tuned.plan.pass_config, micro_batch=micro, tokens_in_pass=None)
            planned = tuned.plan.with_pass(split)
            found = _by_trainer(replace(tuned, planned=planned), scratch / f"trainer-{number}-{micro}")
            print(json.dumps({"weights": weights, "micro_batch": micro, **_compare(by_hand, found)}))  # noqa: T201


def _config(asked, rows: int, scratch: Path, weights: str) -> Config:
    return Config(
        model=str(asked.model),
        dataset=(str(asked.rows),),
        output=str(scratch / "out"),
        device=asked.device,
        eval_fraction=0.0,
        role_weights=tuple(weights.split(",")),
        precision=asked.precision,
        batch_size=rows,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=RATE,
        samples=0,
    )


def _trainable(model) -> dict:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _stir(model) -> None:
    """A fresh adapter's second half is zero, and so are the gradients of its first."""
    import torch

    torch.manual_seed(1)
    for name, value in _trainable(model).items():
        if "lora_B" in name:
            value.data = torch.randn(value.shape, dtype=torch.float32).mul(0.02).to(value.device, value.dtype)


def _by_hand(tuned) -> dict:
    weights = [
        row.get("weights") or [float(label != IGNORED) for label in row["labels"]] for row in map(dict, tuned.dataset)
    ]
    ones = [[float(weight > 0) for weight in row] for row in weights]
    loss, gradients = _weighted(tuned, weights)
    return {"loss": loss, "gradients": gradients, "control": _off(gradients, _weighted(tuned, ones)[1])}


def _weighted(tuned, weights: list[list[float]]) -> tuple[float, dict]:
    import torch
    from torch.nn.functional import cross_entropy

    model, kind = tuned.model, tuned.device.kind
    model.train()
    total, loss = sum(map(sum, weights)), 0.0
    for row, own in zip(tuned.dataset, weights, strict=True):
        ids = torch.tensor([row["input_ids"]], device=kind)
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=tuned.device.dtype is torch.bfloat16):
            logits = model(input_ids=ids).logits
        each = cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")
        share = (each * torch.tensor(own, device=kind)[1:]).sum() / total
        share.backward()
        loss += float(share.detach())
    gradients = {name: value.grad.float().clone() for name, value in _trainable(model).items()}
    model.zero_grad()
    return loss, gradients


def _by_trainer(tuned, directory: Path) -> dict:
    from transformers import TrainerCallback

    from job.tuning.trainer.build import build, train

    found = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            found["gradients"] = {
                n.removeprefix("_orig_mod."): v.grad.float().clone() for n, v in _trainable(model).items()
            }

        def on_log(self, args, state, control, logs=None, **_):
            found.update({"loss": logs["loss"]} if "loss" in logs else {})

    trainer = build(
        tuned.model,
        tuned.dataset,
        tuned.tokenizer.hf,
        config=tuned.config,
        plan=tuned.plan,
        device=tuned.device,
        directory=directory,
    )
    batch = trainer.data_collator(
        [dict(tuned.dataset[row]) for row in range(min(2, tuned.plan.pass_config.micro_batch))]
    )
    found["weighted"] = "weights" in batch
    found["padding_free"] = trainer.data_collator.padding_free
    found["batch_shape"] = list(batch["input_ids"].shape)
    train(trainer, [Look()])
    return found


def _off(one: dict, other: dict) -> float:
    """The relative distance of two gradients."""
    assert one.keys() == other.keys()
    off = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (off / sum(float(value.square().sum()) for value in one.values())) ** 0.5


def _compare(by_hand: dict, found: dict) -> dict:
    return {
        "loss_by_hand": by_hand["loss"],
        "loss": found["loss"],
        "loss_off": abs(found["loss"] - by_hand["loss"]) / by_hand["loss"],
        "gradients_off": _off(by_hand["gradients"], found["gradients"]),
        "gradients_off_without_weights": by_hand["control"],
        "weighted": found["weighted"],
        "padding_free": found["padding_free"],
        "batch_shape": found["batch_shape"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--micro", type=int, nargs="+", default=[4, 2, 1])
    parser.add_argument("--weights", nargs="+", default=["assistant=1,tool=0.2,user=0.1"])
    parser.add_argument("--precision", default="16bit")
    parser.add_argument("--device", default="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        main(parser.parse_args(), Path(scratch))
