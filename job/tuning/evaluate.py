"""What the model can do: the loss on held-out labelled tokens, and its answers to held-out prompts.

Runs padded batches without the trainer, the longest first, and smaller ones where memory runs out.
"""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from unsloth import FastLanguageModel

from job.data.rendering.labels import IGNORED
from job.data.rendering.renderer import Prompt
from job.tuning.device import out_of_memory

log = structlog.get_logger()
ANSWER_TOKENS = (32, 256)  # least and most that an answer may have


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean cross-entropy in nats over the labelled tokens of all rows (each token weighs the same)."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float | None:
        """exp(loss), None where that overflows: JSON has no infinity."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return None


def evaluate(model: Any, dataset: Any, *, batch: int, pad_id: int, device: str) -> Evaluation:
    """The loss of `model` on `dataset` (columns input_ids, labels, length), in batches of `batch` rows."""
    total, tokens = 0.0, 0

    def add(rows: list[int]) -> None:
        nonlocal total, tokens
        inputs = _training_batch([dataset[row] for row in rows], pad_id=pad_id, device=device)
        labelled = int((inputs["labels"][:, 1:] != IGNORED).sum())
        if labelled:
            total += float(model(**inputs).loss) * labelled
            tokens += labelled

    with _evaluating(model):
        _by_length(dataset["length"], batch, add)
    return Evaluation(loss=total / tokens if tokens else math.nan, tokens=tokens)


def answer(
    model: Any, prompts: Sequence[Prompt], tokenizer: Any, *, stop_ids: Sequence[int], batch: int, device: str
) -> list[str]:
    """Greedy answers, one a prompt, as text without special tokens, in batches of `batch` prompts."""
    answers = [""] * len(prompts)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]

    def generate(rows: list[int]) -> None:
        ids = [prompts[row].input_ids for row in rows]
        inputs = _pad(ids, value=pad_id, left=True).to(device)
        output = model.generate(
            input_ids=inputs,
            attention_mask=_mask(ids, left=True).to(device),
            max_new_tokens=_answer_tokens([prompts[row] for row in rows], tokenizer),
            do_sample=False,
            eos_token_id=list(stop_ids),
            pad_token_id=pad_id,
        )
        texts = tokenizer.batch_decode(output[:, inputs.shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text.strip()

    FastLanguageModel.for_inference(model)
    try:
        with torch.inference_mode():
            _by_length([len(prompt.input_ids) for prompt in prompts], batch, generate)
    finally:
        FastLanguageModel.for_training(model)
    return answers


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; leaves the model as it was. Uses no random numbers, so a run with more
    evaluations trains the same adapter."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _answer_tokens(prompts: Sequence[Prompt], tokenizer: Any) -> int:
    """The most tokens that an answer may have: half more than the longest reference, within bounds."""
    low, high = ANSWER_TOKENS
    longest = max(len(tokenizer(prompt.reference, add_special_tokens=False).input_ids) for prompt in prompts)
    return min(max(low, longest * 3 // 2), high)


def _by_length(lengths: Sequence[int], size: int, run: Callable[[list[int]], None]) -> None:
    """Run over row numbers in batches of `size`, the longest first: padding is small, and memory trouble comes early.

    A batch that runs out of memory is halved, and so are all later ones; a single row that does raises the error.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while order:
        reason = ""
        try:
            run(order[:size])
        except RuntimeError as error:
            if size == 1 or not out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        if reason:  # only here: what the batch had allocated is freed with its error
            torch.cuda.empty_cache()
            log.warning("evaluation_batch_halved", reason=reason, was=size, now=size // 2)
            size //= 2
            continue
        order = order[size:]


def _pad(rows: Sequence[Sequence[int]], *, value: int, left: bool = False) -> torch.Tensor:
    """Rows of token ids as a (rows, longest) tensor of int64."""
    longest = max(len(row) for row in rows)
    filled = [
        [value] * (longest - len(row)) + list(row) if left else list(row) + [value] * (longest - len(row))
        for row in rows
    ]
    return torch.tensor(filled, dtype=torch.int64)


def _mask(rows: Sequence[Sequence[int]], *, left: bool = False) -> torch.Tensor:
    """The attention mask that belongs to `_pad`: 1 where there is a token, shape (rows, longest)."""
    return _pad([[1] * len(row) for row in rows], value=0, left=left)


def _training_batch(rows: Sequence[dict[str, Any]], *, pad_id: int, device: str) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, each (rows, longest)."""
    ids = [row["input_ids"] for row in rows]
    batch = {
        "input_ids": _pad(ids, value=pad_id),
        "attention_mask": _mask(ids),
        "labels": _pad([row["labels"] for row in rows], value=IGNORED),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}
