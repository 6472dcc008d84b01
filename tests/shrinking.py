"""Training under an artificial limit on the rows of a micro-batch, on whatever device is there.

`python -m tests.shrinking <model> <rows> <limit> [<limit> ...]` trains a few steps for each limit and prints one line
of JSON for each: losses, the plan in force at the end, events, and why it ended, if it did. From step 2 on, a
micro-batch of more rows than the limit runs out of memory in the middle of its backward pass. A negative limit means
no limit.
"""

import argparse
import json
import tempfile
from pathlib import Path

import structlog

from job.config.schema import Config
from job.data.prepare import read, render
from job.inputs import pull
from job.model import base_model
from job.runtime import libraries
from job.runtime.errors import PermanentError
from job.tuning.hooks import Hooks

STEPS = 4


def main(asked: argparse.Namespace, scratch: Path) -> None:
    """Load once, then train for each limit from the same adapter."""
    libraries.prepare(libraries.LibrarySettings(scratch=scratch, expect_gpu=False, cpu_only=True))
    import torch

    from job.tuning.finetune import Finetune

    config = Config(
        model=str(asked.model),
        dataset=(str(asked.rows),),
        output=str(scratch / "out"),
        device="cpu",
        eval_fraction=0.0,
        batch_size=8,
        max_steps=STEPS,
        learning_rate=1e-2,
        lora_r=4,
        samples=0,
    )
    puller = pull.Puller.of(pull.Sources.of(config), scratch=scratch, pinned=None)
    pulled = puller.rest(puller.model(config.model), date=None)
    data = render(config, pulled, read(config, pulled), directory=scratch / "data")
    base = base_model.inspect(pulled.model, name=config.model)
    for limit in asked.limits:
        tuned = Finetune.load(base, config, data, directory=scratch / str(limit))
        print(json.dumps({"limit": limit, **trained(tuned, limit, torch)}), flush=True)  # noqa: T201


def trained(tuned, limit: int, torch) -> dict:
    """Train, and report how it went."""
    notes = []
    hooks = Hooks(
        note=notes.append,
        ready=lambda: None,
        first_step=lambda: None,
        evaluate=lambda _step: None,
        evaluated=lambda _step: True,
        evaluate_every=STEPS + 1,
        save=lambda *_: None,
        save_every=STEPS + 1,
        save_minutes=60,
        worth_saving=lambda _seconds: False,
        poll=lambda: None,
    )

    def grudging(_module, _arguments, output):
        hidden = output[0] if isinstance(output, tuple) else output

        def full(gradient):
            if 0 <= limit < len(hidden) and notes:
                kind = torch.OutOfMemoryError if limit == 1 else RuntimeError  # that of torch, and that of CUDA itself
                raise kind(f"CUDA error: out of memory: artificial limit of {limit} rows")
            return gradient

        hidden.register_hook(full)

    layer = tuned.model.get_base_model().model.layers[0].register_forward_hook(grudging)
    ended = ""
    with structlog.testing.capture_logs() as logs:
        try:
            tuned.train(hooks, resume_from=None)
        except PermanentError as error:
            ended = f"{error.exit_code}: {error.message}"
    layer.remove()
    return {
        "losses": [note["loss"] for note in notes],
        "micro_batch": tuned.plan.pass_config.micro_batch,
        "reasons": tuned.plan.reasons,
        "out_of_memory": [line for line in logs if line["event"] == "out_of_memory"],
        "unequal": [line for line in logs if line["event"] == "resume_not_bitwise"],
        "ended": ended,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("limits", type=int, nargs="+")
    with tempfile.TemporaryDirectory() as directory:
        main(parser.parse_args(), Path(directory))
