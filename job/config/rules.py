"""Rules between variables."""

from __future__ import annotations

import re
from collections.abc import Sequence

from job.config import role_weights
from job.config.schema import CONTENTS, FIXED, SETTINGS, Config

RESERVED = re.compile(r"latest\.json|preflight-.*", re.IGNORECASE)
"""What a run or a check writes beside the folders of runs, on disks that ignore case, too."""
FLAT = ("padding_free", "packed")
"""Values of TUNE_BATCHING that need a GPU."""


def problems(config: Config) -> list[str]:
    """Violations of rules between variables: each with the values, the rule and the remedy."""
    found = []
    if config.micro_batch != "auto" and config.micro_batch > config.batch_size:
        found.append(
            f"TUNE_MICRO_BATCH={config.micro_batch} is more than TUNE_BATCH_SIZE={config.batch_size}. "
            "Lower it: a micro-batch is a part of the batch."
        )
    if config.batching in FLAT and config.device == "cpu":
        found.append(
            f"TUNE_BATCHING={config.batching} needs a GPU, and TUNE_DEVICE=cpu. Set TUNE_BATCHING=auto or padded."
        )
    if config.warmup >= 1 and config.warmup != int(config.warmup):
        found.append(
            f"TUNE_WARMUP={config.warmup:g} is neither a share below 1 nor a whole number of steps. "
            f"Write {int(config.warmup)} for steps or {config.warmup / 100:g} for a share."
        )
    if config.max_steps is not None and config.warmup >= config.max_steps and config.warmup >= 1:
        found.append(
            f"TUNE_WARMUP={config.warmup:g} steps are not fewer than TUNE_MAX_STEPS={config.max_steps}. "
            "The learning rate would never reach its value: lower the warm-up."
        )
    if config.device == "cpu" and config.precision == "8bit":
        found.append("TUNE_PRECISION=8bit needs a GPU, and TUNE_DEVICE=cpu asks for none. Use 4bit or 16bit.")
    if config.metrics_port is not None and config.log_level not in ("debug", "info"):
        found.append(
            f"TUNE_METRICS_PORT={config.metrics_port} takes its numbers from log events of level info, which "
            f"TUNE_LOG_LEVEL={config.log_level} drops. Set TUNE_LOG_LEVEL=info."
        )
    if config.run_id is not None and RESERVED.fullmatch(config.run_id):
        found.append(
            f"TUNE_RUN_ID={config.run_id!r} is the name of an object that lies among an output's runs. Use another."
        )
    found += _doubled_columns(config.columns)
    found += role_weights.problems(config.role_weights, train_on=config.train_on, rows=config.format)
    return found + _unchangeable(config.allow_change)


def _unchangeable(names: Sequence[str]) -> list[str]:
    found = []
    marked = {s.variable for s in SETTINGS if s.fingerprint}
    for name in names:
        if name in FIXED:
            found.append(
                f"TUNE_ALLOW_CHANGE contains {name}, but a checkpoint fits one value of it only. Set a new TUNE_RUN_ID."
            )
        elif name not in marked and name not in CONTENTS:
            found.append(
                f"TUNE_ALLOW_CHANGE contains {name}, on which no checkpoint depends. Use variables marked * in "
                "`python -m job variables`, or " + ", ".join(CONTENTS) + "."
            )
    return found


def _doubled_columns(columns: Sequence[str]) -> list[str]:
    pairs = [pair.partition("=") for pair in columns]
    sides = [ours for ours, _, _ in pairs], [theirs for _, _, theirs in pairs]
    twice = [name for side in sides for name in dict.fromkeys(side) if side.count(name) > 1]
    return [f"TUNE_COLUMNS contains {name!r} twice. Use each column once." for name in twice]
