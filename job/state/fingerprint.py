"""The identity of a run as one comparable table: the settings and the contents that decide its result.

A checkpoint has the fingerprint of the run that made it. Continued with another one, the result would be that of
neither run, so a difference is an error unless TUNE_ALLOW_CHANGE names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import structlog

from job.config.schema import CONTENTS, FIXED, Config
from job.inputs.model_files import CONFIG, TOKENIZER_FILES
from job.model.base_model import BaseModel
from job.runtime.errors import ConfigError
from job.runtime.hashing import combined, hashes, sha256

log = structlog.get_logger()
# Variables whose change also changes what is learned, and with it the contents' digests.
DECIDE_CONTENTS = frozenset(
    "TUNE_" + name
    for name in (
        *("MODEL", "DATASET", "EVAL_DATASET", "EVAL_FRACTION", "FORMAT"),
        *("CHAT_TEMPLATE", "TRAIN_ON", "ROLE_WEIGHTS", "MAX_LENGTH", "OVERLONG"),
    )
)


def settings(config: Config) -> dict[str, Any]:
    """The part that is known before anything is read, as JSON represents it."""
    found: dict[str, Any] = json.loads(json.dumps(config.fingerprint_fields()))
    return found


def fingerprint(
    config: Config, base: BaseModel, base_hashes: Mapping[str, str], *, template: str, training_data: str
) -> dict[str, Any]:
    """The fingerprint of a run.

    Args:
        base_hashes: SHA-256 of the files of weights, by name.
        template: the chat template's text.
        training_data: digest of the rendered training set, in order.
    """
    files = [path for name in sorted(TOKENIZER_FILES) if (path := base.path / name).exists()]
    tokenizer = {path.name: digest for path, digest in hashes(files).items()} | {"template": template}
    contents = {
        "base_weights": combined(base_hashes),
        "model_config": sha256(base.path / CONFIG),
        "tokenizer": combined(tokenizer),
        "training_data": training_data,
    }
    return settings(config) | contents


def weights(base: BaseModel) -> dict[str, str]:
    """SHA-256 of the files of weights, by name. Takes about a second per one or two gigabytes."""
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

    Only names that both have are compared, so that settings can be checked before anything is read.

    Args:
        run_id: for the message.
        before: the earlier fingerprint.
        now: the present one.
        allowed: names that may differ (`TUNE_ALLOW_CHANGE`).
        finished: whether the run is complete, so that there is no checkpoint to continue from.

    Returns:
        the names that differ and may.

    Raises:
        ConfigError: other names differ; it lists them.
    """
    changed = [name for name in now if name in before and before[name] != now[name]]
    permitted = set(allowed)
    if permitted & DECIDE_CONTENTS & set(changed):
        permitted |= set(CONTENTS)
    rejected = [name for name in changed if name not in permitted]
    if rejected:
        can_be_allowed = not (finished or set(rejected) & set(FIXED))
        allow = (
            f"; TUNE_ALLOW_CHANGE={','.join(rejected)} continues from its checkpoint anyway" if can_be_allowed else ""
        )
        raise ConfigError(
            f"Run {run_id} was started with other settings or contents.",
            remedy="Restore the old ones, or set another TUNE_RUN_ID for the new ones; TUNE_RESUME=fresh starts "
            f"this run over{allow}.",
            problems=[f"{name} was {before[name]!r}, is {now[name]!r}" for name in rejected],
        )
    return changed


def contents_may_change(allowed: tuple[str, ...]) -> bool:
    """Whether these names (`TUNE_ALLOW_CHANGE`) let the run continue with other files than it started with."""
    return bool(set(allowed) & (DECIDE_CONTENTS | {"training_data", "base_weights", "model_config"}))
