"""A tiny random Llama with a byte-level tokenizer and a ChatML template: trains in a second a run.

`python -m tests.tiny <directory> [--sizes key=value ...]` writes it; the tests keep one per session.
"""

import sys
from pathlib import Path

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer():
    """A fast byte-level tokenizer: 256 bytes and the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
    )
    fast.chat_template = CHATML
    return fast


def write(directory: Path, **sizes: int) -> None:
    """Write model and tokenizer; `sizes` override the Llama configuration."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    fast = tokenizer()
    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": len(fast),
    } | sizes
    config = LlamaConfig(
        **shape, bos_token_id=fast.bos_token_id, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id)
    model.save_pretrained(directory, max_shard_size="200KB")
    fast.save_pretrained(directory)


if __name__ == "__main__":
    write(Path(sys.argv[1]), **{k: int(v) for k, v in (pair.split("=") for pair in sys.argv[2:])})
