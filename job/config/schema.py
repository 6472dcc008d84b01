"""A run's settings, and what is valid: one frozen dataclass whose fields are the table of variables.

Each field of `Config` carries its kind, its rule and its meaning. The parser (`job.config.environment`), `python -m job
variables`, docs/configuration.md and the chart's schema are all generated from these fields, so a variable exists once.
Nothing here reads the environment.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from job.config import role_weights as roles
from job.config.addresses import DATA, MODEL, PLACE, TEMPLATE
from job.config.field import PREFIX, Setting, setting
from job.config.value_types import MOST, auto_or, choice, flag, integer, names, number, text

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
TARGET = re.compile(r"[A-Za-z_][\w.-]*")
EXPORTS = ("adapter", "merged_16bit")
CONTENTS = ("base_weights", "model_config", "tokenizer", "training_data")
"""What is part of a run's fingerprint besides its variables."""
FIXED = ("TUNE_LORA_R", "TUNE_LORA_TARGETS", "TUNE_PRECISION")
"""Variables that fix the shapes of a checkpoint's tensors, so that it cannot be used with other values."""
COLUMNS = (
    "messages", "conversations", "instruction", "input", "output", "prompt", "completion", "question", "answer", "text",
    "system", "history", "tools",
)  # fmt: skip
"""This job's names for the columns of all formats."""
AUTO_MICRO_BATCH = 8
MOST_MINUTES = 1_000_000
"""Two years: longer times are too large for the system's timers."""
FORMATS = ("messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "text")


_RUN = text(RUN_ID, "letters, digits, '.', '_' and '-', at most 128, starting with a letter or digit")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run's settings, in the order of the table in docs/configuration.md."""

    model: str = setting(MODEL, "base model", fingerprint=True)
    dataset: tuple[str, ...] = setting(
        names(DATA, DATA.rule), "training data: objects, prefixes, paths or hub names", fingerprint=True
    )
    output: str = setting(PLACE, "a run writes under `<output>/<run id>/`, and `<output>/latest.json`")
    run_id: str | None = setting(
        _RUN, "run id; none = a hash of the variables marked * (which decide the result)", default=None
    )
    device: Literal["auto", "cuda", "cpu"] = setting(
        choice("auto", "cuda", "cpu"),
        "`auto` = a GPU if there is one, else the CPU; `cuda` fails without a GPU",
        default="auto",
    )
    eval_dataset: tuple[str, ...] = setting(
        names(DATA, DATA.rule),
        "separate evaluation dataset; none = files of the dataset that are called so, or else a share of its rows",
        default=(),
        fingerprint=True,
    )
    eval_fraction: float = setting(
        number(0, 0.5),
        "share of rows held out for evaluation, chosen by content so that duplicates stay on one side; 0 = none",
        default=0.05,
        fingerprint=True,
    )
    format: str = setting(
        choice("auto", *FORMATS), "format of the rows; `auto` detects it per file", default="auto", fingerprint=True
    )
    columns: tuple[str, ...] = setting(
        names(
            text(
                rf"(?:{'|'.join(COLUMNS)})=.+", f"our name=your column, where our name is one of {', '.join(COLUMNS)}"
            ),
            f"our name=your column, separated by commas; our name is one of {', '.join(COLUMNS)}",
        ),
        "columns under other names, as in `prompt=question,completion=reply.text` (a dot reaches into a column)",
        default=(),
        fingerprint=True,
    )
    quality: Literal["warn", "fail", "off"] = setting(
        choice("warn", "fail", "off"),
        "what to do about duplicates, leaks into the evaluation data, secrets, garbage and similar findings: `fail` "
        "ends the run if some are grave, `off` does not look for them",
        default="warn",
    )
    chat_template: str = setting(
        TEMPLATE,
        "`tokenizer` = the model's own; or a name (`chatml`, `llama-3.1`, ...); or a Jinja file's URI",
        default="tokenizer",
        fingerprint=True,
    )
    train_on: Literal["responses", "last_response", "all"] = setting(
        choice("responses", "last_response", "all"),
        "tokens that count in the loss",
        default="responses",
        fingerprint=True,
    )
    role_weights: tuple[str, ...] = setting(
        names(text(roles.PAIR, "role=weight"), roles.RULE),
        "how much each role's tokens count in the loss; a role that is not named counts 0; none = assistant=1",
        default=(),
        fingerprint=True,
    )
    max_length: int = setting(integer(8), "maximum tokens per example", default=2048, fingerprint=True)
    overlong: Literal["truncate", "drop", "fail"] = setting(
        choice("truncate", "drop", "fail"),
        "what happens to longer examples; always counted and reported",
        default="truncate",
        fingerprint=True,
    )
    precision: Literal["4bit", "8bit", "16bit"] = setting(
        choice("4bit", "8bit", "16bit"), "base weights: NF4, LLM.int8, or 16 bit", default="4bit", fingerprint=True
    )
    lora_r: int = setting(integer(1), "LoRA rank", default=16, fingerprint=True)
    lora_alpha: int = setting(integer(1), "LoRA alpha, the adapter's scale", default=16, fingerprint=True)
    lora_dropout: float = setting(number(0, 0.9), "LoRA dropout", default=0.0, fingerprint=True)
    lora_targets: tuple[str, ...] = setting(
        names(text(TARGET, "module names"), "module names separated by commas"),
        "layers that get an adapter; a name that matches nothing is an error",
        default=("all-linear",),
        fingerprint=True,
    )
    lora_rslora: bool = setting(flag(), "rank-stabilised scaling", default=False, fingerprint=True)
    epochs: float = setting(number(0, 1_000_000, exclusive=True), "epochs of training", default=3.0, fingerprint=True)
    max_steps: int | None = setting(
        integer(1), "maximum optimizer steps; overrides `TUNE_EPOCHS`", default=None, fingerprint=True
    )
    curriculum: Literal["none", "short_first"] = setting(
        choice("none", "short_first"),
        "order of the first epoch: `short_first` = by length; later epochs are always shuffled",
        default="none",
        fingerprint=True,
    )
    batch_size: int = setting(
        integer(1), "examples per optimizer step; never changed to fit memory", default=8, fingerprint=True
    )
    micro_batch: int | Literal["auto"] = setting(
        auto_or(integer(1)),
        "sequences per micro-batch; gradient accumulation completes the batch; `auto` = as many as fit, measured on "
        "the GPU (on a CPU: 8)",
        default="auto",
    )
    batching: Literal["auto", "padded", "padding_free", "packed"] = setting(
        choice("auto", "padded", "padding_free", "packed"),
        "layout of a micro-batch: `padded` to the longest sequence; `padding_free` = sequences one after the other; "
        "`packed` = the same, filled by tokens; `auto` = `packed` on a GPU if Unsloth supports it, else `padded`",
        default="auto",
    )
    learning_rate: float | Literal["auto"] = setting(
        auto_or(number(0, 1, exclusive=True)),
        "`auto` by parameters: below 8 billion 2e-4 (sold as 7B and smaller), below 14 billion 1e-4 (8B to 13B), from "
        "there on 5e-5",
        default="auto",
        fingerprint=True,
    )
    warmup: float = setting(
        number(0, MOST),
        "warm-up of the learning rate: below 1 a share of the steps, else a number of steps; the first step already "
        "trains (docs/configuration.md)",
        default=0.03,
        fingerprint=True,
    )
    schedule: str = setting(
        choice("linear", "cosine", "constant", "constant_with_warmup"),
        "learning-rate schedule",
        default="linear",
        fingerprint=True,
    )
    weight_decay: float = setting(number(0, 1), "AdamW weight decay", default=0.01, fingerprint=True)
    optimizer: str = setting(
        choice("adamw_8bit", "adamw_torch", "adamw_torch_fused", "paged_adamw_8bit", "paged_adamw_32bit"),
        "optimizer; on a CPU always fused AdamW (logged in the plan)",
        default="adamw_8bit",
        fingerprint=True,
    )
    max_grad_norm: float = setting(number(0), "gradient clipping; 0 = off", default=1.0, fingerprint=True)
    seed: int = setting(
        integer(0, 2**32 - 1), "seed of adapter initialisation, data order and dropout", default=3407, fingerprint=True
    )
    gradient_checkpointing: Literal["auto", "unsloth", "on", "off"] = setting(
        choice("auto", "unsloth", "on", "off"),
        "recompute activations to save memory; `auto` = `off` where memory allows, else `unsloth`",
        default="auto",
    )
    deterministic: bool = setting(
        flag(),
        "use only kernels that repeat bit for bit, and fail where there is none; slower, and most settings repeat "
        "without it (docs/resume.md)",
        default=False,
    )
    eval_steps: int | Literal["auto"] = setting(
        auto_or(integer(1)),
        "optimizer steps between evaluations; `auto` = ten over the run, fewer if evaluation is expensive",
        default="auto",
    )
    samples: int = setting(integer(0), "held-out prompts answered before and after training", default=4)
    checkpoint_minutes: float = setting(
        number(0, MOST_MINUTES, exclusive=True), "maximum minutes between checkpoints", default=10.0
    )
    checkpoint_steps: int | None = setting(
        integer(1),
        "maximum optimizer steps between checkpoints; never more than a quarter of the run; whichever comes first",
        default=None,
    )
    checkpoint_keep: int = setting(integer(1), "number of checkpoints whose files are kept", default=2)
    resume: Literal["auto", "fresh", "require"] = setting(
        choice("auto", "fresh", "require"),
        "`auto` continues where the run stopped; `require` fails without a checkpoint; `fresh` starts over at every "
        "start; the old result stays until the new one is published",
        default="auto",
    )
    allow_change: tuple[str, ...] = setting(
        names(
            text(rf"{PREFIX}[A-Z_]+|{'|'.join(CONTENTS)}", "a variable marked *, or " + ", ".join(CONTENTS)),
            "variables marked *, or any of " + ", ".join(CONTENTS) + ", separated by commas",
        ),
        "what may differ from the checkpoint on resume; any other difference is rejected",
        default=(),
    )
    fencing: Literal["auto", "require"] = setting(
        choice("auto", "require"),
        "`require` rejects a store without conditional writes; `auto` warns and reads back what it wrote",
        default="auto",
    )
    grace_seconds: float = setting(
        number(2, 60 * MOST_MINUTES),
        "seconds between the platform's signal and SIGKILL; the run ends within them",
        default=15.0,
    )
    storage_patience_minutes: float = setting(
        number(0, MOST_MINUTES),
        "how long an unreachable store is retried before the run ends with code 74",
        default=60.0,
    )
    export: tuple[str, ...] = setting(
        names(choice(*EXPORTS), "any of " + ", ".join(EXPORTS) + ", separated by commas"),
        "artifacts to publish; the adapter always is one",
        default=("adapter",),
    )
    cache: str | None = setting(
        PLACE,
        "where compile caches are kept between runs; anyone who can write there can run code in the job: protect it "
        "like the image",
        default=None,
    )
    log_format: Literal["auto", "json", "text"] = setting(
        choice("auto", "json", "text"), "`auto` = text on a terminal, else JSON lines", default="auto"
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        choice("debug", "info", "warning", "error"), "minimum log level", default="info"
    )
    log_steps: int = setting(integer(1), "optimizer steps between `train_progress` events", default=1)
    metrics_port: int | None = setting(
        integer(1024, 65535),
        "port of the metrics endpoint for Prometheus, `/metrics`, for as long as the run lasts",
        default=None,
    )

    @property
    def rows_in_pass(self) -> int:
        """`TUNE_MICRO_BATCH`, with `auto` decided."""
        if self.micro_batch != "auto":
            return self.micro_batch
        return min(self.batch_size, AUTO_MICRO_BATCH)

    def fingerprint_fields(self) -> dict[str, Any]:
        """The settings that decide the result, by variable name."""
        return {s.variable: getattr(self, s.name) for s in SETTINGS if s.fingerprint}

    def identity(self) -> str:
        """The run id: the user's, or 12 hex digits of the SHA-256 of the settings that decide the result.

        Those at their defaults are left out, so that a later version with another variable gives a run the same id.
        """
        if self.run_id is not None:
            return self.run_id
        defaults = {s.variable: s.default for s in SETTINGS}
        chosen = {name: value for name, value in self.fingerprint_fields().items() if value != defaults[name]}
        canonical = json.dumps(chosen, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def as_variables(self) -> dict[str, Any]:
        """All settings by variable name, JSON-able, for records and logs. Secrets are never settings."""
        return {s.variable: getattr(self, s.name) for s in SETTINGS}


def _table() -> tuple[Setting, ...]:
    return tuple(
        Setting(
            name=field.name,
            kind=field.metadata["kind"],
            default=None if field.default is dataclasses.MISSING else field.default,
            required=field.default is dataclasses.MISSING,
            meaning=field.metadata["meaning"],
            fingerprint=field.metadata["fingerprint"],
        )
        for field in dataclasses.fields(Config)
    )


SETTINGS: tuple[Setting, ...] = _table()
