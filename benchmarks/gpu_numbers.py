"""The arithmetic of benchmarks/gpu.py: rows of known lengths, the order of a seed, steady speed, FLOPs, verdicts.

Starts nothing and needs no card; torch is imported only to draw the order that it draws.
"""

from __future__ import annotations

import pydoc_data.topics
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SEED = 3407
RANK = 16
BATCH = 8
WARM_UP = 5
"""Steps that are not counted: the first ones compile."""
TOKENS_AROUND = {"user": 8, "assistant": 13}
"""What ChatML adds to a message with the tokenizer of tests/tiny.py, where a byte is a token: the two markers, the
role's name and two line ends."""
SPREAD = 0.7
"""Sigma of the lengths' logarithm: about 1 % of them reach four times the mean, where they are cut."""
DENSE_BF16 = {"H100": 989.4e12, "H200": 989.4e12}
"""Peak FLOP/s of the SXM cards (NVIDIA H100 Tensor Core GPU datasheet, whose 1,979 TFLOP/s are with sparsity)."""
FIRST_LOSS_OFF, LOSS_OFF = 2e-3, 2e-2
"""The largest relative difference of a loss from the job's that counts as the noise of bf16.

At the first step all sides have the same weights (an adapter begins as zero), so that only rounding differs: a bf16
number is off by up to 2^-9 = 0.2 %, and a loss is a mean over thousands of tokens. Later steps carry the rounding of
gradients and weights of all steps before, while random weights let the loss fall quickly: ten times as much."""
TARGETS = {"1b": {"tutorial": 3.0, "collator-free": 2.0}, "8b": {"tutorial": 2.3, "collator-free": 1.5}, "tiny": {}}
"""How many times the speed of that side the job must reach at least."""
WARM_SHARE = 0.5
"""Of the time to the first step of a first start, that a second may take at 1B."""
ADAPTER_SHARE = 1 / 3
"""The most of the tutorial's time to adapter that the job may take."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A Llama shape, and the lengths of the rows that it is trained on, in tokens."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int
    mean: int
    longest: int

    def config(self) -> dict[str, int]:
        """What transformers' LlamaConfig calls it."""
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
        }

    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear modules."""
        narrow = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.hidden, narrow),
            "self_attn.v_proj": (self.hidden, narrow),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.hidden, self.intermediate),
            "mlp.up_proj": (self.hidden, self.intermediate),
            "mlp.down_proj": (self.intermediate, self.hidden),
        }

    def frozen(self) -> int:
        """Parameters of the base that multiply each token: linear layers and head, not the embedding's table."""
        layer = sum(inputs * outputs for inputs, outputs in self.linears().values())
        return self.layers * layer + self.vocabulary * self.hidden

    def adapter(self, rank: int = RANK) -> int:
        """Parameters of the adapter."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.linears().values())


SIZES = {
    "tiny": Size(
        layers=2,
        hidden=64,
        intermediate=128,
        heads=4,
        kv_heads=2,
        vocabulary=260,
        positions=512,
        mean=60,
        longest=200,
    ),
    "1b": Size(
        layers=16,
        hidden=2048,
        intermediate=8192,
        heads=32,
        kv_heads=8,
        vocabulary=128_256,
        positions=8192,
        mean=500,
        longest=2048,
    ),
    "8b": Size(
        layers=32,
        hidden=4096,
        intermediate=14_336,
        heads=32,
        kv_heads=8,
        vocabulary=128_256,
        positions=8192,
        mean=500,
        longest=2048,
    ),
}


def lengths(size: Size, count: int, *, seed: int) -> list[int]:
    """Tokens of `count` rows: log-normal, cut at a tenth of the mean (or what a row needs) and at the longest."""
    generator = random.Random(seed)
    least = max(sum(TOKENS_AROUND.values()) + 8, size.mean // 10)
    middle = size.mean / 2.718281828 ** (SPREAD**2 / 2)  # the mean of exp(N(0, s)) is exp(s^2 / 2)
    return [max(least, min(round(middle * generator.lognormvariate(0, SPREAD)), size.longest)) for _ in range(count)]


def rows(counts: Sequence[int], *, seed: int) -> list[dict[str, Any]]:
    """Conversations of exactly so many tokens: one question and answer, or two of each in every third row."""
    prose = " ".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore").decode()
    prose = " ".join(prose.split())
    generator = random.Random(seed)
    found = []
    for number, count in enumerate(counts):
        pairs = 2 if number % 3 == 2 and count > 4 * sum(TOKENS_AROUND.values()) else 1
        left = count - pairs * sum(TOKENS_AROUND.values())
        sizes = _cut(left, pairs)
        messages = [
            {"role": role, "content": _words(prose, generator, length)}
            for role, length in zip(("user", "assistant") * pairs, sizes, strict=True)
        ]
        found.append({"messages": messages})
    return found


def _cut(left: int, pairs: int) -> list[int]:
    """So many characters over the messages: three in ten for the questions."""
    each = [left // pairs] * pairs
    each[-1] += left - sum(each)
    return [part for whole in each for part in (max(1, whole * 3 // 10), whole - max(1, whole * 3 // 10))]


def _words(prose: str, generator: random.Random, length: int) -> str:
    """A stretch of the prose; no blank at an end, which a template might strip."""
    start = generator.randrange(len(prose) - length)
    text = prose[start : start + length]
    head = "x" if text[0] == " " else text[0]
    return head if length == 1 else head + text[1:-1] + ("x" if text[-1] == " " else text[-1])


def order(count: int, *, seed: int = SEED) -> list[int]:
    """The rows of the first epoch in the order of the Trainer (accelerate's SeedableRandomSampler)."""
    import torch  # noqa: PLC0415

    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def by_step(counts: Sequence[int], *, batch: int, seed: int = SEED) -> list[list[int]]:
    """The lengths of the rows of each optimizer step."""
    shuffled = [counts[row] for row in order(len(counts), seed=seed)]
    return [shuffled[start : start + batch] for start in range(0, len(shuffled), batch)]


@dataclass(frozen=True, kw_only=True)
class Steady:
    """The speed after the first steps: between the end of one step and the end of a later one."""

    steps: int
    seconds: float
    tokens: int
    tokens_per_second: float
    median_step_seconds: float
    began: float
    """Unix time, as `ended`."""
    ended: float


def steady(ends: Sequence[float], tokens: Sequence[int], *, skip: int, count: int) -> Steady:
    """Speed over `count` steps after the first `skip`.

    Args:
        ends: Unix time at the end of each step, when the device has finished.
        tokens: of each step, padding excluded.
    """
    if skip < 1 or len(ends) < skip + count:
        raise ValueError(f"{len(ends)} steps are too few for {count} after {skip}")
    seconds = ends[skip + count - 1] - ends[skip - 1]
    each = [ends[step] - ends[step - 1] for step in range(skip, skip + count)]
    learned = sum(tokens[skip : skip + count])
    return Steady(
        steps=count,
        seconds=round(seconds, 4),
        tokens=learned,
        tokens_per_second=round(learned / seconds, 1),
        median_step_seconds=round(statistics.median(each), 4),
        began=ends[skip - 1],
        ended=ends[skip + count - 1],
    )


def flops(size: Size, sequences: Sequence[int], *, rank: int = RANK) -> int:
    """The operations that a LoRA step on these sequences must do, padding and recomputation left out.

    A multiply-add is 2. A frozen matrix costs 2 a parameter and token forward and 2 backward, for the activations'
    gradients: its own are not needed. The adapter's cost 6. Causal attention of a sequence of s tokens costs, in each
    layer, 2 products of s x s x hidden, half of them masked: 2 s^2 hidden forward and twice that backward. This is the
    accounting of Chowdhery et al. 2022 ("PaLM", appendix B: 6 N + 12 L H Q T a token), without the 2 N of the frozen
    weights' gradients and without the masked half of attention.
    """
    tokens = sum(sequences)
    matrices = tokens * (4 * size.frozen() + 6 * size.adapter(rank))
    return matrices + 6 * size.layers * size.hidden * sum(length**2 for length in sequences)


def utilisation(size: Size, sequences: Sequence[int], seconds: float, card: str) -> float | None:
    """Model FLOPs utilisation: `flops` a second over the card's peak. None for a card whose peak is not known here."""
    peak = next((value for name, value in DENSE_BF16.items() if name in card), None)
    return round(flops(size, sequences) / seconds / peak, 4) if peak else None


def busy(samples: Sequence[tuple[float, float]], began: float, ended: float) -> float | None:
    """Mean of the shares that were sampled between two times; None if there are none."""
    inside = [share for at, share in samples if began <= at <= ended]
    return round(statistics.fmean(inside), 4) if inside else None


def agreement(losses: Mapping[str, Sequence[float]], *, reference: str = "job") -> dict[str, dict[str, float]]:
    """How far the losses of each other side are from the reference's, relative to it, over the steps both have."""
    found = {}
    for side, mine in losses.items():
        pairs = list(zip(mine, losses.get(reference, ()), strict=False))
        if side == reference or not pairs:
            continue
        off = [abs(one - other) / abs(other) for one, other in pairs]
        found[side] = {"steps": len(off), "first": off[0], "largest": max(off), "mean": statistics.fmean(off)}
    return found


def ratios(speed: Mapping[str, float], *, ours: str = "job") -> dict[str, float]:
    """How many times as fast the job is as each other side."""
    if ours not in speed:
        return {}
    return {side: round(speed[ours] / value, 3) for side, value in speed.items() if side != ours}


def problems(result: Mapping[str, Any]) -> list[str]:
    """What of a result misses its target, in words; nothing is said of what was not measured."""
    wrong = list(result.get("failures", ()))
    for side, least in TARGETS[result["size"]].items():
        found = result.get("ratios", {}).get(side)
        if found is not None and found < least:
            wrong.append(f"the job is {found:.2f} times as fast as {side}, less than {least:g}")
    for side, off in result.get("agreement", {}).items():
        if off["first"] > FIRST_LOSS_OFF or off["largest"] > LOSS_OFF:
            wrong.append(
                f"losses of {side} and the job differ by {off['first']:.2%} at the first step and up to "
                f"{off['largest']:.2%} later; the noise of bf16 is {FIRST_LOSS_OFF:.1%} and {LOSS_OFF:.0%}"
            )
    return [*wrong, *_of_memory(result), *(_of_time(result) if result["size"] == "1b" else ())]


def _of_memory(result: Mapping[str, Any]) -> Iterator[str]:
    if squeezed := result.get("squeezed"):
        if not squeezed["cuts"]:
            yield "memory was taken away, and the job never noticed"
        if squeezed["largest"] > LOSS_OFF:
            yield f"losses differ by {squeezed['largest']:.2%} once passes are cut smaller"
    tight = {side: one["largest_micro_batch"] for side, one in result.get("tight", {}).items()}
    if tight.get("job", 0) < tight.get("tutorial", 0):
        yield f"the job's largest micro-batch is {tight.get('job', 0)}, the tutorial's {tight['tutorial']}"


def _of_time(result: Mapping[str, Any]) -> Iterator[str]:
    adapter = {side: one.get("seconds") for side, one in result.get("adapter", {}).items()}
    ours, theirs = adapter.get("job"), adapter.get("tutorial")
    if ours and theirs and ours > theirs * ADAPTER_SHARE:
        yield f"the job needs {ours:.0f} s to an adapter, more than a third of the tutorial's {theirs:.0f} s"
    starts = result.get("speed", {}).get("job", {}).get("first_step_seconds", {})
    cold, warm = starts.get("cold"), starts.get("warm")
    if cold and warm and warm > cold * WARM_SHARE:
        yield f"the job's second start takes {warm:.0f} s to its first step, more than half of {cold:.0f} s"
