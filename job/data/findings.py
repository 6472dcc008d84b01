"""Findings in data: the value that quality, rendering, check and report share, the texts of all findings, and which of
them are grave.

Knows codes and numbers; nothing of how anything is found.
"""

from __future__ import annotations

from dataclasses import dataclass

NOT_LEARNED = frozenset(
    {"answers_not_learned", "reasoning_not_rendered", "earlier_answers_not_rendered", "unknown_tokens"}
)
"""What answers say and the model would not learn."""
LOSSES = NOT_LEARNED | {"tools_not_rendered", "names_not_rendered", "white_space_changed"}
"""What rows say and their text does not."""
GRAVE = frozenset({"eval_leakage", "conflicting_answers", "secrets", "garbage", "empty_answers"}) | NOT_LEARNED
"""What ends a run under `fail` in however few rows: it is wrong in any dataset."""
GRAVE_SHARE = {"exact_duplicates": 0.1, "near_duplicates": 0.1, "answers_repeat_prompts": 0.1}
"""What ends a run under `fail` from this share of the rows on: most datasets have a little of it."""

TEXTS = {
    # In rows; `{rows}` becomes "12 of 340 rows (3.5%)".
    "exact_duplicates": (
        "{rows} repeat an earlier row word for word.",
        "Remove them, unless they are meant to count double: a row that appears twice is learned twice as often.",
    ),
    "near_duplicates": (
        "{rows} are nearly the same as an earlier row: the same words, or at least four fifths of the word pairs.",
        "Keep one of each, unless the variants are intended; the split keeps them on one side.",
    ),
    "eval_leakage": (
        "{rows} of the evaluation data are also in the training data, the same or nearly so.",
        "Remove them from one of the two, or the evaluation measures memorised answers.",
    ),
    "shared_text": (
        "{rows} share a long text with so many other rows that near duplicates among them cannot be detected.",
        "Move instructions that every row repeats into a system prompt, which is not compared.",
    ),
    "empty_answers": (
        "{rows} have an answer without any text, which teaches the model to answer nothing.",
        "Remove these rows, or fill in their answers.",
    ),
    "answers_repeat_prompts": (
        "{rows} have an answer that equals its prompt, which teaches the model to echo.",
        "Remove these rows, or correct the columns if both were read from the same one.",
    ),
    "conflicting_answers": (
        "{rows} have a prompt that other rows answer differently, so that neither answer is learned well.",
        "Keep the right answer to each prompt; if several answers are intended, leave TUNE_QUALITY at warn.",
    ),
    "one_word_answers": (
        "{rows} have an answer of one word, while the usual answer has {usual}.",
        "Check whether these answers were cut off, or should be sentences like the others.",
    ),
    "garbage": (
        "{rows} contain characters that nobody typed ({kinds}).",
        "Read the source again in its own encoding (most often UTF-8), and remove what is not text.",
    ),
    "embedded_media": (
        "{rows} contain pictures or other media as base64 text.",
        "Remove them: the model does not see a picture, and would learn to spell it.",
    ),
    "secrets": (
        "{rows} contain what looks like a key, a token or a password, which the trained model can reveal.",
        "Remove it from the data, and revoke it if it is real.",
    ),
    "email_addresses": (
        "{rows} contain e-mail addresses, which a model may memorise.",
        "Replace them by invented ones, unless they are meant to be public.",
    ),
    # In rendering; `{numbers}` becomes "12 training".
    "lost_turns": (
        "{numbers} sequences are longer than TUNE_MAX_LENGTH and lose their last turns.",
        "Raise TUNE_MAX_LENGTH, or shorten the rows: turns that are cut off are not learned.",
    ),
    "cut_inside": (
        "{numbers} sequences are cut inside an answer, so its end is not learned.",
        "Raise TUNE_MAX_LENGTH, or set TUNE_OVERLONG=drop: from such answers a model learns not to stop.",
    ),
    "dropped_overlong": (
        "{numbers} sequences are longer than TUNE_MAX_LENGTH and are dropped.",
        "Raise TUNE_MAX_LENGTH, or shorten the rows.",
    ),
    "fully_masked": (
        "{numbers} sequences have no token left to learn and are dropped.",
        "Raise TUNE_MAX_LENGTH so that answers fit after their prompts; for short rows, check TUNE_ROLE_WEIGHTS.",
    ),
    "split_by_template": (
        "{numbers} rows become one sequence for each answer, since the template rewrites earlier turns.",
        "Nothing to do: each answer is learned as it will be generated.",
    ),
    "header_differs": (
        "{numbers} rows have answers that do not begin as the generation prompt ends.",
        "Compare the sequences of the report with the prompts that the model will be given.",
    ),
    "tools_not_rendered": (
        "{numbers} rows have tools that the chat template does not print.",
        "The model does not see them: set TUNE_CHAT_TEMPLATE to a template for tools, such as `qwen-2.5`.",
    ),
    "reasoning_not_rendered": (
        "{numbers} rows have reasoning that the chat template does not print.",
        "To learn it, set TUNE_CHAT_TEMPLATE to a template for reasoning, such as `qwen-3`.",
    ),
    "answers_not_learned": (
        "{numbers} rows have answers of which a part is not learned ({kinds}).",
        "Set TUNE_CHAT_TEMPLATE to a template that prints them whole, such as `chatml`, or remove these parts.",
    ),
    "white_space_changed": (
        "{numbers} rows have answers whose white space the chat template changes, most often at their ends.",
        "Nothing to do, unless that white space has a meaning: answers are learned as the template writes them.",
    ),
    "names_not_rendered": (
        "{numbers} rows name the speakers of messages, and the chat template does not print these names.",
        "Write the names into the texts if answers depend on them.",
    ),
    "earlier_answers_not_rendered": (
        "{numbers} rows have earlier answers that the chat template leaves out before later ones.",
        "Set TUNE_CHAT_TEMPLATE to a template that prints whole conversations, such as `chatml`.",
    ),
    "unknown_tokens": (
        "{numbers} sequences have answers with characters that the tokenizer does not know.",
        "Replace them, or use a model whose tokenizer has them: its token for unknown characters is learned instead.",
    ),
}
"""For each code what it means, and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One kind of defect that was found, and the rows that have it."""

    code: str
    """Constant snake_case: `near_duplicates`, `one_word_answers`, ..."""
    count: int
    """Rows or sequences concerned."""
    first: tuple[str, ...]
    """`file:line` of the first ten."""
    message: str
    """One sentence: what, how many."""
    remedy: str
    """One sentence: what to do."""


def finding(code: str, *, count: int, first: tuple[str, ...], **values: str) -> Finding:
    """A finding with its texts; `values` fill the gaps of its message."""
    message, remedy = TEXTS[code]
    return Finding(code=code, count=count, first=first, message=message.format(**values), remedy=remedy)


def is_grave(found: Finding, rows: int) -> bool:
    """Whether a finding in a dataset of this many rows ends the run under TUNE_QUALITY=fail."""
    return found.code in GRAVE or found.count >= GRAVE_SHARE.get(found.code, 2) * rows
