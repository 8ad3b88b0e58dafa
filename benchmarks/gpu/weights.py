"""Weights in a quarter of their bytes, to be carried: matrices as 8-bit rows with a scale for each, the rest in float16.

Rounding moves a weight by at most half a 254th of its row's range: enough of a start for training, not for published numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = ".scale"
SMALLEST = 4096  # values of a tensor that is worth rounding


def rounded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """NAME -> int8 and NAME.scale -> float16 for large matrices; float16 for other floats; the rest as it is."""
    found: dict[str, Tensor] = {}
    for name, x in state.items():
        if not x.is_floating_point():
            found[name] = x
        elif x.ndim < 2 or x.numel() < SMALLEST:
            found[name] = x.half().contiguous()
        else:
            rows = x.flatten(1).float()
            scale = (rows.abs().amax(1, keepdim=True) / 127).half().clamp(min=1e-7)
            found[name] = (rows / scale.float()).round().clamp(-127, 127).to(torch.int8).view(x.shape).contiguous()
            found[name + SCALE] = scale[:, 0]
    return found


def restored(carried: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float32 state that was `rounded`."""
    found: dict[str, Tensor] = {}
    for name, x in carried.items():
        if name.endswith(SCALE):
            continue
        scale = carried.get(name + SCALE)
        if scale is not None:
            found[name] = x.float() * scale.float().view(-1, *[1] * (x.ndim - 1))
        else:
            found[name] = x.float() if x.is_floating_point() else x
    return found
