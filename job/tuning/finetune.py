"""One fine-tuning in memory: the model with its adapter, and the few things that a run does with it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch

from job.config.schema import Config
from job.data.rendering.renderer import Prompt
from job.model import shape
from job.model.base_model import BaseModel
from job.model.memory import STATE_BYTES, STATE_BYTES_OTHERS
from job.runtime import signals
from job.runtime.errors import ConfigError, PermanentError
from job.tuning import checkpoint_files
from job.tuning import model as models
from job.tuning.callbacks.callbacks import Evaluations, Hooks, Hyperparameters, Progress, SavePoints, Settled
from job.tuning.device import MORE_ROOM, Device, choose, memory, out_of_memory
from job.tuning.evaluate import Evaluation, answer, evaluate
from job.tuning.export import export
from job.tuning.fit.plan import Plan, as_trained, asked, plan, taken_over
from job.tuning.fit.search import PassSearch
from job.tuning.trainer import CountingCollator, build, train

log = structlog.get_logger()
check_checkpoint = checkpoint_files.check
ANSWERS_AT_ONCE = 32
EVALUATED_AT_ONCE = 8
SMALLER = "Lower TUNE_MICRO_BATCH or TUNE_MAX_LENGTH, or set TUNE_GRADIENT_CHECKPOINTING=unsloth."
NOT_DETERMINISTIC = "does not have a deterministic implementation"


@contextlib.contextmanager
def explained(remedy: str = MORE_ROOM) -> Iterator[None]:
    """Turns what torch says where the GPU's memory or TUNE_DETERMINISTIC does not suffice into what to change.

    Args:
        remedy: for lack of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise PermanentError(
                f"The GPU ran out of memory: {str(error).splitlines()[0]}",
                remedy=remedy,
            ) from error
        if NOT_DETERMINISTIC not in str(error):
            raise
        raise ConfigError(
            f"TUNE_DETERMINISTIC=true cannot be had with these settings: {str(error).partition(',')[0]}.",
            remedy="Set TUNE_DETERMINISTIC=false, or another TUNE_OPTIMIZER, TUNE_PRECISION or "
            "TUNE_GRADIENT_CHECKPOINTING.",
        ) from error


@dataclass(kw_only=True)
class Finetune:
    """A loaded model and the plan for training it."""

    config: Config
    device: Device
    fitting: PassSearch
    earlier: dict[str, Any]
    """`reproducibility_facts` of the attempt before; empty if there was none."""
    model: Any
    tokenizer: Any
    dataset: Any
    directory: Path
    memory_before: dict[str, Any]
    progress: Progress | None = None

    @classmethod
    def load(
        cls, base: BaseModel, config: Config, data: Any, *, directory: Path, earlier: dict[str, Any] | None = None
    ) -> Finetune:
        """Load the weights, put the adapter on, make the plan; logs `model_loaded`.

        Args:
            data: with `tokenizer` and `train`, as `run.Data` has them.
            directory: scratch of this attempt.
            earlier: `reproducibility_facts` that an earlier attempt of the run recorded.
        """
        started = time.monotonic()
        device = choose(asked=config.device)
        torch.use_deterministic_algorithms(config.deterministic)
        with explained():
            loaded = models.load(base, config, device, directory=base.path)
        lengths = data.train.dataset["length"][:]
        planned = plan(config, device, lengths=lengths, learning_rate=base.learning_rate())
        if config.curriculum == "short_first" and planned.epochs < 1:
            log.warning("curriculum_incomplete", epochs=round(planned.epochs, 3), steps=planned.steps)
        now = memory(device)
        log.info(
            "model_loaded",
            architecture=base.architecture,
            parameters=base.parameters,
            trainable_parameters=loaded.trainable_parameters,
            lora_targets=list(loaded.targets),
            precision=config.precision,
            prequantised=base.prequantised,
            device=device.kind,
            device_name=device.name,
            load_seconds=round(time.monotonic() - started, 3),
            **now,
        )
        fitting = PassSearch(
            plan=planned,
            device=device,
            shape=shape.of(base),
            lengths=lengths,
            state_bytes=loaded.trainable_parameters * STATE_BYTES.get(config.optimizer, STATE_BYTES_OTHERS),
        )
        return cls(
            config=config,
            device=device,
            fitting=fitting,
            earlier=earlier or {},
            model=loaded.model,
            tokenizer=data.tokenizer,
            dataset=data.train.dataset,
            directory=directory,
            memory_before=now,
        )

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self.fitting.plan

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.progress.step if self.progress else 0

    def reproducibility_facts(self) -> dict[str, Any]:
        """What a checkpoint must meet again for the run to go on bit for bit, and what was asked when it was made."""
        return {"plan": self.plan.reproducibility_facts(), "device": self.device.name, "asked": asked(self.config)}

    def hooks(self, **hooks: Any) -> Hooks:
        """The events of the training loop; `Hooks` has the names."""
        return Hooks(save_minutes=self.config.checkpoint_minutes, **hooks)

    def train(self, hooks: Hooks, *, resume_from: tuple[Path, int] | None, changed: bool = False) -> None:
        """All optimizer steps that are left, with progress events, evaluations and checkpoints.

        A signal is served between two steps.

        Args:
            resume_from: a verified checkpoint and its step.
            changed: whether settings of the optimizer may differ from the checkpoint's.

        Raises:
            PermanentError: it diverged, ran out of memory, or ended early.
            StopRequested: a signal came; a checkpoint was saved if there was time.
        """
        directory, done = resume_from or (None, 0)
        if directory is not None and done >= self.plan.steps:
            checkpoint_files.load_adapter(self.model, directory)  # the trainer would train one step too many
            self.fitting.plan = as_trained(self.plan, self.earlier)
            return
        trainer = build(
            self.model,
            self.dataset,
            self.tokenizer.hf,
            config=self.config,
            fitting=self.fitting,
            directory=self.directory / "trainer",
        )
        collator = CountingCollator(trainer.data_collator)
        trainer.data_collator = collator
        self.progress = Progress(
            device=self.device, collator=collator, log_steps=self.config.log_steps, hooks=hooks, step=done
        )
        settled = Settled(self._settle, hooks)
        callbacks = [settled, self.progress, Evaluations(hooks), SavePoints(hooks)]
        if changed:
            callbacks.append(Hyperparameters(self.plan.learning_rate, self.config.weight_decay))
        with explained(SMALLER), signals.deferred():
            train(trainer, callbacks, resume_from=directory)
        self.fitting.forget()
        if trainer.state.global_step != self.plan.steps:
            raise PermanentError(
                f"Training stopped after {trainer.state.global_step} of {self.plan.steps} steps.",
                remedy="Check the log for what the trainer printed.",
            )

    def _settle(self) -> None:
        recorded = taken_over(self.earlier, self.plan, self.config, self.device)
        self.fitting.settle(self.config, recorded=recorded)

    def evaluate(self, dataset: Any) -> Evaluation:
        """The loss on other rows. Memory that runs out while passes are recorded is taken from the recordings."""
        with explained():
            try:
                found = self._loss(dataset)
            except RuntimeError as error:
                if not (out_of_memory(error) and self.fitting.make_room()):
                    raise
                found = None
            found = found or self._loss(dataset)  # only here: the error held on to what had been allocated
        if not math.isfinite(found.loss):
            raise PermanentError(
                f"The loss on the held-out rows is {found.loss}.",
                remedy="Lower TUNE_LEARNING_RATE, or look for broken weights in the base model.",
            )
        return found

    def _loss(self, dataset: Any) -> Evaluation:
        return evaluate(
            self.model,
            dataset,
            batch=EVALUATED_AT_ONCE,
            pad_id=self.tokenizer.hf.pad_token_id or 0,
            device=self.device.kind,
        )

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy answers to prompts."""
        if not prompts:
            return []
        with explained():
            return answer(
                self.model,
                prompts,
                self.tokenizer.hf,
                stop_ids=self.tokenizer.stop_ids,
                batch=ANSWERS_AT_ONCE,
                device=self.device.kind,
            )

    def save_adapter(self, directory: Path, *, base: BaseModel) -> None:
        """Write the adapter and its tokenizer."""
        export.save_adapter(self.model, self.tokenizer.hf, directory, base=base)

    def merge(self, adapter: Path, directory: Path, *, base: BaseModel) -> None:
        """Write base + adapter in 16 bit."""
        export.merge(adapter, directory, base=base, stop_ids=self.tokenizer.stop_ids)

    def memory_report(self) -> dict[str, Any]:
        """Memory before and at the peak of the run, and what share of the card the peak was."""
        now = memory(self.device)
        peak, total = now["gpu_memory_peak_bytes"], now["gpu_memory_total_bytes"]
        before = self.memory_before["gpu_memory_reserved_bytes"]
        return {
            "gpu_memory_before_bytes": before,
            "gpu_memory_peak_bytes": peak,
            "gpu_memory_training_bytes": peak - before,
            "gpu_memory_total_bytes": total,
            "gpu_memory_peak_share": round(peak / total, 4) if total else 0.0,
            "host_memory_before_bytes": self.memory_before["host_memory_rss_bytes"],
            "host_memory_rss_bytes": now["host_memory_rss_bytes"],
            "host_memory_peak_bytes": now["host_memory_peak_bytes"],
        }
