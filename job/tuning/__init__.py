"""The only place that imports the training stack. Unsloth comes first: it must patch trl, transformers and peft."""

from job.tuning import sft_only

sft_only.install()
import unsloth  # noqa: E402, F401 - imported for what it patches
