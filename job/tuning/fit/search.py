"""Finding out what fits this GPU: the plan's candidates, one probe each, the quickest first.

Knows how to try a pass configuration without leaving a trace; `PassControl` puts it in force.
"""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog
import torch

from job.config.schema import Config
from job.data.rendering.labels import IGNORED
from job.runtime.errors import PermanentError
from job.tuning.device import MORE_ROOM, Device, matrix_rate, out_of_memory
from job.tuning.fit.candidates import FAR_TOO_LARGE, Candidate, Workload, candidates
from job.tuning.fit.control import PassControl
from job.tuning.fit.plan import PassConfig, Plan, auto_remedy

log = structlog.get_logger()
LOSS_OFF, GRADIENTS_OFF = 2e-3, 5e-2
"""How far a replayed micro-batch may be from the same one unrecorded, relatively; both are in 16 bit."""
SPARE_BYTES = 512 << 20
"""What a probe leaves free in addition to the optimizer's states: for whatever differs between steps."""


@dataclass(frozen=True, kw_only=True)
class PassSearch:
    """Chooses the pass configuration and puts it in force.

    The trainer must be ready to train. Nothing that is learned from changes: weights, gradients and random numbers are
    as before.
    """

    trainer: Any
    """Whose `passes` are controlled."""
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]
    """The trainer's own collator, which counts nothing."""
    config: Config
    device: Device
    workload: Workload

    @property
    def _passes(self) -> PassControl:
        return self.trainer.passes

    def choose(self, *, reused: PassConfig | None) -> None:
        """Choose; on a CPU there is nothing to measure.

        Args:
            reused: what an earlier attempt of the run used on a GPU of this kind: taken unmeasured.

        Raises:
            PermanentError: nothing fits.
        """
        passes = self._passes
        if self.device.kind != "cuda":
            passes.apply(reused or passes.plan.pass_config)
            return
        passes.prepare()
        graphs = graphs_possible(passes.plan, self.config, self.device)
        if reused is not None:
            passes.apply(replace(reused, cuda_graphs=reused.cuda_graphs and graphs))
            passes.explain("as in the attempt before")
            return
        with _unchanged(self.trainer.model):
            rate = matrix_rate()
        self._take_first_that_fits(candidates(passes.plan, self.config, self.workload, rate=rate, graphs=graphs))

    def _take_first_that_fits(self, ordered: Sequence[Candidate]) -> None:
        tried: list[str] = []
        least = min(ordered, key=lambda candidate: candidate.bytes)
        for candidate in ordered:
            pass_config = candidate.pass_config
            if candidate.bytes > FAR_TOO_LARGE * self.device.memory_bytes and candidate is not least:
                tried.append(f"{pass_config}: needs about {candidate.bytes / 2**30:.0f} GiB")
                continue
            if pass_config.cuda_graphs and self._passes.graphs_error:
                continue
            problem = self._probe(pass_config)
            if not problem:
                self._passes.explain(*tried, f"{pass_config}: fits")
                return
            tried.append(f"{pass_config}: {problem}")
            log.info("plan_candidate_rejected", candidate=str(pass_config), reason=problem)
        raise PermanentError(
            f"The GPU's memory is not enough for {least.pass_config}, where the longest sequence has "
            f"{max(self.workload.lengths):,} tokens: {'; '.join(tried)}.",
            remedy=auto_remedy(self.config) + MORE_ROOM,
        )

    def _probe(self, pass_config: PassConfig) -> str:
        """Put a pass configuration in force and try it on the largest micro-batch. Returns what was wrong; empty if it
        fits."""
        started, problem = time.monotonic(), ""
        try:
            with _unchanged(self.trainer.model):
                self._passes.apply(pass_config)
                problem = self._try(pass_config)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            problem = "out of memory"
        if problem:
            self._passes.remove_graphs()
        log.debug(
            "plan_probed", candidate=str(pass_config), error=problem, seconds=round(time.monotonic() - started, 3)
        )
        return problem

    def _try(self, pass_config: PassConfig) -> str:
        batch = self._largest_micro_batch(pass_config)
        self._passes.remove_graphs()
        torch.cuda.reset_peak_memory_stats()
        loss, gradients = self._run(batch)
        if pass_config.cuda_graphs:
            self._passes.install_graphs()
            replayed_loss, replayed_gradients = self._run(batch)
            if self._passes.graphs_error:
                return self._passes.graphs_error
            off = _distance(gradients, replayed_gradients)
            if abs(replayed_loss - loss) > LOSS_OFF * abs(loss) or off > GRADIENTS_OFF:
                self._passes.rule_out_graphs(
                    f"a recorded micro-batch gives another result ({replayed_loss:.4f} for {loss:.4f}, {off:.2g})"
                )
                return self._passes.graphs_error
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._run(batch)
        free = _free_bytes()
        if free < self.workload.state_bytes + SPARE_BYTES:
            return f"only {free / 2**20:.0f} MiB are left"
        return ""

    def _largest_micro_batch(self, pass_config: PassConfig) -> dict[str, torch.Tensor]:
        """That which needs most memory: the longest sequences there are."""
        lengths = self.workload.lengths
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])[: pass_config.micro_batch]
        return self.collate([self.trainer.train_dataset[row] for row in order])

    def _run(self, batch: dict[str, torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        """A micro-batch: its loss, and the gradients of the adapter."""
        model = self.trainer.model_wrapped
        model.zero_grad()
        labels = (batch["labels"][:, 1:] != IGNORED).sum().clamp(min=1).to(self.trainer.args.device)
        loss = self.trainer.run_micro_batch(model, batch, labels)
        gradients = [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return float(loss), gradients


def graphs_possible(plan: Plan, config: Config, device: Device) -> bool:
    """Whether CUDA graphs may be tried. They need the one kernel for all lengths; dropout would repeat its mask, and
    8-bit products (Dettmers et al. 2022, LLM.int8()) ask the GPU for the outliers of every input, which a recording
    cannot."""
    attention = plan.batching != "padded" and device.flash
    return attention and config.lora_dropout == 0 and config.precision != "8bit"


@contextlib.contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Inside, micro-batches may be run that leave no trace in random numbers and gradients."""
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    try:
        yield
    finally:
        model.zero_grad()
        torch.set_rng_state(before[0])
        torch.cuda.set_rng_state(before[1])


def _distance(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """The relative distance of two sets of gradients (L2)."""
    if len(one) != len(other):
        return float("inf")
    apart = sum(float((a - b).float().pow(2).sum()) for a, b in zip(one, other, strict=True))
    size = sum(float(a.float().pow(2).sum()) for a in one)
    return float((apart / size) ** 0.5) if size else 0.0


def _free_bytes() -> int:
    """What the process could still take at its peak."""
    free, total = torch.cuda.mem_get_info()
    allowed = round(torch.cuda.get_per_process_memory_fraction() * total)
    return min(free + torch.cuda.memory_reserved(), allowed) - torch.cuda.max_memory_reserved()
