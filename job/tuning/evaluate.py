"""What the model can do: the loss on held-out labelled tokens, and its answers to held-out prompts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from unsloth import FastLanguageModel

from job.data.rendering.renderer import Prompt
from job.tuning.batches import IGNORED, by_length, mask, pad, training_batch

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


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; leaves the model as it was. Uses no random numbers, so a run with more
    evaluations trains the same adapter."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate(model: Any, dataset: Any, *, batch: int, pad_id: int, device: str) -> Evaluation:
    """The loss of `model` on `dataset` (columns input_ids, labels, length)."""
    total, tokens = 0.0, 0

    def add(rows: list[int]) -> None:
        nonlocal total, tokens
        inputs = training_batch([dataset[row] for row in rows], pad_id=pad_id, device=device)
        labelled = int((inputs["labels"][:, 1:] != IGNORED).sum())
        if labelled:
            total += float(model(**inputs).loss) * labelled
            tokens += labelled

    with evaluating(model):
        by_length(dataset["length"], batch, add)
    return Evaluation(loss=total / tokens if tokens else math.nan, tokens=tokens)


def answer(
    model: Any, prompts: Sequence[Prompt], tokenizer: Any, *, stop_ids: Sequence[int], batch: int, device: str
) -> list[str]:
    """Greedy answers, one a prompt, as text without special tokens."""
    answers = [""] * len(prompts)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]

    def generate(rows: list[int]) -> None:
        ids = [prompts[row].input_ids for row in rows]
        inputs = pad(ids, value=pad_id, left=True).to(device)
        output = model.generate(
            input_ids=inputs,
            attention_mask=mask(ids, left=True).to(device),
            max_new_tokens=_room([prompts[row] for row in rows], tokenizer),
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
            by_length([len(prompt.input_ids) for prompt in prompts], batch, generate)
    finally:
        FastLanguageModel.for_training(model)
    return answers


def _room(prompts: Sequence[Prompt], tokenizer: Any) -> int:
    """Tokens that an answer may have: half as many again as the longest reference, within bounds."""
    low, high = ANSWER_TOKENS
    longest = max(len(tokenizer(prompt.reference, add_special_tokens=False).input_ids) for prompt in prompts)
    return min(max(low, longest * 3 // 2), high)
