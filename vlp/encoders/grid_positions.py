"""2-D positions of the tokens of an image grid.

h x w grid, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sine_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Return (h w, D) sines and cosines of the row in the first half of D and of the column in the second half.

    As in DETR (Carion et al. 2020) and MoCo v3, with frequencies from 1 down to 1 / 10,000. If D is not a multiple of 4, the last
    columns are zero.
    """
    frequencies = 10_000 ** -torch.linspace(0, 1, width // 4)  # (D / 4,)
    row, column = (torch.arange(float(side))[:, None] * frequencies for side in grid)  # (h, D / 4), (w, D / 4)
    row, column = (torch.cat([angle.sin(), angle.cos()], 1) for angle in (row, column))  # (h, D / 2), (w, D / 2)
    table = torch.zeros(*grid, width)  # (h, w, D)
    half = row.shape[1]
    table[..., :half], table[..., half : 2 * half] = row[:, None], column
    return table.flatten(0, 1)
