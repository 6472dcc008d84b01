"""Keys of rows and messages that change what other trainers learn: each is followed or rejected, all others are listed.

Knows keys and what they mean elsewhere; nothing of roles. Sources: `weight` (OpenAI's fine-tuning files,
mistral-finetune), `train`, `training`, `train_detail`, `train_on_turn` (axolotl), `loss`, `loss_scale` (ms-swift),
`loss_weight`, `kto_tag` and `images` (LLaMA-Factory), `trainable` and `loss_mask` (verl), `masked` (torchtune), `mask`
(NeMo), `completion_mask`, `assistant_masks`, `chat_template_kwargs`, `label` and `image` (TRL), `channel` (OpenAI's
harmony), `prefix` and `partial` (Mistral's, DeepSeek's and Moonshot's APIs), `documents` (transformers' templates).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

from job.data.examples import JsonObject
from job.data.reading.fields import Fields, InvalidError, quoted, value_of
from job.observability.masking import shown

LEARNED = (
    "weight",
    "train",
    "training",
    "trainable",
    "loss",
    "loss_weight",
    "loss_mask",
    "loss_scale",
    "train_on_turn",
)
"""Marks of a message: 1 or true if it is learned, 0 or false if it is context only."""
MASKED = ("masked",)
"""The same the other way round."""
UNCLEAR = ("mask", "ignore", "ignored")
"""Marks whose meaning depends on the tool: context only, learned, or not even seen."""
USERS = frozenset({"user", "human", ""})
PARTIAL = ("train_detail", "training_detail")
CONTINUED = ("prefix", "partial")
"""By which the APIs of some models mark an answer that they continue."""
MARKS = frozenset({*LEARNED, *MASKED, *UNCLEAR, *PARTIAL, *CONTINUED})
MEDIA = tuple(
    f"{kind}{ending}"
    for kind in ("image", "video", "audio")
    for ending in ("", "s", "_url", "_urls", "_path", "_paths")
)
TOOLS = ("tools", "functions")

UNDESIRED = ("label", "kto_tag")
"""Booleans by which TRL and LLaMA-Factory mark a bad answer, for preference training (KTO)."""
EXCLUDED = ("train", "training", "trainable", "loss", "loss_mask", "train_on_turn")
"""Booleans by which other tools exclude a row."""
WEIGHTS = ("weight", "loss_weight", "loss_scale", "sample_weight")
PER_TOKEN = ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask")
CHECKED = frozenset({*UNDESIRED, *EXCLUDED, *WEIGHTS, *MASKED})
"""Columns that are followed if they hold a number or a boolean."""
CONVERSATIONS = ("messages", "sharegpt")
RENAME = "Remove these rows, or rename the column if it means something else."
NONE: tuple[Any, ...] = (None, "", [], {}, False)


def learned_mark(message: JsonObject, where: str) -> bool | None:
    """Whether a message is marked as learned or as context only; None if it has no mark.

    Raises InvalidError for marks that contradict each other, or that cannot be followed.
    """
    if MARKS.isdisjoint(message):
        return None
    _check_whole(message, where)
    found = {key: _mark(message, key, where) for key in (*LEARNED, *MASKED) if value_of(message, key) is not None}
    if len(set(found.values())) > 1:
        raise InvalidError(f"{where}{quoted(list(found))} contradict each other", remedy="Keep one of them.")
    return next(iter(found.values())) if found else None


def _check_whole(message: JsonObject, where: str) -> None:
    for key in PARTIAL:
        if value_of(message, key) is not None:
            raise _partial(key, where)
    _check_clear(message, where)
    if continued := [key for key in CONTINUED if message.get(key) not in NONE]:
        raise InvalidError(
            f"{where}`{continued[0]}` marks the beginning of an answer, which has no end to learn",
            remedy="Write the whole answer and remove the mark, or remove these rows.",
        )


def _check_clear(fields: Fields, where: str) -> None:
    """`ignore`: false says nothing in any tool, `mask`: "User" says what is done anyway; `mask`: 0 may say either."""
    for key in UNCLEAR:
        value = value_of(fields, key)
        if value is None or (value in NONE and key != "mask") or (isinstance(value, str) and value.lower() in USERS):
            continue
        raise InvalidError(
            f"{where}`{key}` is {shown(repr(value))}, which tools read in opposite ways",
            remedy="Write `train`: true (learn the message) or `train`: false (context only) into the messages in its "
            "place, or rename it if it means something else.",
        )


def _mark(message: JsonObject, key: str, where: str) -> bool:
    value = message[key]
    if isinstance(value, list | dict):
        raise _partial(key, where)
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise InvalidError(
            f"{where}`{key}` is {shown(repr(value))}, which is neither 0 nor 1",
            remedy="Write 1 (learn the message) or 0 (context only): a message is learned whole or not at all.",
        )
    return bool(value) is not (key in MASKED)


def _partial(key: str, where: str) -> InvalidError:
    return InvalidError(
        f"{where}`{key}` marks parts of a message, but a message is learned whole or not at all",
        remedy="Remove it, or mark the whole message by `train`: true or false.",
    )


def check_message(message: JsonObject, where: str) -> None:
    """Raise InvalidError for what a message carries besides text and calls, and would be lost."""
    if lost := [key for key in MEDIA if message.get(key) not in NONE]:
        raise InvalidError(
            f"{where}the message has {quoted(lost)}; only text is trained on", remedy="Remove these rows, or the field."
        )
    if lost := [key for key in TOOLS if message.get(key) not in NONE]:
        raise InvalidError(
            f"{where}{quoted(lost)} inside a message, where templates are not given them",
            remedy="Move them to the row: the column `tools` beside `messages`.",
        )
    if (channel := value_of(message, "channel")) not in ("", None, "final"):
        raise InvalidError(
            f"{where}its channel is {shown(repr(channel))}, and only `final` is an answer",
            remedy="Write reasoning into the answer's `reasoning_content`, and a call into its `tool_calls`.",
        )


def check_part(part: JsonObject, where: str) -> None:
    """Raise InvalidError for a part of a message that is marked as context only."""
    for key in (*LEARNED, *MASKED, *UNCLEAR):
        if key in part and (key in UNCLEAR or not _mark(part, key, where)):
            raise _partial(key, where)


def check_row(row: Fields, format: str) -> None:  # noqa: A002 - the domain's word
    """Raise InvalidError for columns that change the row's meaning in other tools: without them the job would silently
    train on something else."""
    if format != "text":  # a text may have a label or a picture of any kind, and is learned as it is
        _check_answer(row, format)
    if lost := [key for key in EXCLUDED if number(row, key) == 0] or [key for key in MASKED if number(row, key) == 1]:
        word = "true" if lost[0] in MASKED else "false"
        raise InvalidError(f"{quoted(lost)} is {word}, which marks a row that is not learned", remedy=RENAME)
    if lost := [key for key in WEIGHTS if number(row, key) not in (None, 1)]:
        raise InvalidError(
            f"the row has {quoted(lost)} {shown(repr(row[lost[0]]))}, and rows are not weighted",
            remedy="Remove rows that should not count, and the column; or rename it if it means something else.",
        )
    if lost := [key for key in PER_TOKEN if isinstance(row.get(key), list)]:
        raise InvalidError(
            f"the row has {quoted(lost)}, a mark for each token; labels follow from the chat template",
            remedy="Mark whole messages by `train`: true or false, or remove the column.",
        )


def _check_answer(row: Fields, format: str) -> None:  # noqa: A002 - the domain's word
    _check_clear(row, "")
    if lost := [key for key in MEDIA if row.get(key) not in NONE and value_of(row, key) is not None]:
        raise InvalidError(
            f"the row has {quoted(lost)}; only text is trained on", remedy="Remove these rows, or the column."
        )
    if lost := [key for key in UNDESIRED if number(row, key) == 0]:
        raise InvalidError(
            f"{quoted(lost)} is false, which marks an answer that is not wanted; preferences are not trained on",
            remedy=RENAME,
        )
    given = ("chat_template_kwargs", *(("documents",) if format in CONVERSATIONS else ()))
    if lost := [key for key in given if row.get(key) not in NONE and value_of(row, key) is not None]:
        raise InvalidError(
            f"the row has {quoted(lost)}, but templates are given messages and tools only",
            remedy="Write into the messages what the answer needs, and remove the column.",
        )


def number(row: Fields, key: str) -> float | None:
    """The number or boolean in a column, also one written as text, as CSV files do; None for any other value."""
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, str):
        value = {"false": "0", "true": "1"}.get(value.strip().lower(), value)
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(found) else found


def unread_columns(row: Fields, read: Collection[str]) -> Iterator[str]:
    """The columns with a value that nothing reads."""
    for key in row:
        if key not in read and value_of(row, key) is not None and not (key in CHECKED and number(row, key) is not None):
            yield key


def unread_keys(message: JsonObject, read: Collection[str], content: str) -> Iterator[str]:
    """The keys of a message, and of the parts of its content, that have a value and that nothing reads."""
    yield from (key for key, value in message.items() if key not in read and value not in NONE)
    if isinstance(parts := message.get(content), list):
        known = {"type", "text", "value", *MARKS}
        yield from {f"{content}[].{key}": None for part in parts for key in part if key not in known}
