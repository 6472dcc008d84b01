"""A base model that this job would train wrong is refused by name, before anything heavy is loaded."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from job.model.base_model import check_fits, inspect
from job.runtime.errors import ConfigError, DataError


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(model: Path, **values) -> None:
    """Set or (None) remove keys of config.json."""
    file = model / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def tensor_sizes(model: Path) -> list[int]:
    """Elements of every tensor, as the safetensors library counts them."""
    from safetensors import safe_open

    sizes = []
    for shard in model.glob("*.safetensors"):
        with safe_open(shard, framework="np") as file:
            sizes += [math.prod(file.get_slice(key).get_shape()) for key in file.keys()]  # noqa: SIM118
    return sizes


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, False),
        ({"model_type": "qwen3_next", "linear_num_key_heads": 16}, True),
        ({"model_type": "qwen3_5", "text_config": {"linear_conv_kernel_dim": 4}}, True),
        ({"model_type": "olmo_hybrid", "layer_types": ["linear_attention", "full_attention"]}, True),
        ({"model_type": "kimi_linear", "linear_attn_config": {"num_heads": 32}}, True),
    ],
)
@pytest.mark.parametrize("given", [None, "0"])
def test_kernels_for_linear_attention(model, tmp_path, config, expected, given):
    """They are imported where a model may have linear attention, and where the user says so."""
    change(model, **{key: value for key, value in config.items() if key != "model_type"})
    base = inspect(model, name="tiny")
    assert base.linear_attention is expected
    code = """
import os, sys
from pathlib import Path
from job.runtime import libraries
scratch, linear = Path(sys.argv[1]), sys.argv[2] == "True"
libraries.prepare(libraries.LibrarySettings(scratch=scratch, expect_gpu=False, linear_attention=linear))
print(os.environ.get("UNSLOTH_DISABLE_VENDORED_FLA"))
"""
    environment = {**os.environ, **({"UNSLOTH_DISABLE_VENDORED_FLA": given} if given else {})}
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(base.linear_attention)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert said == (given or ("None" if expected else "1"))


def test_facts(model):
    """Parameters are counted from the headers, positions and architecture read from the configuration."""
    base = inspect(model, name="s3://bucket/tiny")
    assert base.architecture == "LlamaForCausalLM"
    assert base.positions == 512
    assert base.parameters == sum(tensor_sizes(model))
    assert base.prequantised is None


@pytest.mark.parametrize(
    ("values", "part"),
    [
        pytest.param({"auto_map": {"AutoModelForCausalLM": "modeling.X"}}, "auto_map", id="remote code"),
        pytest.param({"vision_config": {}}, "vision_config", id="multimodal"),
        pytest.param({"architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration", id="seq2seq"),
        pytest.param({"num_local_experts": 8}, "mixture of experts (num_local_experts=8)", id="Mixtral"),
        pytest.param({"n_routed_experts": 64}, "mixture of experts", id="DeepSeek"),
        pytest.param({"quantization_config": {"quant_method": "gptq"}}, "quantised with gptq", id="GPTQ"),
        pytest.param({"architectures": None}, "no architecture", id="no architecture"),
    ],
)
def test_kinds_that_are_rejected(model, values, part):
    """The message names the model and the reason."""
    change(model, **values)
    with pytest.raises(DataError) as caught:
        inspect(model, name="org/name")
    assert "org/name" in str(caught.value)
    assert part in str(caught.value)


def test_pickled_weights_are_rejected(model):
    """Pickled weights are rejected by the file's name, since reading them can run code."""
    for file in model.glob("*.safetensors*"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"pytorch_model\.bin"):
        inspect(model, name="org/name")


def test_an_adapter_is_no_base(model):
    """An adapter given as TUNE_MODEL is recognised."""
    (model / "config.json").rename(model / "adapter_config.json")
    with pytest.raises(DataError, match="is an adapter"):
        inspect(model, name="org/name")


def test_damage_is_found_before_loading(model):
    """A missing shard, a shard cut short and a broken header are found from sizes and headers."""
    shards = sorted(model.glob("*.safetensors"))
    assert len(shards) > 1
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[:-10])
    with pytest.raises(DataError, match="damaged"):
        inspect(model, name="m")
    shards[0].write_bytes(b"\xff" * 8 + whole[8:])
    with pytest.raises(DataError, match="damaged"):
        inspect(model, name="m")
    shards[0].unlink()
    with pytest.raises(DataError, match="incomplete"):
        inspect(model, name="m")


def test_files_outside_the_index_are_not_the_model(model):
    """An original in another layout, as some publishers add it, is not counted, loaded or merged."""
    before = inspect(model, name="m")
    shutil.copy(min(model.glob("*.safetensors")), model / "consolidated.safetensors")
    after = inspect(model, name="m")
    assert (before.parameters, before.weights) == (after.parameters, after.weights)


def test_settings_that_do_not_fit(model):
    """More tokens than positions, or another precision than the checkpoint's, is a configuration error."""
    base = inspect(model, name="m")
    with pytest.raises(ConfigError, match="positions for 512 tokens"):
        check_fits(base, precision="4bit", max_length=513, export=("adapter",))
    change(model, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ConfigError, match="cannot be merged"):
        check_fits(inspect(model, name="m"), precision="8bit", max_length=64, export=("adapter", "merged_16bit"))
    change(model, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ConfigError, match="stored in 4bit"):
        check_fits(inspect(model, name="m"), precision="16bit", max_length=64, export=("adapter",))
