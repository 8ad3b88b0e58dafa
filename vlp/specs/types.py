"""Check the values of a spec against the types of its fields, and describe those types in words."""

from __future__ import annotations

import types
import typing
from dataclasses import is_dataclass
from typing import Any, Literal

from vlp.errors import UserError
from vlp.specs.fields import field_values


def describe_type(hint: Any) -> str:
    """Return a description of the values that a type hint allows."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "none"}
    names[Any] = "anything"
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(o) for o in options)
    if origin is Literal:
        return f"one of {', '.join(map(repr, options))}"
    if origin is tuple:
        count = "any number of" if options[-1] is ... else str(len(options))
        return f"a tuple ({count} x {describe_type(options[0])})"
    if origin is dict:
        return f"a dict of texts to {describe_type(options[1])}"
    return names.get(hint) or (hint.__name__ if isinstance(hint, type) else str(hint))


def check_types(value: Any, key: str = "") -> None:
    """Check the values of a spec, at any depth, against the types of their fields.

    Args:
        value: Spec, or a dict or tuple that contains specs.
        key: Dotted key of ``value``, for the message.

    Raises:
        UserError: For the first value of a wrong type.
    """
    if is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        for field, inner in field_values(value).items():
            name = f"{key}.{field}".lstrip(".")
            if not fits(inner, hints[field]):
                raise UserError(f"{name} is {inner!r}; it takes {describe_type(hints[field])}")
            check_types(inner, name)
    elif isinstance(value, (dict, tuple)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            check_types(inner, f"{key}.{name}")


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of a type. A whole number is also a number, but true and false are not numbers."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is Literal:
        return value in options
    if origin is tuple:
        each = options[:1] * len(value) if options[-1] is ... and isinstance(value, tuple) else options
        return isinstance(value, tuple) and len(value) == len(each) and all(map(fits, value, each))
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, options[0]) and fits(v, options[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, origin or hint)
