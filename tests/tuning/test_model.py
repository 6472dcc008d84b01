"""What the library says when weights cannot be loaded, as the run says it."""

import shutil
from pathlib import Path

import pytest
import torch

from job.config.schema import Config
from job.model import base_model
from job.runtime.errors import DataError, PermanentError
from job.tuning import model
from job.tuning.device import Device
from tests.rewritten import rename_weights

CARD = Device(kind="cuda", name="card", memory_bytes=2**34, capability="9.0", dtype=torch.bfloat16)
SPILLED = (
    "Some modules are dispatched on the CPU or the disk. Make sure you have enough GPU RAM to fit the quantized model. "
    "If you want to dispatch the model on the CPU or the disk ..."
)


@pytest.mark.parametrize(
    ("said", "expected", "remedy"),
    [
        pytest.param(SPILLED, PermanentError, "more memory", id="no room"),
        pytest.param("header too small", DataError, "Check that the checkpoint is whole", id="damaged"),
    ],
)
def test_weights_that_cannot_be_loaded(tiny_model, monkeypatch, said, expected, remedy):
    """A card that is too small is another end than a checkpoint that is not whole. All weights go to the one card."""
    asked = {}

    def refuse(**arguments):
        asked.update(arguments)
        raise ValueError(said)

    monkeypatch.setattr(model.FastLanguageModel, "from_pretrained", refuse)
    base = base_model.inspect(tiny_model, name="org/tiny")
    config = Config(model="org/tiny", dataset=("/d.jsonl",), output="/o")
    with pytest.raises(expected, match="org/tiny") as caught:
        model.load(base, config, CARD, directory=tiny_model)
    assert remedy in caught.value.remedy
    assert asked["device_map"] == {"": 0}


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_weights_that_no_file_has(tiny_model, tmp_path, missing):
    """The library puts random numbers in their place, and prints a table (vllm-project/vllm#53020 has the same)."""
    damaged = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    rename_weights(damaged, lambda name: None if name == missing else name)
    base = base_model.inspect(damaged, name="org/tiny")
    config = Config(model="org/tiny", dataset=("/d.jsonl",), output="/o", precision="16bit", max_length=64)
    device = Device(kind="cpu", name="cpu", memory_bytes=2**34, capability=None, dtype=torch.bfloat16)
    with pytest.raises(DataError, match=f"org/tiny has no weights for {missing}") as caught:
        model.load(base, config, device, directory=damaged)
    assert "save_pretrained" in caught.value.remedy
