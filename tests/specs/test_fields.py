"""Limits of values are declared next to the fields and hold at any depth."""

import math
from dataclasses import dataclass, fields
from typing import Any

import pytest

from vlp.errors import UserError
from vlp.specs.fields import check_limits, setting, setting_of


@dataclass(frozen=True)
class Inner:
    decay: float | None = setting(0.9, least=0, most=1)
    betas: tuple[float, ...] = setting((0.9, 0.98), least=0, below=1)
    ks: tuple[int, ...] = setting((1,), least=1, least_items=1)
    workers: int = setting(1, least=0, changes_result=False)
    norm: float | None = setting(1.0, above=0)
    name: str = "x"


@dataclass(frozen=True)
class Outer:
    steps: int = setting(least=1)
    parts: Any = setting(default_factory=dict)


def test_values_at_the_limits_pass():
    check_limits(Outer(1, {"a": Inner(0.0, (0.0,), (1,), 0), "b": (Inner(1), Inner(None))}))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Outer(0), "steps is 0; set it to at least 1"),
        (Outer(1, Inner(decay=1.5)), "parts.decay is 1.5; set it to at most 1"),
        (Outer(1, {"a": (Inner(), Inner(decay=-1))}), "parts.a.1.decay is -1; set it to at least 0"),
        (Outer(1, Inner(betas=(0.9, 1.0))), "parts.betas has 1.0; set it below 1"),
        (Outer(1, Inner(norm=0.0)), "parts.norm is 0.0; set it above 0"),
        (Outer(1, Inner(ks=())), r"parts.ks is \(\); give at least 1"),
        (Outer(1, Inner(ks=(1, 0))), "parts.ks has 0; set it to at least 1"),
        (Outer(1, Inner(decay=math.nan)), "parts.decay is nan"),
    ],
)
def test_value_out_of_its_limits_is_named_by_its_dotted_key(spec, message):
    with pytest.raises(UserError, match=message):
        check_limits(spec)


def test_required_field_and_factory_behave_as_in_any_dataclass():
    with pytest.raises(TypeError, match="steps"):
        Outer()
    assert Outer(1).parts == {} and Outer(1).parts is not Outer(1).parts


def test_fields_that_do_not_change_the_result_are_marked():
    assert [f.name for f in fields(Inner) if not setting_of(f).changes_result] == ["workers"]
