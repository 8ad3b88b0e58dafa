"""A printed spec is the Python expression that makes it."""

from dataclasses import dataclass, field
from typing import Any

import pytest

import vlp.specs.names as names
from tests.fixtures.toy import config as toy
from vlp.specs.names import class_of
from vlp.specs.text import WIDTH, to_text


def test_expression_evaluates_to_the_spec():
    text = to_text(toy())
    assert eval(text, {name: class_of(name) for name in names.TYPES}) == toy()


def test_values_other_than_the_default_are_arguments_and_defaults_a_comment():
    lines = [line.strip() for line in to_text(toy()).splitlines()]
    assert "label_smoothing=0.1," in lines and "batch_size=8," in lines
    assert any(line.startswith("# default: ") and "momentum=None" in line and "seed=0" in line for line in lines)
    assert "seed=0," not in lines


@dataclass(frozen=True)
class Holder:
    value: Any = None
    items: dict = field(default_factory=dict)


@pytest.mark.parametrize(
    "value", [{f"key{n}": n for n in range(40)}, tuple(range(100)), {"a": (Holder(),)}, {"type": {}}, (), {}]
)
def test_long_collections_are_broken_into_lines(value):
    text = to_text(Holder(value))
    assert eval(text, {"Holder": Holder}) == Holder(value)
    assert max(map(len, text.splitlines())) <= WIDTH + 1
