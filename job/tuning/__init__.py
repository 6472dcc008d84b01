"""The only place that imports the training stack. Unsloth comes first: it must patch trl, transformers and peft."""

import unsloth  # noqa: F401 - imported for what it patches
