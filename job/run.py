"""The story of one run. Each line is one stage (`job.stages`); what it returns is what later stages need of it."""

from __future__ import annotations

from job.config.schema import Config
from job.data.prepare import validate_head
from job.observability import prometheus
from job.stages import claim, fetch, load, preflight, publish, resume
from job.stages.evaluate import Evaluator
from job.stages.prepare import prepare
from job.stages.train import train


def run(config: Config) -> None:
    """Do everything that the configuration asks for. Returns when the run is published.

    Raises:
        JobError: of the kind that says why it could not.
        StopRequested: SIGTERM, SIGINT or SIGHUP; the attempt's end is recorded.
    """
    output = claim.open_output(config)
    if claim.already_complete(config, output):
        return
    expect_gpu = preflight.machine(config)
    prometheus.serve(config.metrics_port)
    with claim.attempt(config, output) as context:
        inputs, pending = fetch.fetch_inputs(context)
        validate_head(config, inputs)
        stack = load.import_training_stack(context, pending.base, expect_gpu=expect_gpu)
        inputs, model = fetch.await_model(context, inputs, pending)
        training = prepare(context, inputs, model)
        restored = resume.restore(context, training, check=stack.check_checkpoint)
        if publish.already_published(context):
            return
        publish.report(context, training)
        finetune = load.load(context, stack, training, restored)
        evaluator = Evaluator(finetune, training.data, record=context.record, timeline=context.timeline)
        if restored is None:
            evaluator.evaluate_and_sample(phase="before", step=0)
        train(context, finetune, training, evaluator, restored)
        final = publish.win(context, finetune, training, evaluator, restored)
        artifacts = publish.export(context, finetune, training, final)
        publish.finish(context, finetune, training, final, artifacts)
