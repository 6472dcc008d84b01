"""The downloaded inputs, ready to be trained on: token ids, labels, and the fingerprint of what decides the result."""

from __future__ import annotations

from job.data.prepare import prepare as prepare_data
from job.inputs.pull import Inputs
from job.stages.context import RunContext, TrainingInputs
from job.stages.fetch import Model
from job.state.fingerprint import fingerprint


def prepare(context: RunContext, pulled: Inputs, model: Model) -> TrainingInputs:
    """Render and tokenise the rows.

    Raises:
        DataError: the rows are invalid, or nothing in them can be learned.
    """
    config = context.config
    with context.timeline.span("tokenise"):
        data = prepare_data(config, pulled, directory=context.work / "data")
    return TrainingInputs(
        inputs=pulled,
        base=model.base,
        base_hashes=model.hashes,
        data=data,
        fingerprint=fingerprint(
            config,
            model.base,
            model.hashes,
            template=data.tokenizer.template or "",
            training_data=data.train.digest,
        ),
    )
