"""The only place that imports the training stack. Unsloth comes first: it must patch trl, transformers and peft."""

from job.tuning import unsloth_import

unsloth_import.install()
import unsloth  # noqa: E402, F401 - imported for what it patches
