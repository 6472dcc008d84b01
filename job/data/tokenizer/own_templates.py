"""The templates that a transformers tokenizer brings: one, or several by name.

Source: `chat_template` in tokenizer_config.json, chat_template.jinja and the folder additional_chat_templates
(transformers, `PreTrainedTokenizerBase.chat_template`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def own_template(hf: Any) -> str | None:
    """The tokenizer's template; of several, the one called `default`, or the first."""
    own = hf.chat_template
    return own.get("default", next(iter(own.values()), None)) if isinstance(own, dict) else own


def other_templates(hf: Any) -> dict[str, str]:
    """The templates besides that one, by name."""
    named = hf.chat_template if isinstance(hf.chat_template, dict) else {}
    usual = "default" if "default" in named else next(iter(named), "")
    return {name: text for name, text in named.items() if name != usual}


def notes_on(others: Mapping[str, str]) -> tuple[str, ...]:
    """Which of the others are used, and which are not."""
    used = [name for name in others if name == "tool_use"]
    unused = ", ".join(f"`{name}`" for name in others if name not in used)
    return (
        *(
            "rows with tools are rendered by the tokenizer's template `tool_use`, all others by its usual one"
            for _ in used
        ),
        *([f"the tokenizer's templates {unused} are not used"] if unused else []),
    )
