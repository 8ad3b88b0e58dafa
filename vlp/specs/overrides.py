"""Apply ``dotted.key=value`` assignments from the command line to a tree of frozen dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import is_dataclass, replace
from typing import Any, Literal, TypeVar

from vlp.errors import UserError
from vlp.files import split_locations
from vlp.specs.fields import field_values
from vlp.specs.types import describe_type, type_hints


def suggest(name: str, names: list[str]) -> str:
    """Return the end of a message about an unknown name: the closest known name, or all of them."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(sorted(names))}"


Spec = TypeVar("Spec")


def override(spec: Spec, assignments: list[str]) -> Spec:
    """Return ``spec`` with each ``dotted.key=value`` applied in turn.

    Raises:
        UserError: for an unknown key (with a suggestion) or a value of a wrong type.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"{assignment!r} is not an override; write it as dotted.key=value")
        spec = _set(spec, key, key.split("."), text)
    return spec


def _set(node: Any, key: str, path: list[str], text: str, declared: Any = Any) -> Any:
    """Return a copy of ``node`` whose value at ``path`` is ``text``, parsed as the type of that value.

    Args:
        declared: Type of ``node``. A new value of a dict has the type that it names, or is a number if it names none.
    """
    head, *rest = path
    if is_dataclass(node):
        hints = type_hints(type(node))
        values = field_values(node)
        if head not in values:
            raise UserError(f"{key}: {type(node).__name__} has no field {head!r}{suggest(head, list(values))}")
        old, hint = values[head], hints[head]
    elif isinstance(node, dict):
        if head not in node and rest:
            raise UserError(f"{key}: there is no {head!r} here{suggest(head, list(node))}")
        old = node.get(head)
        named = typing.get_args(declared)[1] if typing.get_origin(declared) is dict else Any
        hint = type(old) if head in node else float if named is Any else named
    elif isinstance(node, tuple):
        if not head.isdigit() or int(head) >= len(node):
            raise UserError(f"{key}: {head!r} should be a number from 0 to {len(node) - 1}")
        old = node[int(head)]
        hint = type(old)
    else:
        raise UserError(f"{key}: {head!r} is inside a plain value; there is nothing below it")
    new = _set(old, key, rest, text, hint) if rest else _parse(key, text, Any if is_dataclass(old) else hint, old)
    if is_dataclass(node):
        return replace(node, **{head: new})
    if isinstance(node, dict):
        return {**node, head: new}
    return (*node[: int(head)], new, *node[int(head) + 1 :])


def _parse(key: str, text: str, hint: Any, old: Any) -> Any:
    """Return ``text`` parsed as the type ``hint``. A tuple of specs may be given as paths separated by commas."""
    if kinds := _spec_kinds(hint):
        return tuple(old[0].at(path) if old else kinds[0](path) for path in split_locations(text))
    if hint is Any or is_dataclass(hint):
        names = [f.name for f in dataclasses.fields(old)] if is_dataclass(old) else []
        raise UserError(
            f"{key} is a {type(old).__name__}, not a value; set one of its fields: {', '.join(names) or 'none'}"
        )
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if text.lower() in ("none", "null") and type(None) in options:
            return None
        for option in options:
            if option is not type(None) and not is_dataclass(option):
                try:
                    return _parse(key, text, option, old)
                except UserError:
                    continue
        raise UserError(f"{key} takes {describe_type(hint)}, not {text!r}")
    if origin is Literal:
        if text in options:
            return text
        raise UserError(
            f"{key} takes one of {', '.join(map(repr, options))}, not {text!r}{suggest(text, list(options))}"
        )
    if hint is tuple or origin is tuple:
        inner = options[0] if options else type(old[0]) if old else str
        return tuple(_parse(key, part, inner, old) for part in text.strip("()[]").split(",") if part)
    if hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UserError(f"{key} takes true or false, not {text!r}")
    if hint in (int, float):
        try:
            return hint(text.replace("_", ""))
        except ValueError:
            raise UserError(f"{key} takes {describe_type(hint)}, not {text!r}") from None
    if hint is str:
        return text
    raise UserError(
        f"{key} cannot be set on the command line (it is {describe_type(hint)}); write it in the config file"
    )


def _spec_kinds(hint: Any) -> tuple[type, ...]:
    """Return the dataclasses that a ``tuple[A | B, ...]`` may contain; empty for any other type."""
    if typing.get_origin(hint) is not tuple:
        return ()
    kinds = typing.get_args(typing.get_args(hint)[0])
    return kinds if kinds and all(map(is_dataclass, kinds)) else ()
