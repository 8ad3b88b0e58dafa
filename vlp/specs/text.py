"""Print a spec as the Python expression that makes it, with the values that differ from the defaults in sight."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from vlp.specs.fields import field_values

WIDTH = 110


def to_text(value: Any, indent: str = "") -> str:
    """Return a spec as a Python expression.

    Nested specs always have lines of their own. Of a spec's plain values, those that differ from the default are
    arguments, and the others stand in a comment.
    """
    inner = indent + "    "
    if is_dataclass(value):
        arguments, defaults = [], []
        for field, item in zip(fields(value), field_values(value).values()):
            if _contains_spec(item) or item != _default(field):
                arguments.append(f"{field.name}={to_text(item, inner)}")
            else:
                defaults.append(f"{field.name}={item!r}")
        return _block(f"{type(value).__name__}(", arguments, ")", indent, defaults)
    if isinstance(value, (dict, tuple)) and (_contains_spec(value) or len(indent + repr(value)) > WIDTH):
        if isinstance(value, dict):
            return _block("{", [f"{key!r}: {to_text(item, inner)}" for key, item in value.items()], "}", indent)
        return _block("(", [to_text(item, inner) for item in value], ")", indent)
    return repr(value)


def _contains_spec(value: Any) -> bool:
    if isinstance(value, (dict, tuple)):
        return any(map(_contains_spec, value.values() if isinstance(value, dict) else value))
    return is_dataclass(value)


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _block(opening: str, items: list[str], closing: str, indent: str, defaults: list[str] = ()) -> str:
    inner = indent + "    "
    lines = [f"{inner}{item}," for item in items]
    if defaults:
        comment = {"initial_indent": f"{inner}# default: ", "subsequent_indent": f"{inner}#   "}
        lines += textwrap.wrap(", ".join(defaults), WIDTH, break_long_words=False, break_on_hyphens=False, **comment)
    return "\n".join([opening, *lines, indent + closing]) if lines else opening + closing
