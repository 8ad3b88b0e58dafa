"""Specs as JSON: a dataclass becomes an object whose ``type`` is its short name from `vlp.specs.names`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from vlp.errors import UserError
from vlp.specs.fields import field_values
from vlp.specs.names import NO_TYPES, class_of, current_fields, is_own, is_type_name, name_of


@dataclass(frozen=True)
class Foreign:
    """Stand-in for a spec of a user's own type where its code is not at hand: see `read_without_code`."""

    type: str
    fields: dict[str, Any]


def to_plain(value: Any) -> Any:
    """Return a JSON-able form; a dataclass carries its class as ``type``, and a dict that has a key ``type`` is wrapped."""
    if isinstance(value, Foreign):
        return {"type": value.type, **to_plain(value.fields)}
    if is_dataclass(value):
        return {
            "type": name_of(type(value)),
            **{name: to_plain(inner) for name, inner in field_values(value).items()},
        }
    if isinstance(value, dict):
        items = {k: to_plain(v) for k, v in value.items()}
        return {"type": "dict", "items": items} if "type" in value else items
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value


def from_plain(value: Any, own_types: Mapping[str, type] = NO_TYPES) -> Any:
    """Return the spec that `to_plain` wrote; lists become tuples.

    Args:
        value: JSON value.
        own_types: Name -> class of the user's own types: see `vlp.specs.names.class_of`.

    Raises:
        UserError: For a type that is neither vlp's nor in ``own_types``, or a field that a type does not have.
    """
    return _build(value, lambda name, fields: _construct(class_of(name, own_types), fields))


def _build(value: Any, construct: Callable[[str, dict[str, Any]], Any]) -> Any:
    if isinstance(value, list):
        return tuple(_build(v, construct) for v in value)
    if not isinstance(value, dict):
        return value
    if value.get("type") == "dict" and isinstance(value.get("items"), dict):
        return {k: _build(v, construct) for k, v in value["items"].items()}
    if not is_type_name(value.get("type")):
        return {k: _build(v, construct) for k, v in value.items()}
    return construct(value["type"], {k: _build(v, construct) for k, v in value.items() if k != "type"})


def _construct(cls: type, fields: dict[str, Any]) -> Any:
    try:
        return cls(**current_fields(cls, fields))
    except TypeError as e:
        raise UserError(f"the experiment was written by another version of vlp: {e}") from None


def dump(spec: Any) -> str:
    """Return the JSON of a spec, as a run folder stores it."""
    return json.dumps(to_plain(spec), indent=1)


def read(path: Path, own_types: Mapping[str, type] = NO_TYPES) -> Any:
    """Read the spec that `dump` wrote to ``path``: see `from_plain`.

    Raises:
        UserError: If the file is missing or damaged, or as `from_plain` raises it.
    """
    plain = read_plain(path)
    try:
        return from_plain(plain, own_types)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def read_without_code(path: Path) -> Any:
    """Read a spec, with a `Foreign` in the place of each spec of a user's own type.

    Raises:
        UserError: If the file is missing or damaged, or has a field that a type of vlp does not have.
    """
    return _build(
        read_plain(path),
        lambda name, fields: Foreign(name, fields) if is_own(name) else _construct(class_of(name), fields),
    )


def read_plain(path: Path) -> Any:
    """Read the JSON that `dump` wrote to ``path``.

    Raises:
        UserError: If the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} is not a readable experiment ({e}); is the folder a run?") from None


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts and lists by their dotted keys."""
    if isinstance(value, (dict, list)) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            k: v
            for name, child in items
            for k, v in flatten(child, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    return {prefix: value}
