"""What a run is, in one comparable table: the settings and the contents that decide its result.

A checkpoint carries the fingerprint of the run that made it. Another one would go on as something that neither run
was, so a difference is refused unless the user names it in TUNE_ALLOW_CHANGE.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import structlog

from job.config.schema import CONTENTS, FIXED, Config
from job.model.base_model import BaseModel
from job.runtime.errors import ConfigError
from job.runtime.hashing import combined, hashes, sha256

log = structlog.get_logger()
TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
# Variables whose change also changes what is learned, and so the contents' digests.
DECIDE_CONTENTS = frozenset(
    "TUNE_" + name
    for name in (
        *("MODEL", "DATASET", "EVAL_DATASET", "EVAL_FRACTION", "FORMAT"),
        *("CHAT_TEMPLATE", "TRAIN_ON", "ROLE_WEIGHTS", "MAX_LENGTH", "OVERLONG"),
    )
)


def settings(config: Config) -> dict[str, Any]:
    """The part that is known before anything is read, as JSON holds it."""
    found: dict[str, Any] = json.loads(json.dumps(config.fingerprint_fields()))
    return found


def fingerprint(
    config: Config, base: BaseModel, base_hashes: Mapping[str, str], *, template: str, training_data: str
) -> dict[str, Any]:
    """The whole table.

    Args:
        base_hashes: SHA-256 of the files of weights, by name.
        template: the chat template's text.
        training_data: digest of the rendered training set, in order.
    """
    files = sorted({path for pattern in TOKENIZER_FILES for path in base.path.glob(pattern) if path.is_file()})
    tokenizer = {path.name: digest for path, digest in hashes(files).items()} | {"template": template}
    contents = {
        "base_weights": combined(base_hashes),
        "model_config": sha256(base.path / "config.json"),
        "tokenizer": combined(tokenizer),
        "training_data": training_data,
    }
    return settings(config) | contents


def weights(base: BaseModel) -> dict[str, str]:
    """SHA-256 of the files of weights, by name. Takes a second for each gigabyte or two."""
    return {path.name: digest for path, digest in hashes(list(base.weights)).items()}


def check(
    run_id: str,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    allowed: tuple[str, ...],
    finished: bool = False,
) -> list[str]:
    """Compare with the fingerprint of a checkpoint, or of the run's first attempt.

    Only what both have is compared, so that settings can be checked before anything was read.

    Args:
        finished: whether there is nothing left to go on with.

    Returns:
        the names that differ and may.

    Raises:
        ConfigError: others differ; it lists them.
    """
    changed = [name for name in now if name in before and before[name] != now[name]]
    may = set(allowed)
    if may & DECIDE_CONTENTS & set(changed):
        may |= set(CONTENTS)
    refused = [name for name in changed if name not in may]
    if refused:
        fits = not (finished or set(refused) & set(FIXED))
        insist = f"; TUNE_ALLOW_CHANGE={','.join(refused)} goes on from its checkpoint all the same" if fits else ""
        raise ConfigError(
            f"Run {run_id} was started with other settings or contents.",
            remedy="Restore the old ones, or set another TUNE_RUN_ID for the new ones; TUNE_RESUME=fresh sets the old "
            f"run aside{insist}.",
            problems=[f"{name} was {before[name]!r}, is {now[name]!r}" for name in refused],
        )
    return changed


def contents_may_change(config: Config) -> bool:
    """Whether the user lets the run go on with other files than it began with."""
    return bool(set(config.allow_change) & (DECIDE_CONTENTS | {"training_data", "base_weights", "model_config"}))
