"""Check the values of a spec against the types of its fields, and describe those types in words."""

from __future__ import annotations

import collections.abc
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any, Literal

from vlp.errors import UserError
from vlp.specs.fields import field_values


def describe_type(hint: Any) -> str:
    """Return a description of the values that a type hint allows."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "none"}
    names |= {Any: "anything", None: "none"}
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(o) for o in options)
    if origin is Literal:
        return f"one of {', '.join(map(repr, options))}"
    if origin is tuple and options:
        if options[-1] is not ... and len(set(options)) > 1:
            return f"a tuple ({', '.join(map(describe_type, options))})"
        count = "any number of" if options[-1] is ... else str(len(options))
        return f"a tuple ({count} x {describe_type(options[0])})"
    if origin is dict and options:
        return f"a dict of texts to {describe_type(options[1])}"
    if origin is collections.abc.Callable:
        return "a function"
    return names.get(hint) or (hint.__name__ if isinstance(hint, type) and origin is None else str(hint))


def type_hints(cls: type) -> dict[str, Any]:
    """Return the type of each field of a spec.

    Raises:
        UserError: If a hint names something that its module does not import at run time.
    """
    try:
        return typing.get_type_hints(cls)
    except NameError as e:
        raise UserError(
            f"a type hint of {cls.__name__} cannot be read ({e}); import the name outside of TYPE_CHECKING"
        ) from None


def check_types(value: Any, key: str = "") -> None:
    """Check the values of a spec, at any depth, against the types of their fields.

    Args:
        value: Spec, or a dict or tuple that contains specs.
        key: Dotted key of ``value``, for the message.

    Raises:
        UserError: For the first value of a wrong type.
    """
    if isinstance(value, type):
        raise UserError(f"{key} is the class {value.__name__}; write {value.__name__}(...), which makes an instance")
    if is_dataclass(value):
        hints = type_hints(type(value))
        if not is_decorated(type(value)):
            raise UserError(
                f"{type(value).__name__} has fields of its own; write @dataclass(frozen=True) above its class"
            )
        for field, inner in field_values(value).items():
            name = f"{key}.{field}".lstrip(".")
            if not fits(inner, hints[field]):
                raise UserError(f"{name} is {inner!r}; it takes {describe_type(hints[field])}")
            check_types(inner, name)
    elif isinstance(value, (dict, tuple)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            check_types(inner, f"{key}.{name}")


def is_decorated(cls: type) -> bool:
    """Return whether a subclass of a dataclass is one itself, or has neither fields nor an ``__init__`` of its own."""
    own = vars(cls)
    names = own.get("__annotations__", {}).items()
    fields = [name for name, hint in names if "ClassVar" not in str(hint)]
    return "__dataclass_params__" in own or not (fields or "__init__" in own)


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of a type. A whole number is also a number, but true and false are not numbers.

    A list may be given as a tuple, which it becomes in experiment.json. Of a function, only that it can be called is
    checked. A hint that Python cannot check at run time, such as a Protocol, fits every value.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, (typing.TypeVar, typing.ParamSpec)):
        return True
    if hint is None:
        return value is None
    if isinstance(hint, typing.NewType):
        return fits(value, hint.__supertype__)
    if origin in (typing.Annotated, typing.Final):
        return fits(value, options[0])
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is Literal:
        return value in options
    if origin is type:
        return isinstance(value, type) and (not isinstance(options[0], type) or issubclass(value, options[0]))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return _is_instance(value, origin or hint) and _items_fit(value, origin, options)


def _is_instance(value: Any, cls: Any) -> bool:
    try:
        return isinstance(value, (list, tuple) if cls is list else cls)
    except TypeError:
        return True


def _items_fit(value: Any, origin: Any, options: tuple[Any, ...]) -> bool:
    """Return whether the items of a container, such as ``Sequence[int]``, are of the types ``options``."""
    if origin is tuple and options and options[-1] is not ...:
        return len(value) == len(options) and all(map(fits, value, options))
    if isinstance(value, Mapping) and len(options) == 2:
        return all(fits(k, options[0]) and fits(v, options[1]) for k, v in value.items())
    is_container = isinstance(origin, type) and issubclass(origin, Iterable)
    if is_container and options and isinstance(value, Collection) and not isinstance(value, (str, bytes)):
        return all(fits(item, options[0]) for item in value)
    return True
