"""What a step may be made of."""

from types import SimpleNamespace

import pytest
import torch

from job.runtime.errors import PermanentError
from job.tuning.fit.micro_batches import Limit
from job.tuning.trainer.sft import MicroBatchTrainer

MODEL = SimpleNamespace(config=SimpleNamespace(model_type="strange"))
BATCH = {"input_ids": torch.ones(4, 3), "attention_mask": torch.ones(4, 3, dtype=torch.int64)}


class Adding(MicroBatchTrainer):
    """A trainer of which only the step is there: a micro-batch's loss is the number of its rows."""

    def __init__(self, rows: int) -> None:
        self.passes = SimpleNamespace(limit=Limit(rows=rows))

    def run_micro_batch(self, model, batch, items):
        """The rows, over what they are counted against."""
        return torch.tensor(float(len(batch["input_ids"]))) / (1 if items is None else items)


@pytest.mark.parametrize(("rows", "items", "loss"), [(4, None, 4), (4, 8, 0.5), (2, 8, 0.5), (1, 8, 0.5)])
def test_micro_batches_add_up_to_the_batch(rows, items, loss):
    """Each is divided by what the whole batch counts; a batch in one micro-batch needs no count."""
    assert Adding(rows).training_step(MODEL, BATCH, items) == loss


def test_means_do_not_add_up():
    """Where nothing was counted, several micro-batches would make the gradient too large: an error with a remedy."""
    with pytest.raises(PermanentError, match=r"strange models .* 2 micro-batches") as caught:
        Adding(2).training_step(MODEL, BATCH, None)
    assert "TUNE_BATCH_SIZE" in caught.value.remedy
