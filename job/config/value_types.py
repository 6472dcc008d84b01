"""How single values of the environment are read: each kind parses, states its rule in words, and knows its schema."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from marshmallow import ValidationError, fields, validate


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How one value is read: the marshmallow field that parses it, the rule in words, and its JSON schema."""

    field: fields.Field[Any]
    rule: str
    schema: dict[str, Any]
    broken: Callable[[str], str] = lambda _: ""
    """Which part of the rule a value breaks, in a sentence; empty where the rule says it all."""


class _Auto(fields.Field[Any]):
    """`auto`, or what the inner field accepts."""

    def __init__(self, inner: fields.Field[Any]) -> None:
        super().__init__()
        self._inner = inner

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        return value if value == "auto" else self._inner.deserialize(value, attr, data, **kwargs)


class _Names(fields.Field[Any]):
    """A comma-separated list, kept in order as a tuple; every part must satisfy the inner field."""

    def __init__(self, inner: fields.Field[Any]) -> None:
        super().__init__()
        self._inner = inner

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if not parts:
            raise ValidationError("The list is empty.")
        return tuple(self._inner.deserialize(part, attr, data, **kwargs) for part in parts)


MOST = 1_000_000_000
"""No setting that counts something can be larger: libraries keep such numbers in 32 bits."""


def integer(minimum: int, maximum: int = MOST) -> Kind:
    """A whole number within bounds."""
    return Kind(
        field=fields.Integer(validate=validate.Range(min=minimum, max=maximum)),
        rule=f"a whole number, at least {minimum} and at most {maximum}",
        schema={"type": "integer", "minimum": minimum, "maximum": maximum},
    )


def number(minimum: float, maximum: float | None = None, *, exclusive: bool = False) -> Kind:
    """A number within bounds."""
    low = f"above {minimum:g}" if exclusive else f"at least {minimum:g}"
    return Kind(
        field=fields.Float(validate=validate.Range(min=minimum, max=maximum, min_inclusive=not exclusive)),
        rule=f"a number, {low}" + (f" and at most {maximum:.10g}" if maximum is not None else ""),
        schema={"type": "number", ("exclusiveMinimum" if exclusive else "minimum"): minimum}
        | ({"maximum": maximum} if maximum is not None else {}),
    )


def choice(*options: str) -> Kind:
    """One of a few words."""
    return Kind(
        field=fields.String(validate=validate.OneOf(options)),
        rule="one of " + ", ".join(options),
        schema={"type": "string", "enum": list(options)},
    )


def text(pattern: re.Pattern[str] | str, rule: str, *, broken: Callable[[str], str] = lambda _: "") -> Kind:
    """A text that a pattern matches whole; the rule says it in words, `broken` which part of it a value breaks."""
    expression = pattern if isinstance(pattern, str) else pattern.pattern
    return Kind(
        field=fields.String(validate=validate.Regexp(f"(?:{expression})\\Z")),
        rule=rule,
        schema={"type": "string", "pattern": f"^(?:{expression})$"},
        broken=broken,
    )


def flag() -> Kind:
    """`true` or `false`."""
    return Kind(field=fields.Boolean(), rule="true or false", schema={"type": "boolean"})


def auto_or(kind: Kind) -> Kind:
    """`auto`, or what another kind reads."""
    schema = {"anyOf": [{"const": "auto"}, kind.schema]}
    return Kind(field=_Auto(kind.field), rule=f"auto, or {kind.rule}", schema=schema)


def names(kind: Kind, rule: str) -> Kind:
    """A comma-separated list, kept in order as a tuple."""
    return Kind(
        field=_Names(kind.field),
        rule=rule,
        # `items` does not apply to strings: it is for programs that write the list part by part.
        schema={"type": "string", "minLength": 1, "items": kind.schema},
        broken=lambda value: " ".join(filter(None, (kind.broken(part.strip()) for part in value.split(",")))),
    )
