"""The training stack and the model, into memory: seconds of imports, only after all cheap checks."""

from __future__ import annotations

import gc

from job.model.base_model import BaseModel
from job.runtime import libraries
from job.runtime.errors import ConfigError
from job.runtime.libraries import LibrarySettings
from job.stages import preflight
from job.stages.context import Finetune, RunContext, TrainingInputs, TrainingStack
from job.state.checkpoints import Restored
from job.state.compile_cache import bytecode


def import_training_stack(context: RunContext, base: BaseModel, *, expect_gpu: bool) -> TrainingStack:
    """Import Unsloth and all that it patches, prepared for this model.

    Raises:
        ConfigError: a GPU is expected, and the stack finds none.
    """
    config, cache = context.config, context.cache
    compiled = cache.directory
    prepared = libraries.prepare(
        LibrarySettings(
            scratch=context.scratch,
            compiled=compiled,
            expect_gpu=expect_gpu,
            cpu_only=config.device == "cpu",
            deterministic=config.deterministic,
            linear_attention=base.linear_attention,
        )
    )
    if compiled is not None and bytecode.missing():
        cache.wait_for_modules()
        libraries.keep_modules(compiled / bytecode.FOLDER)
    gc.disable()  # garbage collection took a fifth of the imports' time, and what is imported stays
    try:
        with context.timeline.span("import"):
            from job.tuning import finetune  # noqa: PLC0415
    except NotImplementedError as error:  # how Unsloth says that it must not fall back to the CPU
        raise preflight.no_gpu(config.device, f"the training library finds none that it can use: {error}") from error
    finally:
        gc.enable()
    gc.freeze()  # later collections skip it as well: Unsloth asks for a dozen while it loads a model
    prepared.restore_compiled()
    stack: TrainingStack = finetune
    return stack


def load(context: RunContext, stack: TrainingStack, training: TrainingInputs, restored: Restored | None) -> Finetune:
    """Load the model, with the plan of an earlier attempt where there is one.

    Raises:
        ConfigError: the checkpoint has more steps than the settings ask for.
        PermanentError: the model does not fit into memory.
    """
    context.cache.wait()
    earlier = restored.body if restored else context.record.first()
    with context.timeline.span("load"):
        finetune = stack.Finetune.load(
            training.base, context.config, training.data, directory=context.work, earlier=earlier
        )
    if restored is not None and restored.step > finetune.plan.steps:
        raise ConfigError(
            f"The checkpoint has {restored.step} steps, and the settings ask for {finetune.plan.steps}.",
            remedy="Raise TUNE_MAX_STEPS or TUNE_EPOCHS, or set another TUNE_RUN_ID to train less.",
        )
    return finetune
