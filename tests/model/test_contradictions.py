"""Headers, indexes and configurations are believed only where they agree: with the format, the file, and each other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.inputs.safetensors_stub import LONGEST_HEADER
from job.model import shape
from job.model.base_model import inspect
from job.model.config_values import check_values
from job.model.safetensors_header import read_header
from job.runtime.errors import DataError
from tests.rewritten import rename_weights

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]}


def stored(path: Path, header: Any, data: int = 24) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * data)
    return path


def test_a_header_of_the_library(tmp_path: Path, tiny_model: Path) -> None:
    """What the library writes is read as the library reads it."""
    from safetensors import safe_open

    found = read_header(stored(tmp_path / "w.safetensors", {"__metadata__": {"format": "pt"}, "a": A, "b": B}), "m")
    assert {name: tensor.shape for name, tensor in found.items()} == {"a": (2, 2), "b": (4,)}
    for path in tiny_model.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert {name: tensor.shape for name, tensor in read_header(path, "m").items()} == shapes


@pytest.mark.parametrize(
    ("header", "part"),
    [
        pytest.param({"a": {"shape": [2, 2], "data_offsets": [0, 16]}, "b": B}, "dtype", id="no dtype"),
        pytest.param({"a": {**A, "dtype": "Q4"}, "b": B}, "dtype", id="unknown dtype"),
        pytest.param({"a": {**A, "dtype": ["F32"]}, "b": B}, "dtype", id="dtype is a list"),
        pytest.param({"a": {**A, "shape": "2x2"}, "b": B}, "not lists of numbers", id="shape is text"),
        pytest.param({"a": {**A, "shape": ["2", "2"]}, "b": B}, "not lists of numbers", id="shape of texts"),
        pytest.param({"a": {**A, "shape": [-2, -2]}, "b": B}, "not lists of numbers", id="negative shape"),
        pytest.param({"a": {**A, "shape": [2.0, 2]}, "b": B}, "not lists of numbers", id="shape of fractions"),
        pytest.param({"a": {**A, "shape": [True, 4]}, "b": B}, "not lists of numbers", id="shape of truth values"),
        pytest.param({"a": {**A, "shape": [1] * 99 + [4]}, "b": B}, "not lists of numbers", id="99 dimensions"),
        pytest.param({"a": {**A, "shape": [10**6, 10**6]}, "b": B}, "1,000,000,000,000 elements", id="10^12 elements"),
        pytest.param({"a": {**A, "data_offsets": [-8, 8]}, "b": B}, "not lists of numbers", id="negative offset"),
        pytest.param({"a": {**A, "data_offsets": [16, 0]}, "b": B}, "-16 bytes", id="ends before it begins"),
        pytest.param({"a": {**A, "data_offsets": [0]}, "b": B}, "not lists of numbers", id="one offset"),
        pytest.param({"a": {**A, "data_offsets": [10**30, 10**30 + 16]}}, "not lists of numbers", id="huge offset"),
        pytest.param({"a": A, "b": {**B, "data_offsets": [8, 16]}}, "end at 16", id="overlap"),
        pytest.param({"a": A, "b": {**B, "data_offsets": [0, 8]}}, "end at 8", id="the same place"),
        pytest.param({"a": A, "b": {**B, "data_offsets": [32, 40]}}, "end at 16", id="a hole"),
        pytest.param({"a": A}, "expected", id="bytes that belong to nothing"),
        pytest.param({"a": A, "b": {**B, "shape": [40], "data_offsets": [16, 96]}}, "expected", id="beyond the end"),
        pytest.param({"a": [A], "b": B}, "dtype", id="an entry is a list"),
        pytest.param([A], "not a JSON object but list", id="a list"),
        pytest.param(b'{"a": ', "not valid JSON", id="cut"),
        pytest.param(b'{"a":' * 100_000, "nested too deep", id="nested"),
        pytest.param(b"\xff\xfe\xfd", "not valid JSON", id="not text"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, header: Any, part: str) -> None:
    """What the library would reject, or crash on, is known from the header alone, and says which file and tensor."""
    with pytest.raises(DataError) as caught:
        read_header(stored(tmp_path / "w.safetensors", header), "org/m")
    assert part in caught.value.message
    assert "w.safetensors of org/m" in caught.value.message


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_a_header_longer_than_the_file(tmp_path: Path, size: int) -> None:
    """The length is compared with the file, and with what any model needs, before so much is read."""
    path = tmp_path / "w.safetensors"
    path.write_bytes((b"\xff" * 4 + b"\0" * 4 + b"{" * 100)[:size])
    with pytest.raises(DataError, match=r"does not fit the file|not valid JSON"):
        read_header(path, "m")
    with path.open("wb") as file:
        file.write((LONGEST_HEADER + 1).to_bytes(8, "little"))
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="does not fit the file"):
        read_header(path, "m")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def configured(model: Path, **values: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def deep(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"hidden_size": "64"}, "hidden_size='64' is not a whole number above 0"),
        ({"hidden_size": [64]}, "hidden_size=[64]"),
        ({"hidden_size": 64.0}, "hidden_size=64.0"),
        ({"num_hidden_layers": -2}, "num_hidden_layers=-2"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"vocab_size": 10**30}, "vocab_size=1000"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"max_position_embeddings": {"a": 1}}, "max_position_embeddings={"),
        ({"num_attention_heads": ["4"]}, "num_attention_heads=['4']"),
        ({"num_key_value_heads": []}, "num_key_value_heads=[]"),
        ({"head_dim": "16" * 99}, "head_dim='1616"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6' is not a number"),
        ({"rope_theta": [[10000.0]]}, "rope_theta=[[10000.0]]"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor='2'"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0, "x"]}}, "long_factor=[1.0, 'x']"),
        ({"initializer_range": float("inf")}, "initializer_range=inf"),
        ({"text_config": "none"}, "text_config is not an object"),
        ({"other": deep(33)}, "nested more than 32 deep"),
        ({"quantization_config": "4bit"}, "quantization_config in config.json of org/m is not an object"),
        ({"architectures": "LlamaForCausalLM"}, "no architecture"),
        ({"architectures": [5]}, "no architecture"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"num_hidden_layers": 3}, "weights for 2 layers, and config.json says num_hidden_layers=3"),
        ({"num_hidden_layers": 2_000_000_000}, "num_hidden_layers=2000000000"),
        ({"vocab_size": 261}, "of shape [260, 64], and config.json says vocab_size=261"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_configuration_that_cannot_be(model: Path, values: dict[str, Any], part: str) -> None:
    """Names, the value and the rule, before a library fails on it, or trains random numbers."""
    configured(model, **values)
    with pytest.raises(DataError) as caught:
        inspect(model, name="org/m")
    assert part in caught.value.message
    assert "org/m" in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"intermediate_size": [128, 64], "num_key_value_heads": [2, 4]}, id="one for each layer"),
        pytest.param({"rope_scaling": {"long_factor": [1, 1.5], "factor": None}}, id="long rope"),
        pytest.param({"head_dim": None, "rope_theta": 1000000, "sliding_window": "any"}, id="others"),
    ],
)
def test_configurations_of_real_kinds(config: dict[str, Any]) -> None:
    """Models with a width for each layer, with lists of factors, and with nulls are as valid as others."""
    check_values(config, "config.json")


def test_a_model_with_a_width_for_each_layer(model: Path) -> None:
    """Its sizes follow from its tensors."""
    configured(model, intermediate_size=[128, 128], num_key_value_heads=[2, 2], head_dim=[16, 16])
    base = inspect(model, name="m")
    assert (found := shape.of(base)) is not None
    assert found.parameters == base.parameters


def test_an_index_that_names_tensors_that_are_not_there(model: Path) -> None:
    """Transformers would only warn, and train on random numbers in their place."""
    file = model / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = min(index["weight_map"].values())
    file.write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"model\.layers\.7\.mlp\.up_proj\.weight.*is not in model-00001"):
        inspect(model, name="m")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        pytest.param(lambda name: f"base_model.model.{name}", "'base_model.model.", id="peft's model"),
        pytest.param(
            lambda name: name.replace("q_proj", "q_proj.base_layer"), "q_proj.base_layer.weight'", id="peft's layers"
        ),
        pytest.param(lambda name: f"_orig_mod.{name}", "'_orig_mod.", id="torch.compile"),
        pytest.param(lambda name: f"module.{name}", "'module.", id="DDP"),
        pytest.param(lambda name: name.replace("head", "head.lora_A"), "'lm_head.lora_A.weight'", id="an adapter"),
        pytest.param(lambda name: None if "head" in name else name, "tie_word_embeddings=false", id="no head"),
        pytest.param(lambda name: None if "embed" in name else name, "tie_word_embeddings=false", id="no embeddings"),
    ],
)
def test_weights_that_transformers_would_not_find(model: Path, name: Callable[[str], str | None], part: str) -> None:
    """Seen where a model was saved with what wrapped it (OpenGVLab/InternVL#593, huggingface/peft#1689), or without its
    head (LLaVA-VL/LLaVA-NeXT#315): transformers only prints a table, and trains on random numbers."""
    rename_weights(model, name)
    with pytest.raises(DataError) as caught:
        inspect(model, name="org/m")
    assert part in caught.value.message
    assert "random numbers" in caught.value.message


def test_a_head_that_is_the_embeddings(model: Path) -> None:
    """It is stored once; without a word in config.json the architecture decides."""
    rename_weights(model, lambda name: None if "head" in name else name)
    configured(model, tie_word_embeddings=True)
    inspect(model, name="m")
    configured(model, tie_word_embeddings=None)
    inspect(model, name="m")


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors.index.json", "tokenizer.json", "chat_template.jinja", "weights"]
)
def test_a_pointer_in_the_place_of_a_file(model: Path, file: str) -> None:
    """A clone without git-lfs has pointers: copying it again brings the same (codefuse-ai/MFTCoder#20)."""
    place = min(model.glob("*.safetensors")) if file == "weights" else model / file
    place.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:46\nsize 9\n")
    with pytest.raises(DataError, match=f"{place.name} of org/m is a Git LFS pointer") as caught:
        inspect(model, name="org/m")
    assert "git lfs pull" in caught.value.remedy


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U8", "I8"])
def test_weights_that_are_quantised_without_a_word(model: Path, dtype: str) -> None:
    """FP8 would be read without its scales, in silence; packed integers (as of MLX) fail only when all is loaded."""
    shard = min(model.glob("*.safetensors"))
    data = shard.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    tensor = header["model.layers.0.self_attn.q_proj.weight"]
    tensor |= {"dtype": dtype, "shape": [tensor["shape"][0], 2 * tensor["shape"][1]]}  # of BF16 before
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    with pytest.raises(DataError, match=f"q_proj.weight' in {dtype}, which is quantised"):
        inspect(model, name="m")
    configured(model, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    inspect(model, name="m")
