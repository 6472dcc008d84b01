"""Whether a tokenizer that was loaded does what the model's files say, and fits the weights.

Some classes of transformers 5 replace parts of `tokenizer.json` with their own, e.g. a byte-level pre-tokenizer with
SentencePiece's, and then spaces vanish from every text. Other programs, and transformers 4, take the file as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.data.tokenizer.encoder import Encoder
from job.data.tokenizer.settings import class_name
from job.data.tokenizer.trial import Trial
from job.runtime.errors import DataError

TEXTS = (
    " leading,  double  and trailing ",
    "Lines\n\nand\r\n\ttabs,\n  - indented\n    more\n\n\n\nend\n",
    "1234567890 + 3.14 = 2,718; 0x1F, 1e-5, 12 345, ٣٤٥, ½, ²",
    "it's (a) [b] {c} <d> #e @f $g _h_ `i` ~j~ \\k, CamelCase, UPPER CASE, don't, WE'LL",
    "Größe, naïve, æøå, e\u0301, Ωμέγα, Привет, שלום, नमस्ते, 日本語のテキスト, 한국어, 🙂👩‍👩‍👧, \u00a0\u2028",
    "\ufb01, \uff21, \u200b, \ufeff",
    '<p class="a">&amp; **bold** | a | b |\n```python\ndef f(x):\n\treturn {"k": [x ** 2]}\n```\n▁Ġ##</p>',
    *("x" * 400, " " * 400, "\n" * 400, "7" * 400, "!" * 400, "xX" * 200, "é" * 200, " \n" * 200, "x!" * 200),
    "x" * 400 + "!",
    "a" * 400 + "!",
    " " * 400 + "!",
)
"""White space, digits, accents, markup, and long runs, on which patterns that backtrack do so longest."""
SPECIAL_TOKENS = 200
"""How many special tokens are put into samples; some tokenizers have a thousand reserved ones."""
SHOWN = 40
LISTED = 5


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first sample of which a tokenizer makes other ids than its `tokenizer.json` by itself."""

    text: str
    ours: list[int]
    theirs: list[int]
    loses_text: bool
    """Whether the ids do not even spell the same words."""
    failure: str = ""
    """What the library says where there are no ids."""

    def __str__(self) -> str:
        if self.failure:
            return f"it fails on {self.text[:SHOWN]!r} ({self.failure})"
        first = next((n for n, pair in enumerate(zip(self.ours, self.theirs, strict=False)) if pair[0] != pair[1]), 0)
        shown = [f"{'... ' if first else ''}{ids[first : first + 6]}" for ids in (self.ours, self.theirs)]
        return f"{self.text[:SHOWN]!r} becomes {shown[0]} instead of {shown[1]}"


def sample_texts(hf: Any) -> list[str]:
    """Texts on which a transformers tokenizer is compared: the usual ones, and its added tokens among others."""
    tokens = [token.content for _, token in sorted(hf.added_tokens_decoder.items())]
    named = [token for token in hf.all_special_tokens if token in tokens]
    chosen = list(dict.fromkeys((*named, *tokens)))[:SPECIAL_TOKENS]
    return [*TEXTS, *(f"a {token} b{token}\n\n{token}{token}c" for token in chosen)]


def prepare(hf: Any) -> None:
    """Turn off what would cut or fill texts, or take special tokens apart."""
    hf.backend_tokenizer.no_truncation()
    hf.backend_tokenizer.no_padding()
    hf.split_special_tokens = hf.backend_tokenizer.encode_special_tokens = False


def find_difference(hf: Any, trial: Trial) -> Difference | None:
    """Compare a transformers tokenizer with its `tokenizer.json` on samples.

    Added tokens count as the tokenizer has them: every version of transformers takes them from `tokenizer_config.json`.

    Args:
        hf: the tokenizer.
        trial: has the file open.

    Raises:
        DataError: the tokenizer takes too much time or memory, or fails.
    """
    texts = sample_texts(hf)
    expected = _expected(trial, texts, [])
    prepare(hf)
    try:
        found = [*_ids(hf, texts), *_ids(hf, texts[:1], whole=True)]
    except Exception as error:  # noqa: BLE001 - the library has no other
        return Difference(text=texts[0], ours=[], theirs=expected[0], loses_text=True, failure=str(error))
    if found != expected:
        expected = _expected(trial, texts, [_as_json(token) for _, token in sorted(hf.added_tokens_decoder.items())])
    different = [one for one in zip((*texts, texts[0]), found, expected, strict=True) if one[1] != one[2]]
    if not different:
        return None
    # Around special tokens, SentencePiece's tokenizers and their classes differ by a space.
    loses = any(_spelt(hf, ours) != _spelt(hf, theirs) for text, ours, theirs in different if text in TEXTS)
    text, ours, theirs = different[0]
    return Difference(text=text, ours=ours, theirs=theirs, loses_text=loses)


def class_contradicts(difference: Difference, directory: Path, name: str) -> DataError:
    """The error that a tokenizer's class does not fit its file."""
    return DataError(
        f"The tokenizer of {name} is of the class {class_name(directory, name)}, which does not do what tokenizer.json "
        f"says: {difference}.",
        remedy="If tokenizer.json is right: in a copy of the model, set tokenizer_class to PreTrainedTokenizerFast in "
        "tokenizer_config.json, and remove what changes its text there (fix_mistral_regex and the like).",
    )


def check_embeddings(tokens: Encoder, rows: int | None, name: str) -> tuple[str, ...]:
    """A note on the tokens that a model has no embeddings for; some models have such that no text needs (Gemma 3).

    Args:
        tokens: the tokenizer and its template.
        rows: of the embeddings; None if that is not known.
        name: of the model, for messages.

    Raises:
        DataError: one of them is used in every sequence.
    """
    if rows is None:
        return ()
    hf, chat = tokens.hf, tokens.chat
    used = {*tokens.bos_ids, *(number for number in (hf.eos_token_id, hf.pad_token_id) if number is not None)}
    used |= set(tokens.encode(chat.short_conversation).ids) if chat else set()
    if beyond := sorted(number for number in used if number >= rows):
        raise DataError(
            f"{name} has embeddings for {rows} tokens, and its tokenizer gives the number {beyond[0]} to "
            f"{hf.convert_ids_to_tokens(beyond[0])!r}, which sequences need.",
            remedy="Use the tokenizer that belongs to these weights, or a model whose embeddings were resized for it.",
        )
    unused = [token.content for number, token in sorted(hf.added_tokens_decoder.items()) if number >= rows]
    if not unused:
        return ()
    listed = ", ".join(unused[:LISTED]) + (f" and {len(unused) - LISTED} more" if len(unused) > LISTED else "")
    return (f"the model has embeddings for {rows} tokens and none for {listed}: a row that contains one is rejected",)


def _expected(trial: Trial, texts: list[str], added: list[dict[str, Any]]) -> list[list[int]]:
    return [*trial.encode(texts, added=added), *trial.encode(texts[:1], added=added, whole=True)]


def _ids(hf: Any, texts: list[str], *, whole: bool = False) -> list[list[int]]:
    return [found.ids for found in hf.backend_tokenizer.encode_batch(texts, add_special_tokens=whole)]


def _as_json(token: Any) -> dict[str, Any]:
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: getattr(token, name) for name in names}


def _spelt(hf: Any, ids: list[int]) -> str:
    """The words of a text; how many spaces are between them is different in many tokenizers."""
    return " ".join(hf.backend_tokenizer.decode(ids, skip_special_tokens=False).split())
