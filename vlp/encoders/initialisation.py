"""Standard deviations of random weights."""

from __future__ import annotations

import math
from typing import Literal

Init = Literal["published", "width"]
"""Rule of `init_std`."""


def init_std(init: Init, width: int) -> float:
    """Return the standard deviation of the random weights of a transformer.

    "published" is 0.02 at every width, as in BERT, ViT and BEiT. It suits the width of 768. In narrower layers the outputs of a
    matrix shrink with the root of the width, so that attention hardly changes the states it is added to. "width" is
    ``0.02 sqrt(768 / width)``, which is the same at 768.

    Args:
        init: The rule.
        width: D of the layers.
    """
    return 0.02 if init == "published" else 0.02 * math.sqrt(768 / width)
