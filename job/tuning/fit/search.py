"""Finding out what fits this card: the plan's candidates, one probe each, the quickest first; and what to do when
memory runs out later."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import structlog
import torch
from unsloth import FastLanguageModel

from job.config.schema import Config
from job.model.shape import Shape
from job.runtime.errors import PermanentError
from job.tuning.batches import IGNORED
from job.tuning.device import MORE_ROOM, Device, matrix_rate, memory, out_of_memory
from job.tuning.fit.micro_batches import Limit, bucket
from job.tuning.fit.plan import FAR_TOO_LARGE, Candidate, PassConfig, Plan, candidates, freed, smaller

if TYPE_CHECKING:  # they import what Unsloth has only where there is a GPU
    from job.tuning.fit.attention import Varlen
    from job.tuning.fit.cuda_graphs import GraphedDecoder

log = structlog.get_logger()
LOSS_OFF, GRADIENTS_OFF = 2e-3, 5e-2
"""How far a recorded pass may be from the same pass unrecorded, relatively; both are in 16 bit."""
SPARE_BYTES = 512 << 20
"""To be left free by a probe, beside the optimizer's states: for whatever differs between steps."""


@dataclass(kw_only=True)
class PassSearch:
    """The cut in force, and the means to change it."""

    plan: Plan
    device: Device
    shape: Shape | None
    lengths: Sequence[int]
    """Of the training sequences, in tokens."""
    state_bytes: int
    """What the optimizer will keep."""
    trainer: Any = None
    collate: Any = None
    """The trainer's own collator, which counts nothing."""
    graphed: GraphedDecoder | None = None
    seconds: float = 0.0
    """What `settle` took, most of it for kernels that the first step would have compiled."""
    _varlen: Varlen | None = None
    _no_graphs: str = ""

    @property
    def limit(self) -> Limit:
        """What a pass may hold now."""
        return Limit(rows=self.plan.micro_batch, tokens=self.plan.tokens_in_pass)

    def settle(self, config: Config, *, recorded: PassConfig | None) -> None:
        """Choose the cut and put it in force; on a CPU there is nothing to choose.

        It must be called when the trainer is ready to train. Nothing that is learned from changes: weights, gradients
        and random numbers are as before.

        Args:
            recorded: what an earlier attempt of the run used on a card of this kind.

        Raises:
            PermanentError: nothing fits.
        """
        started = time.monotonic()
        if self.device.kind == "cuda":
            self._settle_on_card(config, recorded)
        else:
            self.apply(recorded or self.plan.cut)
        self.seconds = time.monotonic() - started
        log.info("plan_made", plan=asdict(self.plan), seconds=round(self.seconds, 3), **memory(self.device))

    def _settle_on_card(self, config: Config, recorded: PassConfig | None) -> None:
        if self.plan.batching != "padded" and self.device.flash:
            from job.tuning.fit.attention import install  # noqa: PLC0415 - see above

            self._varlen = install()
        self._settle_positions()
        graphs = recordable(self.plan, config, self.device)
        if recorded is not None:
            self.apply(replace(recorded, cuda_graphs=recorded.cuda_graphs and graphs))
            self.plan = self.plan.with_pass(self.plan.cut, "as the attempt before")
            return
        with _unchanged(self.trainer.model):
            rate = matrix_rate()
        found = candidates(self.plan, config, self.shape, lengths=self.lengths, rate=rate, graphs=graphs)
        self._choose(found, config)

    def _settle_positions(self) -> None:
        """Let Unsloth's table of rotary positions be as long as it can ever be asked for: were it to grow in mid-run,
        it would round otherwise from there on, which a resumed run would not know of."""
        rotary = getattr(getattr(self.trainer.model.get_base_model(), "model", None), "rotary_emb", None)
        if hasattr(rotary, "extend_rope_embedding"):
            longest = sum(sorted(self.lengths)[-self.plan.batch_size :])
            like = torch.empty((), device=self.trainer.args.device, dtype=self.device.dtype)
            rotary.extend_rope_embedding(like, bucket(longest))

    def _choose(self, found: Sequence[Candidate], config: Config) -> None:
        tried: list[str] = []
        least = min(found, key=lambda one: one.bytes)
        for candidate in found:
            if candidate.bytes > FAR_TOO_LARGE * self.device.memory_bytes and candidate is not least:
                tried.append(f"{candidate.cut}: needs about {candidate.bytes / 2**30:.0f} GiB")
                continue
            if candidate.cut.cuda_graphs and self._no_graphs:
                continue
            failed = self._probe(candidate.cut)
            if not failed:
                self.plan = self.plan.with_pass(candidate.cut, *tried, f"{candidate.cut}: fits")
                return
            tried.append(f"{candidate.cut}: {failed}")
            log.info("plan_candidate_rejected", candidate=str(candidate.cut), reason=failed)
        raise PermanentError(
            f"The GPU's memory does not suffice for {least.cut}, where the longest sequence has {max(self.lengths):,} "
            f"tokens: {'; '.join(tried)}.",
            remedy=freed(config) + MORE_ROOM,
        )

    def _probe(self, cut: PassConfig) -> str:
        """Try the largest pass there is. Returns what was wrong; empty if it fits."""
        started, error = time.monotonic(), ""
        try:
            with _unchanged(self.trainer.model):
                self.apply(cut)
                error = self._passes(cut)
        except RuntimeError as found:
            if not out_of_memory(found):
                raise
            error = "out of memory"
        if error:
            self.forget()
        log.debug("plan_probed", candidate=str(cut), error=error, seconds=round(time.monotonic() - started, 3))
        return error

    def _passes(self, cut: PassConfig) -> str:
        batch = self.largest(cut)
        self.forget()
        torch.cuda.reset_peak_memory_stats()
        loss, gradients = self._one(batch)
        if cut.cuda_graphs:
            self._record()
            again, recorded = self._one(batch)
            if self._no_graphs:
                return self._no_graphs
            off = _distance(gradients, recorded)
            if abs(again - loss) > LOSS_OFF * abs(loss) or off > GRADIENTS_OFF:
                self._no_graphs = f"a recorded pass gives another result ({again:.4f} for {loss:.4f}, {off:.2g})"
                return self._no_graphs
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._one(batch)
        free = _free_bytes()
        if free < self.state_bytes + SPARE_BYTES:
            return f"only {free / 2**20:.0f} MiB are left"
        return ""

    def largest(self, cut: PassConfig) -> dict[str, torch.Tensor]:
        """The batch that needs most memory in one pass: the longest sequences there are."""
        order = sorted(range(len(self.lengths)), key=lambda row: -self.lengths[row])[: cut.micro_batch]
        rows = [self.trainer.train_dataset[row] for row in order]
        batch: dict[str, torch.Tensor] = self.collate(rows)
        return batch

    def _one(self, batch: dict[str, torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        """A pass: its loss, and the gradients of the adapter."""
        model = self.trainer.model_wrapped
        model.zero_grad()
        labels = (batch["labels"][:, 1:] != IGNORED).sum().clamp(min=1).to(self.trainer.args.device)
        loss = self.trainer.one_pass(model, batch, labels)
        found = [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return float(loss), found

    def apply(self, cut: PassConfig) -> None:
        """Put a cut in force."""
        self.plan = self.plan.with_pass(cut)
        mode = cut.gradient_checkpointing
        if self.device.kind == "cuda":
            set_checkpointing(self.trainer.model, mode)
        self.trainer.args.gradient_checkpointing = mode != "off"
        if not cut.cuda_graphs:
            self.forget()
        elif self.graphed is None:
            self._record()

    def _record(self) -> None:
        """From here on passes are recorded, each length when it is first met."""
        from job.tuning.fit.attention import NotRecordableError  # noqa: PLC0415 - see above
        from job.tuning.fit.cuda_graphs import GraphedDecoder  # noqa: PLC0415

        self.forget()
        try:
            self.graphed = GraphedDecoder(
                self.trainer.model.get_base_model(),
                longest=max(self.lengths),
                rows=self.plan.batch_size,
                strictly=self._varlen.strictly if self._varlen else contextlib.nullcontext,
                failed=self._not_recorded,
            )
        except NotRecordableError as error:
            self._not_recorded(str(error))

    def _not_recorded(self, reason: str) -> None:
        self._no_graphs = f"passes cannot be recorded: {reason}"
        log.info("cuda_graphs_disabled", reason=reason)
        self.apply(replace(self.plan.cut, cuda_graphs=False))

    def forget(self) -> None:
        """Record no passes any more, and give back what only they needed."""
        if self.graphed is not None:
            self.graphed.remove()
            self.graphed = None
        if self.device.kind == "cuda":
            torch.cuda.empty_cache()

    def make_room(self) -> bool:
        """Give the recordings up for now: passes are recorded anew when they are next met. False if there are none."""
        if self.graphed is None or not self.graphed.recorded:
            return False
        self.graphed.clear()
        torch.cuda.empty_cache()
        return True

    def shrink(self, error: str, *, step: int) -> None:
        """Go on with a smaller cut, after memory ran out in a pass; what was done of the step is given up.

        Raises:
            PermanentError: there is none.
        """
        report, before = memory(self.device), self.plan
        self.forget()
        cut = smaller(before.cut, self.lengths)
        if cut is None:
            raise PermanentError(
                f"The GPU ran out of memory with one sequence in a pass and gradient checkpointing on: {error}",
                remedy=MORE_ROOM,
            )
        self.apply(cut)
        now = self.plan.cut  # without graphs, if they were given up just now
        log.warning("out_of_memory", step=step, reason=error, was=str(before.cut), now=str(now), **report)
        self.plan = self.plan.with_pass(now, f"{now}: since memory ran out at step {step}")
        plans = {"was": before.reproducibility_facts(), "is": self.plan.reproducibility_facts()}
        log.warning("resume_not_bitwise", plan=plans)


def recordable(plan: Plan, config: Config, device: Device) -> bool:
    """Whether passes may be tried as CUDA graphs. They need the one kernel for all lengths; dropout would repeat its
    mask, and 8-bit products (Dettmers et al. 2022, LLM.int8()) ask the card for the outliers of every input, which a
    recording cannot."""
    attention = plan.batching != "padded" and device.flash
    return attention and config.lora_dropout == 0 and config.precision != "8bit"


def set_checkpointing(model: Any, mode: str) -> None:
    """Recompute activations in the backward pass or keep them."""
    value: Any = {"unsloth": "unsloth", "on": True, "off": False}[mode]
    if mode == "unsloth" and torch.utils.checkpoint.checkpoint.__name__ != "unsloth_checkpoint":
        # The model was loaded for plain recomputation, and its layers hold that function.
        from unsloth.models._utils import apply_unsloth_gradient_checkpointing  # noqa: PLC0415 - see above

        dtype = model.get_input_embeddings().weight.dtype
        value = apply_unsloth_gradient_checkpointing(value, model.max_seq_length, dtype)
        if value == "unsloth":  # else sequences are so short that plain recomputation is what it stands for
            model.gradient_checkpointing_enable({"use_reentrant": True})
    model._unsloth_gradient_checkpointing = value  # noqa: SLF001 - what Unsloth goes back to after it generated
    FastLanguageModel.for_training(model, use_gradient_checkpointing=value)


@contextlib.contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Inside, passes may be made that leave no trace in random numbers and gradients."""
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
