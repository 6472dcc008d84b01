"""What a step may be made of."""

from types import SimpleNamespace

import pytest
import torch

from job.runtime.errors import PermanentError
from job.tuning.fit.micro_batches import Limit
from job.tuning.trainer import _Trainer

MODEL = SimpleNamespace(config=SimpleNamespace(model_type="strange"))
BATCH = {"input_ids": torch.ones(4, 3), "attention_mask": torch.ones(4, 3, dtype=torch.int64)}


class Adding(_Trainer):
    """A trainer of which only the step is there: a pass's loss is the number of its rows."""

    def __init__(self, rows: int) -> None:
        self.fitting = SimpleNamespace(limit=Limit(rows=rows))

    def one_pass(self, model, batch, items):
        """The rows, over what they are counted against."""
        return torch.tensor(float(len(batch["input_ids"]))) / (1 if items is None else items)


@pytest.mark.parametrize(("rows", "items", "loss"), [(4, None, 4), (4, 8, 0.5), (2, 8, 0.5), (1, 8, 0.5)])
def test_passes_add_up_to_the_batch(rows, items, loss):
    """Each is divided by what the whole batch counts; a batch in one pass needs no count."""
    assert Adding(rows).training_step(MODEL, BATCH, items) == loss


def test_means_do_not_add_up():
    """Where nothing was counted, several passes would make the gradient too large: refused, with what to change."""
    with pytest.raises(PermanentError, match="strange models is a mean over each pass, so that 2 passes") as caught:
        Adding(2).training_step(MODEL, BATCH, None)
    assert "TUNE_BATCH_SIZE" in caught.value.remedy
