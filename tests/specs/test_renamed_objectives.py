"""Objectives of earlier versions are read with the field names and values of today."""

import pytest

from vlp.objectives.answer import Captioning
from vlp.objectives.assignment import TextAssignment
from vlp.objectives.itc import MomentumContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.masking import TextMasking
from vlp.objectives.mlm import MaskedText
from vlp.objectives.moco import Moco
from vlp.objectives.pairwise import PairContrast
from vlp.specs.json import from_plain

MLM = {
    "type": "MaskedText",
    "mean_over": "process",
    "masking": {"type": "TextMasking", "of": "word", "spared": "first"},
}
CASES = [
    (MLM, MaskedText(mean_over="local", masking=TextMasking(unit="word", exclude="first"))),
    ({"type": "MaskedText", "mean_over": "all"}, MaskedText(mean_over="global")),
    ({"type": "Captioning", "mean_over": "process"}, Captioning(mean_over="local")),
    (
        {"type": "ImageTextMatching", "candidates": "all", "same_picture": "left_out", "keys": "student"},
        ImageTextMatching(candidates="global", duplicates="mask", keys="student"),
    ),
    (
        {"type": "ImageTextMatching", "candidates": "process", "same_picture": "negative"},
        ImageTextMatching(candidates="local", duplicates="negative"),
    ),
    (
        {"type": "MomentumContrast", "keys": "process", "same_picture": "positive"},
        MomentumContrast(keys="local", duplicates="positive"),
    ),
    ({"type": "Moco", "same_picture": "left_out"}, Moco(duplicates="mask")),
    ({"type": "PairContrast", "others": 3}, PairContrast(num_others=3)),
    ({"type": "TextAssignment", "none": 0.25}, TextAssignment(neither=0.25)),
]


@pytest.mark.parametrize(("stored", "expected"), CASES, ids=[type(expected).__name__ for _, expected in CASES])
def test_old_field_names_and_values_are_read(stored, expected):
    assert from_plain(stored) == expected
