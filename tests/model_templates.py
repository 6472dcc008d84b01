"""The chat templates of real models (tests/templates), each with a tokenizer of its family and what it should learn.

`EXPECTED` is written by hand from the models' own documentation: an oracle that shares nothing with the code. The parts
between ⟦ and ⟧ are learned. `║` separates the sequences of a template that rewrites earlier turns.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from job.data.tokenizer.load import Tokenizer as ChatTokenizer
from job.data.tokenizer.load import wrap_tokenizer
from tests.tiny_tokenizer import DATE, SENTENCES, backend

DIRECTORY = Path(__file__).parent / "templates"
LLAMA_3 = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|python_tag|>",
)  # fmt: skip
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|fim_prefix|>")
QWEN_TEXT = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>", "</tool_response>")
MISTRAL_3 = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
             "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")  # fmt: skip
PHI_3 = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|placeholder1|>")
PHI_4 = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|fim_prefix|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
GEMMA_4 = ("<bos>", "<eos>", "<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>",
           "<|tool_response>", "<tool_response|>", '<|"|>', "<|think|>")  # fmt: skip
HARMONY = ("<|startoftext|>", "<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>",
           "<|call|>", "<|constrain|>")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the tokenizers of a family of models cut and mark text."""

    kind: str
    """`bytes` (Llama 3, Qwen, Tekken), `prefixed` (SentencePiece that puts a space before each stretch between special
    tokens: Llama 2, early Mistral, Phi 3), `first` (only before the first: later Mistral) or `spaces` (Gemma)."""
    special: tuple[str, ...]
    bos: str | None
    eos: str
    adds_bos: bool
    text: tuple[str, ...] = ()
    """Added tokens that are no special ones."""
    rstrip: bool = False
    """Whether the special tokens take in white space behind them."""
    nfc: bool = False


LLAMA_2_FAMILY = Family(kind="prefixed", special=("<s>", "</s>"), bos="<s>", eos="</s>", adds_bos=True)
LLAMA_3_FAMILY = Family(kind="bytes", special=LLAMA_3, bos="<|begin_of_text|>", eos="<|eot_id|>", adds_bos=True)
QWEN_FAMILY = Family(
    kind="bytes", special=QWEN, bos=None, eos="<|im_end|>", adds_bos=False, text=QWEN_TEXT, nfc=True
)  # fmt: skip
TEKKEN_FAMILY = Family(kind="bytes", special=("<s>", "</s>", *MISTRAL_3), bos="<s>", eos="</s>", adds_bos=True)
MISTRAL_FAMILY = Family(kind="first", special=("<s>", "</s>", *MISTRAL_3), bos="<s>", eos="</s>", adds_bos=True)
GEMMA_FAMILY = Family(
    kind="spaces", special=GEMMA, bos="<bos>", eos="<eos>", adds_bos=True, text=("\n\n", "\n\n\n", "  ", "   ")
)
GEMMA_4_FAMILY = Family(
    kind="spaces", special=GEMMA_4, bos="<bos>", eos="<eos>", adds_bos=True, text=("<|channel>", "<channel|>")
)
HARMONY_FAMILY = Family(kind="bytes", special=HARMONY, bos="<|startoftext|>", eos="<|return|>", adds_bos=False)
PHI_3_FAMILY = Family(
    kind="prefixed", special=("<s>", "<|endoftext|>", *PHI_3), bos="<s>", eos="<|endoftext|>", adds_bos=False,
    rstrip=True,
)  # fmt: skip
PHI_4_FAMILY = Family(kind="bytes", special=PHI_4, bos="<|endoftext|>", eos="<|im_end|>", adds_bos=False)
CHATML_FAMILY = Family(
    kind="prefixed", special=("<s>", "</s>", "<|im_start|>", "<|im_end|>"), bos="<s>", eos="<|im_end|>", adds_bos=True
)


SMOLLM_FAMILY = Family(
    kind="bytes",
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"),
    bos="<|im_start|>",
    eos="<|im_end|>",
    adds_bos=False,
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A template and what is true of it."""

    family: Family
    answer: str
    """What is learned of an answer: its text stands at {}."""
    trims: str = ""
    """The characters that are stripped around an answer; `all` for any white space."""
    system: bool = True
    """Whether it takes a system turn."""
    strict: bool = False
    """Whether it refuses two turns of one role in a row."""
    tools: bool = False
    """Whether it prints tool calls."""
    one_text: bool = True
    """False if it renders earlier turns otherwise once others follow."""


SPACED, TEKKEN = " {}</s>", "{}</s>"
MODELS = {
    "llama-2": Model(family=LLAMA_2_FAMILY, answer=" {} </s>", trims="all", strict=True),
    "llama-3": Model(family=LLAMA_3_FAMILY, answer="{}<|eot_id|>", trims="all"),
    "llama-3.1": Model(family=LLAMA_3_FAMILY, answer="{}<|eot_id|>", trims="all", tools=True),
    "llama-3.2": Model(family=LLAMA_3_FAMILY, answer="{}<|eot_id|>", trims="all", tools=True),
    "llama-3.3": Model(family=LLAMA_3_FAMILY, answer="{}<|eot_id|>", trims="all", tools=True),
    "qwen-2.5": Model(family=QWEN_FAMILY, answer="{}<|im_end|>", tools=True),
    "qwen-3": Model(family=QWEN_FAMILY, answer="<think>\n\n</think>\n\n{}<|im_end|>", tools=True, one_text=False),
    "qwen-3-first": Model(family=QWEN_FAMILY, answer="<think>\n\n</think>\n\n{}<|im_end|>", tools=True, one_text=False),
    "qwen-3-2507": Model(family=QWEN_FAMILY, answer="{}<|im_end|>", tools=True),
    "gemma-2": Model(family=GEMMA_FAMILY, answer="{}<end_of_turn>", trims="all", system=False, strict=True),
    "gemma-3": Model(family=GEMMA_FAMILY, answer="{}<end_of_turn>", trims="all", strict=True),
    "gemma-3n": Model(family=GEMMA_FAMILY, answer="{}<end_of_turn>", trims="all", strict=True),
    "gemma-4": Model(family=GEMMA_4_FAMILY, answer="{}<turn|>", trims="all", tools=True),
    "gemma-4-first": Model(family=GEMMA_4_FAMILY, answer="{}<turn|>", trims="all", tools=True),
    "gpt-oss": Model(
        family=HARMONY_FAMILY, answer="<|channel|>final<|message|>{}<|return|>", tools=True, one_text=False
    ),
    "smollm-3": Model(family=QWEN_FAMILY, answer="{}<|im_end|>"),
    "mistral-v0.1": Model(family=LLAMA_2_FAMILY, answer="{}</s>", system=False, strict=True),
    "mistral-v1": Model(family=LLAMA_2_FAMILY, answer=SPACED, strict=True),
    "mistral-v2": Model(family=MISTRAL_FAMILY, answer=SPACED, tools=True, one_text=False),
    "mistral-v3": Model(family=MISTRAL_FAMILY, answer=SPACED, trims="all", strict=True, tools=True, one_text=False),
    "mistral-v3-tekken": Model(family=TEKKEN_FAMILY, answer=TEKKEN, tools=True, one_text=False),
    "mistral-nemo": Model(family=TEKKEN_FAMILY, answer=TEKKEN, strict=True, tools=True, one_text=False),
    "mistral-v7": Model(family=MISTRAL_FAMILY, answer=SPACED),
    "phi-3-first": Model(family=PHI_3_FAMILY, answer="{}<|end|>", system=False),
    "phi-3": Model(family=PHI_3_FAMILY, answer="{}<|end|>"),
    "phi-3.5": Model(family=PHI_3_FAMILY, answer="{}<|end|>"),
    "phi-4-first": Model(family=PHI_4_FAMILY, answer="{}<|im_end|>"),
    "phi-4": Model(family=PHI_4_FAMILY, answer="{}<|im_end|>"),
    "chatml": Model(family=CHATML_FAMILY, answer="{}<|im_end|>"),
    "smollm-2": Model(family=SMOLLM_FAMILY, answer="{}<|im_end|>"),
    "zephyr": Model(family=LLAMA_2_FAMILY, answer="{}</s>"),
}

L3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA_3_TALK = (
    f"{L3.format('user')}Hi<|eot_id|>{L3.format('assistant')}⟦Hello there.<|eot_id|>⟧"
    f"{L3.format('user')}Bye<|eot_id|>{L3.format('assistant')}⟦Farewell.<|eot_id|>⟧"
)
CHATML_TURNS = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello there.<|im_end|>⟧\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦Farewell.<|im_end|>⟧\n"
)
CHATML_TALK = f"<|im_start|>system\nBe brief.<|im_end|>\n{CHATML_TURNS}"
QWEN_3_TALK = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "⟦<think>\n\n</think>\n\nHello there.<|im_end|>⟧\n"
    "║<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "Hello there.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    "⟦<think>\n\n</think>\n\nFarewell.<|im_end|>⟧\n"
)
GEMMA_TALK = (
    "<start_of_turn>model\n⟦Hello there.<end_of_turn>⟧\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟦Farewell.<end_of_turn>⟧\n"
)
GEMMA_4_TALK = (
    "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n⟦Hello there.<turn|>⟧\n"
    "<|turn>user\nBye<turn|>\n<|turn>model\n⟦Farewell.<turn|>⟧\n"
)
HARMONY_TALK = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2026-11-22\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be "
    "included for every message.<|end|><|start|>developer<|message|># Instructions\n\nBe brief.\n\n<|end|>"
    "<|start|>user<|message|>Hi<|end|><|start|>assistant"
)
MISTRAL_V3_TALK = (
    "<s>[INST] Be brief.\n\nHi[/INST]⟦ Hello there.</s>⟧"
    "║<s>[INST] Hi[/INST] Hello there.</s>[INST] Be brief.\n\nBye[/INST]⟦ Farewell.</s>⟧"
)
NEMO_TALK = (
    "<s>[INST]Be brief.\n\nHi[/INST]⟦Hello there.</s>⟧"
    "║<s>[INST]Hi[/INST]Hello there.</s>[INST]Be brief.\n\nBye[/INST]⟦Farewell.</s>⟧"
)
PHI_3_TALK = (
    "<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello there.<|end|>⟧\n"
    "<|user|>\nBye<|end|>\n<|assistant|>\n⟦Farewell.<|end|>⟧\n"
)
PHI_4_TALK = (
    "<|im_start|>system<|im_sep|>Be brief.<|im_end|>"
    "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>⟦Hello there.<|im_end|>⟧"
    "<|im_start|>user<|im_sep|>Bye<|im_end|><|im_start|>assistant<|im_sep|>⟦Farewell.<|im_end|>⟧"
)

EXPECTED = {
    "llama-2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]⟦ Hello there. </s>⟧<s>[INST] Bye [/INST]⟦ Farewell. </s>⟧"
    ),
    "llama-3": f"<|begin_of_text|>{L3.format('system')}Be brief.<|eot_id|>{LLAMA_3_TALK}",
    "llama-3.1": (
        f"<|begin_of_text|>{L3.format('system')}Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
        f"Be brief.<|eot_id|>{LLAMA_3_TALK}"
    ),
    "llama-3.2": (
        f"<|begin_of_text|>{L3.format('system')}Cutting Knowledge Date: December 2023\nToday Date: 22 Nov 2026\n\n"
        f"Be brief.<|eot_id|>{LLAMA_3_TALK}"
    ),
    "qwen-2.5": CHATML_TALK,
    "qwen-3": QWEN_3_TALK,
    "qwen-3-first": QWEN_3_TALK,
    "qwen-3-2507": CHATML_TALK,
    "gemma-2": f"<bos><start_of_turn>user\nHi<end_of_turn>\n{GEMMA_TALK}",
    "gemma-3": f"<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n{GEMMA_TALK}",
    "gemma-3n": f"<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n{GEMMA_TALK}",
    "gemma-4": GEMMA_4_TALK,
    "gemma-4-first": GEMMA_4_TALK,
    "gpt-oss": (
        f"{HARMONY_TALK}⟦<|channel|>final<|message|>Hello there.<|return|>⟧"
        f"║{HARMONY_TALK}<|channel|>final<|message|>Hello there.<|end|><|start|>user<|message|>Bye<|end|>"
        "<|start|>assistant⟦<|channel|>final<|message|>Farewell.<|return|>⟧"
    ),
    "smollm-3": (
        "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nReasoning Mode: /think\n\n"
        f"## Custom Instructions\n\nBe brief.\n\n<|im_end|>\n{CHATML_TURNS}"
    ),
    "mistral-v0.1": "<s>[INST] Hi [/INST]⟦Hello there.</s>⟧[INST] Bye [/INST]⟦Farewell.</s>⟧",
    "mistral-v1": ("<s> [INST] Be brief.\n\nHi [/INST]⟦ Hello there.</s>⟧ [INST] Bye [/INST]⟦ Farewell.</s>⟧"),
    "mistral-v2": MISTRAL_V3_TALK,
    "mistral-v3": MISTRAL_V3_TALK,
    "mistral-v3-tekken": NEMO_TALK,
    "mistral-nemo": NEMO_TALK,
    "mistral-v7": (
        "<s>[SYSTEM_PROMPT] Be brief.[/SYSTEM_PROMPT][INST] Hi[/INST]⟦ Hello there.</s>⟧"
        "[INST] Bye[/INST]⟦ Farewell.</s>⟧"
    ),
    "phi-3-first": f"<s>{PHI_3_TALK}",
    "phi-3": f"<|system|>\nBe brief.<|end|>\n{PHI_3_TALK}",
    "phi-3.5": f"<|system|>\nBe brief.<|end|>\n{PHI_3_TALK}",
    "phi-4-first": PHI_4_TALK,
    "phi-4": PHI_4_TALK,
    "chatml": f"<s>{CHATML_TALK}",
    "smollm-2": CHATML_TALK,
    "zephyr": (
        "<s><|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n⟦Hello there.</s>⟧\n"
        "<|user|>\nBye</s>\n<|assistant|>\n⟦Farewell.</s>⟧\n"
    ),
}
EXPECTED["llama-3.3"] = EXPECTED["llama-3.1"]


def text(name: str) -> str:
    """The template as its model publishes it."""
    return (DIRECTORY / f"{name}.jinja").read_bytes().decode()


@functools.cache
def tokenizer(name: str) -> ChatTokenizer:
    """The job's tokenizer for a model's template."""
    return wrapped(MODELS[name].family, text(name))


def wrapped(family: Family, template: str | None) -> ChatTokenizer:
    """The same for any template."""
    hf = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_made(family)),
        **{key: value for key, value in {"bos_token": family.bos, "eos_token": family.eos}.items() if value},
    )
    hf.chat_template = template
    return wrap_tokenizer(hf, date=DATE)


@functools.cache
def _made(family: Family) -> str:
    made = Tokenizer.from_str(_bytes() if family.kind == "bytes" else _sentencepiece())
    if family.nfc:
        made.normalizer = normalizers.NFC()
    if family.kind == "first":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if family.kind == "prefixed":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if family.kind in {"first", "prefixed"}:
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    if family.kind == "spaces":
        made.normalizer = normalizers.Replace(" ", "▁")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=family.rstrip) for token in family.special]
    )
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.text])
    if family.adds_bos:
        assert family.bos
        special = [(family.bos, made.token_to_id(family.bos))]
        made.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=special)
    return str(made.to_str())


def _bytes() -> str:
    found = json.loads(backend())
    found["added_tokens"] = []
    return json.dumps(found)


@functools.cache
def _sentencepiece() -> str:
    """A BPE model as SentencePiece makes them: words with `▁`, and bytes for what it does not know."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    made.train_from_iterator(SENTENCES * 3, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    found = json.loads(made.to_str())
    known = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *found["model"]["vocab"], "▁"]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(known))}
    found |= {"pre_tokenizer": None, "normalizer": None}
    found["model"] |= {"vocab": vocab, "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    return json.dumps(found)


def decoded(found: ChatTokenizer, ids: list[int]) -> str:
    """The very characters of some tokens, also where the decoder drops a space at the start of a text."""
    hf: Any = found.hf
    space = hf.backend_tokenizer.token_to_id("▁")
    ahead = [space] if space is not None and hf.backend_tokenizer.decode([space, space]) == " " else []
    return str(hf.backend_tokenizer.decode([*ahead, *ids], skip_special_tokens=False))


def as_tokenized(family: Family, expected: str) -> str:
    """What `expected` becomes by its tokens: some families take in or put in white space around special tokens."""
    special = "|".join(map(re.escape, family.special))
    if family.rstrip:
        expected = re.sub(rf"({special})([⟦⟧]?)\s+", r"\1\2", expected)
    if family.kind == "prefixed":
        expected = re.sub(rf"({special})([⟦⟧]?)(?!{special}|[⟦⟧║]|\Z)", r"\1\2 ", expected)
    return expected
