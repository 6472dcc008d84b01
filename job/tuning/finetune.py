"""One fine-tuning in memory: the model with its adapter, and the few things that a run does with it."""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

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
from job.model.schedule import usual_rate
from job.runtime import signals
from job.runtime.errors import ConfigError, PermanentError
from job.tuning import checkpoint_files
from job.tuning import model as models
from job.tuning.callbacks.evaluations import Evaluations
from job.tuning.callbacks.hyperparameters import Hyperparameters
from job.tuning.callbacks.planning import Planning
from job.tuning.callbacks.progress import Progress
from job.tuning.callbacks.save_points import SavePoints
from job.tuning.device import MORE_ROOM, Device, choose, memory, out_of_memory
from job.tuning.evaluate import Evaluation, answer, evaluate
from job.tuning.export import adapter as adapters
from job.tuning.export import merged
from job.tuning.fit.candidates import Workload
from job.tuning.fit.control import PassControl
from job.tuning.fit.plan import Plan, completed_plan, make_plan, requested_pass, reusable_pass
from job.tuning.fit.search import PassSearch
from job.tuning.hooks import Hooks
from job.tuning.trainer.build import build, train
from job.tuning.trainer.collator import CountingCollator

log = structlog.get_logger()
check_checkpoint = checkpoint_files.check
ANSWER_BATCH = 32
EVALUATION_BATCH = 8
SMALLER = "Lower TUNE_MICRO_BATCH or TUNE_MAX_LENGTH, or set TUNE_GRADIENT_CHECKPOINTING=unsloth."
NOT_DETERMINISTIC = "does not have a deterministic implementation"


@contextlib.contextmanager
def explained(remedy: str = MORE_ROOM) -> Iterator[None]:
    """Turns torch's errors about the GPU's memory and about TUNE_DETERMINISTIC into ones that name a remedy.

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
            f"TUNE_DETERMINISTIC=true is not possible with these settings: {str(error).partition(',')[0]}.",
            remedy="Set TUNE_DETERMINISTIC=false, or another TUNE_OPTIMIZER, TUNE_PRECISION or "
            "TUNE_GRADIENT_CHECKPOINTING.",
        ) from error


@dataclass(kw_only=True)
class Finetune:
    """A loaded model and the plan for training it."""

    config: Config
    device: Device
    planned: Plan
    """What was planned when the model was loaded; `plan` is the plan in force."""
    workload: Workload
    earlier: dict[str, Any]
    """`reproducibility_facts` of the attempt before; empty if there was none."""
    model: Any
    tokenizer: Any
    dataset: Any
    directory: Path
    memory_before: dict[str, Any]
    passes: PassControl | None = None
    """The owner of the plan from the moment there is a trainer."""
    progress: Progress | None = None
    planning_seconds: float = 0.0
    """What choosing the pass configuration took, most of it for kernels that the first step would have compiled."""

    @classmethod
    def load(
        cls, base: BaseModel, config: Config, data: Any, *, directory: Path, earlier: dict[str, Any] | None = None
    ) -> Finetune:
        """Load the weights, put the adapter on, make the plan; logs `model_loaded`.

        Args:
            data: with `tokenizer` and `train`: see `job.data.prepare.Data`.
            directory: scratch of this attempt.
            earlier: `reproducibility_facts` that an earlier attempt of the run recorded.
        """
        started = time.monotonic()
        device = choose(requested=config.device)
        torch.use_deterministic_algorithms(config.deterministic)
        with explained():
            loaded = models.load(base, config, device, directory=base.path)
        lengths = data.train.dataset["length"][:]
        planned = make_plan(config, device, lengths=lengths, learning_rate=usual_rate(base.parameters))
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
        state_bytes = loaded.trainable_parameters * STATE_BYTES.get(config.optimizer, STATE_BYTES_OTHERS)
        return cls(
            config=config,
            device=device,
            planned=planned,
            workload=Workload(lengths=lengths, shape=shape.of(base), state_bytes=state_bytes),
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
        return self.passes.plan if self.passes else self.planned

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.progress.step if self.progress else 0

    def reproducibility_facts(self) -> dict[str, Any]:
        """What a checkpoint must meet again for the run to continue bit for bit, and what the settings asked for."""
        return {
            "plan": self.plan.reproducibility_facts(),
            "device": self.device.name,
            "asked": requested_pass(self.config),
        }

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
            self.planned = completed_plan(self.planned, self.earlier)
            return
        trainer = build(
            self.model,
            self.dataset,
            self.tokenizer.hf,
            config=self.config,
            plan=self.planned,
            device=self.device,
            directory=self.directory / "trainer",
        )
        self.passes = trainer.passes
        search = PassSearch(
            trainer=trainer,
            collate=trainer.data_collator,
            config=self.config,
            device=self.device,
            workload=self.workload,
        )
        collator = CountingCollator(trainer.data_collator)
        trainer.data_collator = collator
        self.progress = Progress(
            device=self.device, collator=collator, log_steps=self.config.log_steps, hooks=hooks, step=done
        )
        planning = Planning(lambda: self._choose(search), hooks)
        callbacks = [planning, self.progress, Evaluations(hooks), SavePoints(hooks)]
        if changed:
            callbacks.append(Hyperparameters(self.plan.learning_rate, self.config.weight_decay))
        with explained(SMALLER), signals.deferred():
            train(trainer, callbacks, resume_from=directory)
        self.passes.remove_graphs()
        if trainer.state.global_step != self.plan.steps:
            raise PermanentError(
                f"Training stopped after {trainer.state.global_step} of {self.plan.steps} steps.",
                remedy="Check the log for what the trainer printed.",
            )

    def _choose(self, search: PassSearch) -> None:
        reused = reusable_pass(self.earlier, self.plan, self.config, self.device)
        started = time.monotonic()
        search.choose(reused=reused)
        self.planning_seconds = time.monotonic() - started
        log.info("plan_made", plan=self.plan.as_json(), seconds=round(self.planning_seconds, 3), **memory(self.device))

    def evaluate(self, dataset: Any) -> Evaluation:
        """The loss on other rows. Memory that runs out while there are CUDA graphs is taken from their recordings."""
        with explained():
            try:
                evaluation = self._evaluate(dataset)
            except RuntimeError as error:
                if not (out_of_memory(error) and self.passes and self.passes.free_recordings()):
                    raise
                evaluation = None
            evaluation = evaluation or self._evaluate(dataset)  # only here: the error held on to allocated memory
        if not math.isfinite(evaluation.loss):
            raise PermanentError(
                f"The loss on the held-out rows is {evaluation.loss}.",
                remedy="Lower TUNE_LEARNING_RATE, or look for broken weights in the base model.",
            )
        return evaluation

    def _evaluate(self, dataset: Any) -> Evaluation:
        return evaluate(
            self.model,
            dataset,
            batch=EVALUATION_BATCH,
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
                batch=ANSWER_BATCH,
                device=self.device.kind,
            )

    def save_adapter(self, directory: Path, *, base: BaseModel) -> None:
        """Write the adapter and its tokenizer."""
        adapters.save_adapter(self.model, self.tokenizer, directory, base=base)

    def merge(self, adapter: Path, directory: Path, *, base: BaseModel) -> None:
        """Write base + adapter in 16 bit."""
        merged.merge(adapter, directory, base=base, stop_ids=self.tokenizer.stop_ids)

    def memory_report(self) -> dict[str, Any]:
        """Memory before training and at the peak of the run, and the peak's share of the GPU."""
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
