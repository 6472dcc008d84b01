"""Attention over the sequences of a padding-free batch: one flash kernel for all of them, forward and backward.

Unsloth runs one kernel for each sequence where torch is older than 2.12, and one whose gradients differ from run to run
where it is newer. Here it is always one kernel for all (FlashAttention-2, Dao 2023, as torch ships it), and its
gradients are added up in a fixed order, so that a run repeats itself. It takes the borders of the sequences from the
device, which is what lets a CUDA graph be replayed on other lengths (see `job.tuning.fit.cuda_graphs`).

What it does not support (a soft cap, a window shorter than the sequences, fp32, other masks) takes Unsloth's usual
path; on GPUs older than the kernel (`Device.flash`) this is not installed.
"""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from unsloth.utils import attention_dispatch
from unsloth.utils.packing import cover_padded_cu_seqlens

from job.runtime.errors import PermanentError

WIDEST_HEAD = 256
"""That the kernel supports."""
PLAIN = {"causal": True, "dropout_p": 0.0}


class NotRecordableError(Exception):
    """A layer would have taken the usual path while it was recorded, which freezes lengths into the graph."""


class Varlen:
    """Takes the place of Unsloth's `run_attention` in its model files."""

    def __init__(self, usual: Callable[..., torch.Tensor]) -> None:
        self._usual = usual
        self.calls = 0
        """How often the one kernel ran."""
        self._strict = False

    def __call__(
        self,
        *,
        config: Any,
        context: Any,
        Q: torch.Tensor,  # noqa: N803 - Unsloth's names
        K: torch.Tensor,  # noqa: N803
        V: torch.Tensor,  # noqa: N803
    ) -> torch.Tensor:
        """Q: (1, heads, tokens, width), K and V: the same with fewer heads. Returns (1, tokens, heads, width)."""
        if not _supported(config, context, Q, K, V):
            if self._strict:
                raise NotRecordableError("its attention is not one that a single kernel computes for all lengths")
            return self._usual(config=config, context=context, Q=Q, K=K, V=V)
        self.calls += 1
        borders, longest = cover_padded_cu_seqlens(context.seq_info, Q.shape[-2])
        flat = (tensor.squeeze(0).transpose(0, 1).contiguous() for tensor in (Q, K, V))
        return _Flash.apply(*flat, borders, longest).unsqueeze(0)

    @contextlib.contextmanager
    def strictly(self) -> Iterator[None]:
        """Inside, a layer that would take the usual path raises NotRecordableError."""
        self._strict = True
        try:
            yield
        finally:
            self._strict = False


def _supported(config: Any, context: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    window = context.sliding_window
    return (
        context.seq_info is not None
        and context.attention_mask is None
        and context.prefix_seg_info is None
        and context.is_causal
        and q.is_cuda
        and len(q) == 1
        and q.shape[-2] == k.shape[-2]
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] <= WIDEST_HEAD
        and q.shape[-1] % 8 == 0
        and (not window or window <= 0 or window >= context.seq_info[2])
        and not config.sdpa_kwargs
        and not config.xformers_kwargs
        and all(PLAIN.get(name) == value for name, value in (config.flash_varlen_kwargs or {}).items())
    )


class _Flash(torch.autograd.Function):
    """q: (tokens, heads, width), k and v: (tokens, fewer heads, width); borders: int32, one more than sequences."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: torch.Tensor, longest: int
    ) -> torch.Tensor:
        out, log_sums, seed, offset, _ = torch.ops.aten._flash_attention_forward(  # noqa: SLF001 - torch has no other name
            q, k, v, borders, borders, longest, longest, 0.0, True, return_debug_mask=False
        )
        ctx.save_for_backward(q, k, v, borders, out, log_sums, seed, offset)
        ctx.longest = longest
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, borders, out, log_sums, seed, offset = ctx.saved_tensors
        with _in_order():
            gradients = torch.ops.aten._flash_attention_backward(  # noqa: SLF001
                gradient.contiguous(),
                q,
                k,
                v,
                out,
                log_sums,
                borders,
                borders,
                ctx.longest,
                ctx.longest,
                0.0,
                True,
                seed,
                offset,
            )
        return (*gradients, None, None)


@contextlib.contextmanager
def _in_order() -> Iterator[None]:
    """Inside, kernels add up in a fixed order."""
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def install() -> Varlen:
    """Let Unsloth's models use the one kernel; returns what they call. A second call changes nothing.

    Raises PermanentError if none of them has the function to be replaced.
    """
    usual = attention_dispatch.run_attention
    installed = None
    for name, module in list(sys.modules.items()):
        if not name.startswith("unsloth.models.") or not hasattr(module, "run_attention"):
            continue
        if isinstance(module.run_attention, Varlen):
            installed = module.run_attention
        elif module.run_attention is usual:
            installed = installed or Varlen(usual)
            module.run_attention = installed
    if installed is None:
        raise PermanentError(
            "The training library's models no longer have the attention function that this job replaces.",
            remedy="Report this with the log: the versions in the image do not fit together.",
        )
    return installed
