"""The plan in force while a trainer exists: the one owner of it, and the only way to change how micro-batches run.

Knows the trainer, gradient checkpointing and CUDA graphs. `job.tuning.fit.search` decides what to put in force first;
where memory runs out later, the next smaller pass configuration follows from the one in force.
"""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog
import torch
from unsloth import FastLanguageModel

from job.runtime.errors import PermanentError
from job.tuning.device import MORE_ROOM, Device, memory
from job.tuning.fit.candidates import smaller
from job.tuning.fit.micro_batches import Limit, bucket_length, tokens_of_longest
from job.tuning.fit.plan import PassConfig, Plan

if TYPE_CHECKING:  # it imports what Unsloth has only where there is a GPU
    from job.tuning.fit.cuda_graphs import GraphedDecoder

log = structlog.get_logger()


class PassControl:
    """Owns the plan in force and keeps the trainer as the plan says."""

    def __init__(self, trainer: Any, plan: Plan, *, device: Device, lengths: Sequence[int]) -> None:
        """
        Args:
            trainer: built; its model and arguments are changed as the plan changes.
            plan: in force from here on.
            lengths: of the training sequences, in tokens.
        """
        self._trainer = trainer
        self._plan = plan
        self._device = device
        self._lengths = lengths
        self._strictly: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self._graphs: GraphedDecoder | None = None
        self._graphs_error = ""

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._plan

    @property
    def limit(self) -> Limit:
        """What a micro-batch may hold now."""
        return self._plan.pass_config.limit

    @property
    def recorded_lengths(self) -> list[int]:
        """The lengths in tokens for which there are CUDA graphs now."""
        return sorted(self._graphs.recorded) if self._graphs else []

    @property
    def graphs_error(self) -> str:
        """Why CUDA graphs are not to be tried any more; empty while they may be."""
        return self._graphs_error

    def prepare(self) -> None:
        """Make the model ready on a GPU for whatever will be in force: once, before anything is measured."""
        if self._plan.batching != "padded" and self._device.flash:
            from job.tuning.fit.attention import install  # noqa: PLC0415 - needs a GPU

            self._strictly = install().strictly
        self._extend_positions()

    def _extend_positions(self) -> None:
        """Let Unsloth's table of rotary positions be as long as it can ever be asked for: were it to grow during the
        run, it would round otherwise from there on, which a resumed run would not know of."""
        rotary = getattr(getattr(self._trainer.model.get_base_model(), "model", None), "rotary_emb", None)
        if hasattr(rotary, "extend_rope_embedding"):
            longest = tokens_of_longest(self._lengths, self._plan.batch_size)
            like = torch.empty((), device=self._trainer.args.device, dtype=self._device.dtype)
            rotary.extend_rope_embedding(like, bucket_length(longest))

    def apply(self, pass_config: PassConfig) -> None:
        """Put a pass configuration in force."""
        self._plan = self._plan.with_pass(pass_config)
        mode = pass_config.gradient_checkpointing
        if self._device.kind == "cuda":
            set_checkpointing(self._trainer.model, mode)
        self._trainer.args.gradient_checkpointing = mode != "off"
        if not pass_config.cuda_graphs:
            self.remove_graphs()
        elif self._graphs is None:
            self.install_graphs()

    def explain(self, *reasons: str) -> None:
        """Add to the reasons of the plan in force."""
        self._plan = self._plan.with_reasons(*reasons)

    def install_graphs(self) -> None:
        """From here on the decoder is recorded, each length when it is first met, and replayed."""
        from job.tuning.fit.attention import NotRecordableError  # noqa: PLC0415 - needs a GPU
        from job.tuning.fit.cuda_graphs import GraphedDecoder  # noqa: PLC0415 - needs a GPU

        self.remove_graphs()
        try:
            self._graphs = GraphedDecoder(
                self._trainer.model.get_base_model(),
                longest=max(self._lengths),
                rows=self._plan.batch_size,
                strictly=self._strictly,
                failed=self._continue_without_graphs,
            )
        except NotRecordableError as error:
            self._continue_without_graphs(str(error))

    def _continue_without_graphs(self, reason: str) -> None:
        self.rule_out_graphs(f"micro-batches cannot be recorded: {reason}")
        log.info("cuda_graphs_disabled", reason=reason)
        self.apply(replace(self._plan.pass_config, cuda_graphs=False))

    def rule_out_graphs(self, reason: str) -> None:
        """Note why CUDA graphs are not to be tried any more; what is in force stays so."""
        self._graphs_error = reason

    def remove_graphs(self) -> None:
        """Let the decoder run unrecorded, and free what only the recordings needed."""
        if self._graphs is not None:
            self._graphs.remove()
            self._graphs = None
        if self._device.kind == "cuda":
            torch.cuda.empty_cache()

    def free_recordings(self) -> bool:
        """Free the recordings' memory for now: each length is recorded again when it is next met. False if there are
        none."""
        if self._graphs is None or not self._graphs.recorded:
            return False
        self._graphs.clear()
        torch.cuda.empty_cache()
        return True

    def shrink(self, error: str, *, step: int) -> None:
        """Put a smaller pass configuration in force after memory ran out; what was done of the step is discarded.

        Raises:
            PermanentError: there is none.
        """
        report, before = memory(self._device), self._plan
        self.remove_graphs()
        pass_config = smaller(before.pass_config, self._lengths)
        if pass_config is None:
            raise PermanentError(
                f"The GPU ran out of memory with one sequence in a micro-batch and gradient checkpointing on: {error}",
                remedy=MORE_ROOM,
            )
        self.apply(pass_config)
        now = self._plan.pass_config  # without graphs, if they failed just now
        log.warning("out_of_memory", step=step, reason=error, was=str(before.pass_config), now=str(now), **report)
        self.explain(f"{now}: since memory ran out at step {step}")
        plans = {"was": before.reproducibility_facts(), "is": self._plan.reproducibility_facts()}
        log.warning("resume_not_bitwise", plan=plans)


def set_checkpointing(model: Any, mode: str) -> None:
    """Recompute activations in the backward pass or keep them."""
    value: Any = {"unsloth": "unsloth", "on": True, "off": False}[mode]
    if mode == "unsloth" and torch.utils.checkpoint.checkpoint.__name__ != "unsloth_checkpoint":
        # The model was loaded for plain recomputation, and its layers hold that function.
        from unsloth.models._utils import apply_unsloth_gradient_checkpointing  # noqa: PLC0415 - exists only on a GPU

        dtype = model.get_input_embeddings().weight.dtype
        value = apply_unsloth_gradient_checkpointing(value, model.max_seq_length, dtype)
        if value == "unsloth":  # else sequences are so short that plain recomputation is what it stands for
            model.gradient_checkpointing_enable({"use_reentrant": True})
    model._unsloth_gradient_checkpointing = value  # noqa: SLF001 - what Unsloth returns to after it generated
    FastLanguageModel.for_training(model, use_gradient_checkpointing=value)
