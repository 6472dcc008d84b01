"""One attempt at a run: the settings, and where it reads and writes what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from job.config.schema import Config
from job.observability.timeline import Timeline
from job.state.attempts import Attempts
from job.state.compile_cache.cache import CompileCache
from job.state.ledger import Ledger
from job.state.record import Record


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """One attempt at a run: the settings, and where it reads and writes what."""

    config: Config
    record: Record
    attempts: Attempts
    ledger: Ledger
    expect_gpu: bool
    scratch: Path
    work: Path
    timeline: Timeline
    cache: CompileCache
