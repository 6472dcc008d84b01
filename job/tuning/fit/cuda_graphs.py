"""The decoder's kernels as CUDA graphs: launched at once instead of one by one from Python.

A LoRA step launches thousands of small kernels, and below about 10,000 tokens the GPU waits for Python most of the
time. A padding-free micro-batch is brought to one of few lengths (by one more sequence, of padding, that attends only
to itself and is not learned), and for each length forward and backward are recorded once and replayed from then on. The
head with its loss, the optimizer and everything around them stay as they are.

Gradients of the adapter are added up inside the graph, in buffers that stay where they are.
"""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast
from unsloth.utils.packing import get_packed_info_from_kwargs

from job.tuning.device import out_of_memory
from job.tuning.fit.attention import NotRecordableError
from job.tuning.fit.micro_batches import GRAIN, PER_OCTAVE, bucket_length, bucket_sequences

WARM_UPS = 2
"""Runs before the first recording: kernels are compiled and tuned in them."""


@dataclass(kw_only=True)
class _Recording:
    """One length's graphs, and the buffers that they read and write."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: torch.Tensor
    borders: torch.Tensor
    """Where sequences begin: int32, one more than there are."""
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    hidden: torch.Tensor
    gradient: torch.Tensor
    """Of the loss by `hidden`."""


class GraphedDecoder:
    """Takes the place of a decoder's `forward` in training; all but padding-free batches take the usual path."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        longest: int,
        rows: int,
        strictly: Callable[[], AbstractContextManager[None]],
        failed: Callable[[str], None],
    ) -> None:
        """
        Args:
            model: the causal language model, whose `model` is the decoder.
            longest: tokens of the longest sequence there is.
            rows: the most sequences in one micro-batch.
            strictly: while it is entered, layers refuse to do what cannot be replayed (NotRecordableError).
            failed: called with the reason why a micro-batch could not be recorded; it and all later ones take the
                usual path.

        Raises:
            NotRecordableError: the model has no decoder of its own.
        """
        decoder = getattr(model, "model", None)
        if not isinstance(decoder, torch.nn.Module):
            raise NotRecordableError(f"{type(model).__name__} has no decoder of its own")
        self.recorded: dict[int, _Recording] = {}
        self._strictly, self._failed = strictly, failed
        self._decoder = decoder
        self._usual = decoder.forward
        self._longest, self._rows = longest, rows
        self._parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
        self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._pool = torch.cuda.graph_pool_handle()
        self._gate = torch.zeros((), device=self._parameters[0].device, requires_grad=True)
        decoder.forward = self

    def remove(self) -> None:
        """Give the decoder its own `forward` back."""
        self._decoder.forward = self._usual

    def clear(self) -> None:
        """Free all recordings and their memory. Later ones get a new pool."""
        self.recorded.clear()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The decoder's output for a batch."""
        lengths = kwargs.get("packed_seq_lengths")
        if (
            not (self._decoder.training and torch.is_grad_enabled())
            or input_ids is None
            or lengths is None
            or len(input_ids) != 1
            or len(lengths) > self._rows
        ):
            return self._usual(input_ids, *args, **kwargs)
        size = bucket_length(input_ids.shape[1])
        recording = self.recorded.get(size)
        if recording is None:
            try:
                recording = self.recorded[size] = self._record(size, kwargs)
            except (NotRecordableError, RuntimeError) as error:
                if out_of_memory(error):
                    raise
                self._failed(str(error).splitlines()[0])
                return self._usual(input_ids, *args, **kwargs)
        _fill(recording, input_ids, kwargs["position_ids"], lengths)
        hidden = _Replayed.apply(self._gate, recording, self)
        return BaseModelOutputWithPast(last_hidden_state=hidden[:, : input_ids.shape[1]])

    def _record(self, size: int, kwargs: dict[str, Any]) -> _Recording:
        device = self._gate.device
        longest = max(self._longest, size // PER_OCTAVE, GRAIN)  # the padding is a sequence, too
        lengths = torch.tensor(
            bucket_sequences(size, longest=longest, rows=self._rows), dtype=torch.int32, device=device
        )
        input_ids = torch.zeros((1, size), dtype=torch.int64, device=device)
        position_ids = torch.zeros((1, size), dtype=torch.int64, device=device)
        given = {**kwargs, "position_ids": position_ids, "packed_seq_lengths": lengths}
        # Unsloth caches what it computed from these lengths while it meets the same tensor; `borders` is part of that.
        _, borders, _ = get_packed_info_from_kwargs(given, device)
        torch.clear_autocast_cache()

        def run() -> torch.Tensor:
            with self._strictly():
                hidden: torch.Tensor = self._usual(input_ids, **given)[0]
            return hidden

        if not self.recorded:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    hidden = run()
                    torch.autograd.grad(hidden, self._parameters, torch.zeros_like(hidden))
                    del hidden
            torch.cuda.current_stream().wait_stream(stream)
            torch.clear_autocast_cache()
            torch.cuda.empty_cache()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self._pool):
            hidden = run()
        gradient = torch.zeros_like(hidden)
        with torch.cuda.graph(backward, pool=self._pool):
            computed = torch.autograd.grad(hidden, self._parameters, gradient)
            torch._foreach_add_(self._gradients, list(computed))
            del computed
        torch.clear_autocast_cache()
        return _Recording(
            input_ids=input_ids,
            position_ids=position_ids,
            lengths=lengths,
            borders=borders,
            forward=forward,
            backward=backward,
            hidden=hidden.detach(),
            gradient=gradient,
        )

    def bind_gradients(self) -> None:
        """Let the parameters' gradients be the buffers that the graphs add to, with what they hold so far."""
        if self._parameters[0].grad is self._gradients[0]:
            return
        torch._foreach_zero_(self._gradients)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is not None:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient


def _fill(recording: _Recording, input_ids: torch.Tensor, position_ids: torch.Tensor, lengths: torch.Tensor) -> None:
    """Put a batch into the buffers. Nothing here waits for the device."""
    total, size, rows = input_ids.shape[1], recording.input_ids.shape[1], len(lengths)
    recording.input_ids[:, :total].copy_(input_ids)
    recording.input_ids[:, total:].zero_()
    recording.position_ids[:, :total].copy_(position_ids)
    recording.position_ids[:, total:].zero_()
    ends = torch.cumsum(lengths.to(recording.borders.device, non_blocking=True), dim=0)
    recording.borders[1 : rows + 1].copy_(ends)
    recording.borders[rows + 1 :].fill_(size)


class _Replayed(torch.autograd.Function):
    """Forward and backward by the recorded graphs."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, recording: _Recording, owner: GraphedDecoder) -> torch.Tensor:  # noqa: ARG004 - autograd asks whether it needs a gradient
        ctx.recording, ctx.owner = recording, owner
        recording.forward.replay()
        return recording.hidden.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        ctx.owner.bind_gradients()
        ctx.recording.gradient.copy_(gradient)
        ctx.recording.backward.replay()
        return None, None, None
