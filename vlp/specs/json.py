"""Specs as JSON: a dataclass becomes an object whose ``type`` is its short name from `vlp.specs.names`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from vlp.errors import UserError
from vlp.specs.names import class_of, current_fields, is_type_name, name_of


def to_plain(value: Any) -> Any:
    """Return a JSON-able form; a dataclass carries its class as ``type``, and a dict that has a key ``type`` is wrapped."""
    if is_dataclass(value):
        return {
            "type": name_of(type(value)),
            **{f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)},
        }
    if isinstance(value, dict):
        items = {k: to_plain(v) for k, v in value.items()}
        return {"type": "dict", "items": items} if "type" in value else items
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value


def from_plain(value: Any) -> Any:
    """Inverse of `to_plain`; lists become tuples. Only dataclasses can be named."""
    if isinstance(value, list):
        return tuple(from_plain(v) for v in value)
    if not isinstance(value, dict):
        return value
    if value.get("type") == "dict":
        return {k: from_plain(v) for k, v in value["items"].items()}
    fields = {k: from_plain(v) for k, v in value.items() if k != "type"}
    if not is_type_name(value.get("type")):
        return {k: from_plain(v) for k, v in value.items()}
    cls = class_of(value["type"])
    try:
        return cls(**current_fields(cls, fields))
    except TypeError as e:
        raise UserError(f"the experiment was written by another version of vlp: {e}") from None


def dump(spec: Any) -> str:
    return json.dumps(to_plain(spec), indent=1)


def read(path: Path) -> Any:
    """Read the spec that `dump` wrote to ``path``."""
    try:
        return from_plain(json.loads(path.read_text()))
    except (OSError, ValueError) as e:
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
