"""The numbers in a model's `config.json`: where a number belongs, there is one, and it is not absurd.

Transformers checks most types itself, but only once it is loaded, and lets some through; this is known before anything
is downloaded.
"""

from __future__ import annotations

import math
from typing import Any

from job.inputs.model_files import COPY_AGAIN
from job.runtime.errors import DataError

COUNTS = frozenset(("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"))
"""Whole numbers above 0."""
LAYER_COUNTS = frozenset(("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
"""The same, of which some models have one for each layer."""
REALS = frozenset(
    (
        *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "initializer_range", "attention_dropout"),
        *("rope_theta", "rope_local_base_freq", "factor", "low_freq_factor", "high_freq_factor", "attention_factor"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "partial_rotary_factor", "short_factor", "long_factor"),
    )
)
"""Other numbers, or lists of them."""
LARGEST = 1 << 31
DEEPEST = 32
"""Objects and lists inside each other; those of real models are less than 8 deep."""


def check_values(config: dict[str, Any], what: str) -> None:
    """Check every value whose name is known to be a number's, wherever it stands.

    Raises:
        DataError: one is something else, or the configuration is nested too deep; `what` names it.
    """
    if not isinstance(config.get("text_config") or {}, dict):
        raise DataError(f"{what} is not valid: text_config is not an object.", remedy=COPY_AGAIN)
    _check(config, what, depth=0)


def _check(value: Any, what: str, *, depth: int) -> None:
    if depth > DEEPEST:
        raise DataError(f"{what} is not valid: it is nested more than {DEEPEST} deep.", remedy=COPY_AGAIN)
    if isinstance(value, dict):
        for name, inner in value.items():
            if (name in COUNTS and not (inner is None or _is_count(inner))) or (
                name in LAYER_COUNTS and not _all(inner, _is_count)
            ):
                raise _wrong(name, inner, what, "a whole number above 0")
            if name in REALS and not _all(inner, _is_real):
                raise _wrong(name, inner, what, "a number")
            _check(inner, what, depth=depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check(inner, what, depth=depth + 1)


def _all(value: Any, is_right: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(is_right(one) for one in value)
    return value is None or is_right(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < LARGEST


def _is_real(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _wrong(name: str, value: Any, what: str, rule: str) -> DataError:
    shown = repr(value)
    shown = shown if len(shown) < 60 else f"{shown[:57]}..."  # noqa: PLR2004 - as much as a line of the message takes
    return DataError(f"{what} is not valid: {name}={shown} is not {rule}.", remedy=COPY_AGAIN)
