"""What the library says when weights cannot be loaded, as the run says it."""

import pytest
import torch

from job.config.schema import Config
from job.model import base_model
from job.runtime.errors import DataError, PermanentError
from job.tuning import model
from job.tuning.device import Device

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
