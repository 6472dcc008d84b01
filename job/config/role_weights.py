"""TUNE_ROLE_WEIGHTS: how much the tokens of each role count in the loss, and which combinations are valid.

Knows words and numbers; nothing of templates or tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ROLES = ("system", "developer", "user", "assistant", "tool")
PAIR = rf"({'|'.join(ROLES)})=([0-9]+(\.[0-9]*)?|\.[0-9]+)"
RULE = f"role=weight separated by commas, such as assistant=1,tool=0.2; roles are {', '.join(ROLES)}"


def by_role(pairs: Sequence[str]) -> dict[str, float]:
    """Weight by role, as it was written."""
    return {role: float(weight) for role, _, weight in (pair.partition("=") for pair in pairs)}


def learned(pairs: Sequence[str]) -> dict[str, float]:
    """The roles that are learned at all, by weight; all 1 where they weigh the same, since only ratios count."""
    found = {role: weight for role, weight in by_role(pairs).items() if weight > 0}
    return found if differ(found) else dict.fromkeys(found, 1.0)


def differ(weights: Mapping[str, float]) -> bool:
    """Whether they are more than a mask."""
    return len(set(weights.values())) > 1


def held_out(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights of the evaluation loss: the answers alone, so that runs with other weights can be compared; where
    answers are not learned, the roles that are, each token alike."""
    return {"assistant": 1.0} if "assistant" in weights else dict.fromkeys(weights, 1.0)


def problems(pairs: Sequence[str], *, train_on: str, rows: str) -> list[str]:
    """Rules between the pairs, and with TUNE_TRAIN_ON and TUNE_FORMAT."""
    if not pairs:
        return []
    value = ",".join(pairs)
    weights = by_role(pairs)
    found = []
    if len(weights) < len(pairs):
        found.append(f"TUNE_ROLE_WEIGHTS={value} contains a role twice. Give each role one weight.")
    if "assistant" not in weights:
        found.append(
            f"TUNE_ROLE_WEIGHTS={value} has no weight for answers. Add assistant=1, or assistant=0 to learn none."
        )
    if not any(weights.values()):
        found.append(f"TUNE_ROLE_WEIGHTS={value} leaves nothing to learn. Give a role a weight above 0.")
    if train_on != "responses":
        found.append(
            f"TUNE_ROLE_WEIGHTS={value} and TUNE_TRAIN_ON={train_on} both select what is learned. "
            "Set TUNE_TRAIN_ON=responses, or remove the weights."
        )
    if rows == "text":
        found.append(f"TUNE_ROLE_WEIGHTS={value} needs roles, and TUNE_FORMAT=text has none. Remove the weights.")
    return found
