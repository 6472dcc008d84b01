"""What the stages hand to each other: one attempt at a run, what it trains on, and the model in memory.

`Finetune` and `TrainingStack` are the seam to `job.tuning`, which is imported late because it takes seconds: they say
what the stages use of it, and nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from job.config.schema import Config
from job.data.prepare import Data
from job.data.rendering.renderer import Prompt
from job.inputs.pull import Inputs
from job.model.base_model import BaseModel
from job.observability.timeline import Timeline
from job.state.attempts import Attempts
from job.state.compile_cache.cache import CompileCache
from job.state.ledger import Ledger
from job.state.publication import Publication
from job.state.record import Record
from job.tuning.hooks import Hooks


@dataclass(frozen=True, kw_only=True)
class RunOutput:
    """What a run keeps in its output, before an attempt is claimed and after."""

    record: Record
    attempts: Attempts
    ledger: Ledger
    publication: Publication


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """One attempt at a run: the settings, and where it reads and writes what."""

    config: Config
    record: Record
    attempts: Attempts
    ledger: Ledger
    publication: Publication
    scratch: Path
    """Downloads and caches, which the next attempt on this machine finds again."""
    work: Path
    """This attempt's own directory, which ends with it."""
    timeline: Timeline
    cache: CompileCache


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """What is trained, on what: complete and on this disk."""

    inputs: Inputs
    base: BaseModel
    base_hashes: dict[str, str]
    """SHA-256 of the files of weights, by name."""
    data: Data
    fingerprint: dict[str, Any]


class Plan(Protocol):
    """How the optimizer steps are made (`job.tuning.fit.plan`)."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        ...


class Evaluation(Protocol):
    """The result of one evaluation (`job.tuning.evaluate`)."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats over the labelled tokens."""
        ...

    @property
    def perplexity(self) -> float | None:
        """exp(loss); None where that overflows."""
        ...

    @property
    def tokens(self) -> int:
        """Labelled tokens."""
        ...


class Finetune(Protocol):
    """A loaded model and the plan for training it (`job.tuning.finetune.Finetune`)."""

    @classmethod
    def load(
        cls, base: BaseModel, config: Config, data: Data, *, directory: Path, earlier: dict[str, Any] | None
    ) -> Finetune:
        """Load the weights, add the adapter, make the plan.

        Args:
            directory: this attempt's own.
            earlier: `reproducibility_facts` that an earlier attempt recorded.
        """
        ...

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        ...

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        ...

    @property
    def planning_seconds(self) -> float:
        """How long the search for the micro-batch took."""
        ...

    def reproducibility_facts(self) -> dict[str, Any]:
        """What must be the same for a resumed run to continue bit for bit, and what was asked for."""
        ...

    def train(self, hooks: Hooks, *, resume_from: tuple[Path, int] | None, changed: bool) -> None:
        """All optimizer steps that are left."""
        ...

    def evaluate(self, dataset: Any) -> Evaluation:
        """The loss on other rows."""
        ...

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy answers to prompts."""
        ...

    def save_adapter(self, directory: Path, *, base: BaseModel) -> None:
        """Write the adapter and its tokenizer."""
        ...

    def merge(self, adapter: Path, directory: Path, *, base: BaseModel) -> None:
        """Write base + adapter in 16 bit."""
        ...

    def memory_report(self) -> dict[str, Any]:
        """Memory before the run and at its peak."""
        ...


class TrainingStack(Protocol):
    """The module `job.tuning.finetune`."""

    @property
    def Finetune(self) -> type[Finetune]:  # noqa: N802 - the module's name for its class
        """What loads a model."""
        ...

    def check_checkpoint(self, directory: Path, body: dict[str, Any]) -> None:
        """Check that the parts of a downloaded checkpoint agree; raises DamagedError if not."""
        ...
