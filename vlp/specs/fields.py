"""Declare the limits of a spec's values next to its fields, and check them.

``setting(0.995, least=0, most=1)`` takes the place of a bare default in a frozen dataclass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from vlp.errors import UserError

LARGEST = 1 << 64  # no number of an experiment is this large, and torch and numpy take none


@dataclass(frozen=True)
class Setting:
    """Metadata of a field: see `setting`."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    least_items: int = 0
    changes_result: bool = True


def setting(
    default: Any = MISSING,
    *,
    default_factory: Callable[[], Any] | Any = MISSING,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    least_items: int = 0,
    changes_result: bool = True,
) -> Any:
    """Declare a dataclass field whose values have limits.

    Args:
        default: Value of the field where none is given. Without ``default`` and ``default_factory`` a value is required.
        default_factory: Function that returns the default.
        least: Smallest allowed number. A limit applies to each number of a tuple, and None always passes.
        most: Largest allowed number.
        above: Lower bound that is itself not allowed.
        below: Upper bound that is itself not allowed.
        least_items: Fewest allowed items of a tuple.
        changes_result: Whether the result of a task depends on the field. It does not depend on, e.g., the number of
            data workers, so results of different values may be compared.
    """
    metadata = {"setting": Setting(least, most, above, below, least_items, changes_result)}
    if default_factory is not MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def field_values(spec: Any) -> dict[str, Any]:
    """Return the values of a spec's fields by name."""
    return {field.name: getattr(spec, field.name) for field in fields(spec)}  # reflection: the fields of any spec


def setting_of(field: dataclasses.Field) -> Setting:
    """Return the metadata of a field. A field declared without `setting` has no limits and changes the result."""
    return field.metadata.get("setting", Setting())


def check_limits(value: Any, key: str = "") -> None:
    """Check every field of a spec, at any depth, against its limits.

    Args:
        value: Spec, or a dict or tuple that contains specs.
        key: Dotted key of ``value``, for the message.

    Raises:
        UserError: For the first value that is out of its limits.
    """
    if is_dataclass(value):
        for field, inner in zip(fields(value), field_values(value).values()):
            name = f"{key}.{field.name}".lstrip(".")
            _check(name, inner, setting_of(field))
            check_limits(inner, name)
    elif isinstance(value, (dict, tuple)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict):
                _check(f"{key}.{name}", inner, Setting())
            check_limits(inner, f"{key}.{name}")


def _check(key: str, value: Any, setting: Setting) -> None:
    items = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) and len(value) < setting.least_items:
        raise UserError(f"{key} is {value}; give at least {setting.least_items}")
    has = "has" if isinstance(value, tuple) else "is"
    for number in items:
        if number is None or not isinstance(number, (int, float)):
            continue
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{key} {has} {number}; give a finite number")
        if abs(number) >= LARGEST:
            raise UserError(f"{key} {has} {number}; give a number below 2^64")
        if setting.least is not None and not number >= setting.least:
            raise UserError(f"{key} {has} {number}; set it to at least {setting.least:g}")
        if setting.most is not None and not number <= setting.most:
            raise UserError(f"{key} {has} {number}; set it to at most {setting.most:g}")
        if setting.above is not None and not number > setting.above:
            raise UserError(f"{key} {has} {number}; set it above {setting.above:g}")
        if setting.below is not None and not number < setting.below:
            raise UserError(f"{key} {has} {number}; set it below {setting.below:g}")
