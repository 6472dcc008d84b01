"""For each code of a finding in rows: what it means, what to do, and whether it is grave enough to end a run."""

from __future__ import annotations

from job.data.findings import Finding

GRAVE = frozenset({"eval_leakage", "conflicting_answers", "secrets", "garbage", "empty_answers"})
"""What ends the run under `fail`, however few rows it is: it is wrong in any dataset."""
GRAVE_SHARE = {"exact_duplicates": 0.1, "near_duplicates": 0.1, "answers_repeat_prompts": 0.1}
"""What ends the run from this share of the rows on: some of it is in most datasets."""

WORDS = {
    "exact_duplicates": (
        "{rows} repeat an earlier row word for word.",
        "Remove them, unless they are meant to count double: what stands twice is learned twice as often.",
    ),
    "near_duplicates": (
        "{rows} are nearly the same as an earlier row: the same words, or four fifths of the word pairs or more.",
        "Keep one of each, unless the variants are meant; the split holds them on one side.",
    ),
    "eval_leakage": (
        "{rows} are in the evaluation data and, the same or nearly so, in the training data too.",
        "Remove them from one of both, or the evaluation measures what was learned by heart.",
    ),
    "shared_text": (
        "{rows} share so much of their text with so many others that near duplicates cannot be told among them.",
        "Move instructions that every row repeats into a system prompt, which is not compared.",
    ),
    "empty_answers": (
        "{rows} have an answer without any text, which teaches to say nothing.",
        "Remove these rows, or fill in their answers.",
    ),
    "answers_repeat_prompts": (
        "{rows} have an answer that is its own prompt, which teaches to echo.",
        "Remove these rows, or correct the columns if both were read from one.",
    ),
    "conflicting_answers": (
        "{rows} have a prompt that other rows answer otherwise, so that no answer can be learned.",
        "Keep the right answer to each; if several answers to one prompt are meant, leave TUNE_QUALITY at warn.",
    ),
    "one_word_answers": (
        "{rows} have an answer of one word, where the usual answer has {usual}.",
        "Look whether they were cut off, or should be sentences like the rest.",
    ),
    "garbage": (
        "{rows} hold characters that no one typed ({kinds}).",
        "Read the source again in its own encoding (most often UTF-8), and remove what is no text.",
    ),
    "secrets": (
        "{rows} hold what looks like a key, a token or a password; a model that learns it can tell it.",
        "Remove it from the data, and revoke it if it is real.",
    ),
    "email_addresses": (
        "{rows} hold e-mail addresses, which a model may learn by heart.",
        "Replace them by made-up ones, unless they are meant to be known.",
    ),
}
"""For each code what it means and what to do."""


def is_grave(finding: Finding, rows: int) -> bool:
    """Whether it ends the run under TUNE_QUALITY=fail."""
    return finding.code in GRAVE or finding.count >= GRAVE_SHARE.get(finding.code, 2) * rows
