"""The numbers of a run that follow from its settings, its data and its model's size: optimizer steps, the learning rate
and its course. The arithmetic of `check`'s estimate and of training itself.

Shares are multiplied as the decimals that the user wrote: in binary, 1.1 x 100 is more than 110, and a step too many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal

from job.config.schema import Config
from job.runtime.errors import ConfigError

MOST_STEPS = 1_000_000_000
RATES = ((8_000_000_000, 2e-4), (14_000_000_000, 1e-4))
"""Learning rates that work for LoRA, by parameters: each holds below its bound. What is sold as 7B has up to 7.7
billion (InternLM2.5), as 8B from 8.0 (Llama 3), as 13B up to 13.9 (Baichuan2), as 14B from 14.2 (Qwen). Two are sold
under another number: Gemma 7B has 8.5 billion, and Phi-3-medium, 14B, has 13.96."""
RATE_ABOVE = 5e-5
_EXACT = Context(prec=80, rounding=ROUND_CEILING)
"""Enough digits for any float times any number of steps."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The steps of a run, and the micro-batches of each."""

    steps: int
    per_epoch: int
    """Steps in one epoch; the last of them may be smaller."""
    micro_batch: int
    gradient_accumulation: int
    """Micro-batches in a step."""
    warmup_steps: int

    @property
    def epochs(self) -> float:
        """Epochs in the whole run."""
        return self.steps / self.per_epoch


def schedule(config: Config, *, examples: int) -> Schedule:
    """Plan the steps for this many training sequences.

    Raises:
        ConfigError: the warm-up is as long as the run, or the run has more steps than anyone can make.
    """
    micro = config.rows_in_pass
    per_epoch = -(-examples // config.batch_size)
    steps = config.max_steps or max(1, share_of(per_epoch, config.epochs))
    if steps > MOST_STEPS:
        raise ConfigError(
            f"The run would have {Decimal(steps):.3g} optimizer steps; more than {MOST_STEPS:,} are not possible.",
            remedy="Lower TUNE_EPOCHS, or set TUNE_MAX_STEPS.",
        )
    return Schedule(
        steps=steps,
        per_epoch=per_epoch,
        micro_batch=micro,
        gradient_accumulation=-(-config.batch_size // micro),
        warmup_steps=_warmup_steps(config, steps),
    )


def share_of(whole: int, share: float) -> int:
    """A share of a whole, rounded up: 1.1 of 100 are 110. The share counts as the decimal that it is written as."""
    exact = _EXACT.multiply(Decimal(whole), Decimal(repr(share)))
    return int(exact.to_integral_value(ROUND_CEILING, _EXACT))


def _warmup_steps(config: Config, steps: int) -> int:
    """A number of steps must be less than the run has; a share below 1 always leaves the last step."""
    if config.schedule == "constant":
        return 0
    if config.warmup < 1:
        return min(share_of(steps, config.warmup), steps - 1)
    if config.warmup >= steps > 1:
        raise ConfigError(
            f"TUNE_WARMUP={config.warmup:g} is {config.warmup:.0f} steps, and the run has {steps}.",
            remedy="Lower the warm-up: the learning rate would never reach its value.",
        )
    return min(int(config.warmup), steps - 1)


def rate_factor(done: int, *, kind: str, steps: int, warmup_steps: int) -> float:
    """The part of the learning rate with which the next step is made: above 0 and at most 1 for each step of a run.

    With `s` steps done, of `n`, and `w` steps of warm-up: (s + 1) / (w + 1) while s < w, so that also the first step
    trains. From there on it is that of transformers (`get_linear_schedule_with_warmup`, `get_cosine_...`): `linear`
    (n - s) / (n - w), `cosine` (1 + cos(pi (s - w) / (n - w))) / 2, else 1. Transformers itself begins with s / w, so
    that its first step has rate 0.

    Args:
        done: steps done; 0 for the first.
        kind: TUNE_SCHEDULE.
        steps: of the whole run.
        warmup_steps: the whole rate is reached with the step after them.
    """
    if done < warmup_steps:
        return (done + 1) / (warmup_steps + 1)
    done, steps = min(done, steps) - warmup_steps, steps - warmup_steps
    if kind == "linear":
        return (steps - done) / steps
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done / steps))
    return 1.0


def usual_rate(parameters: int) -> float:
    """The usual LoRA learning rate for a model of this size."""
    return next((rate for bound, rate in RATES if parameters < bound), RATE_ABOVE)
