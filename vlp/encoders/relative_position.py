"""Learned relative position biases of attention, for images, texts, and both in one sequence (VLMo, Bao et al. 2022).

N = W + P tokens, P = 1 + h w tokens of an image (class token first), W tokens of a text, C = layers * heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def image_index(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Return the (P, P) int64 rows of the image table for each pair of tokens, numbered as in BEiT.

    The table has (2h - 1)(2w - 1) rows for the distances between patches, then one for class token to patch, one for patch to
    class token, and one for the class token to itself.

    Args:
        grid: (h, w).
        device: Of the result.
    """
    height, width = grid
    y, x = (
        c.flatten()
        for c in torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    )
    down, right = y[:, None] - y + height - 1, x[:, None] - x + width - 1  # (h w, h w), from 0
    return _with_class_token(down * (2 * width - 1) + right, (2 * height - 1) * (2 * width - 1))


def text_index(width: int, max_length: int, device: torch.device | None = None) -> Tensor:
    """Return the (W, W) int64 rows of the text table for each pair of tokens. The first token counts as a class token.

    Args:
        width: W.
        max_length: Longest text. The table has 2 * ``max_length`` rows.
        device: Of the result.
    """
    position = torch.arange(width - 1, device=device)
    return _with_class_token(position - position[:, None] + max_length - 2, 2 * max_length - 3)


def _with_class_token(between: Tensor, distances: int) -> Tensor:
    size = len(between) + 1
    index = between.new_empty(size, size)
    index[1:, 1:] = between
    index[0, :], index[:, 0], index[0, 0] = distances, distances + 1, distances + 2
    return index


class RelativePositions(nn.Module):
    """Three tables of biases, for pairs within images, within texts, and across, with a column per head of each layer.

    They are separate parameters, so that a stage can train one and freeze the others.

    Args:
        layers: Number of layers.
        heads: Heads per layer.
        grid: (h, w) patches. None for a model without images.
        max_text_length: Longest text. None for a model without texts.
        joint: Whether there are sequences of a text and an image. The table across has two rows, one per direction.
    """

    def __init__(self, layers: int, heads: int, grid: tuple[int, int] | None, max_text_length: int | None, joint: bool):
        super().__init__()
        self.layers, self.grid, self.max_text_length = layers, grid, max_text_length

        def table(rows: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(rows, layers * heads))

        self.image = table((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3) if grid else None
        self.text = table(2 * max_text_length) if max_text_length else None
        self.cross = table(2) if joint else None

    def forward(self, width: int, image: bool) -> tuple[Tensor, ...]:
        """Return the biases of each layer, (heads, N, N), text tokens first.

        Args:
            width: W, 0 without a text.
            image: Whether there is an image.
        """
        parts = []
        if width:
            parts.append(_rows(self.text, text_index(width, self.max_text_length, self.text.device)))  # (C, W, W)
        if image:
            parts.append(_rows(self.image, image_index(self.grid, self.image.device)))  # (C, P, P)
        if len(parts) == 2:
            (text, patches), (to_image, to_text) = parts, self.cross[:, :, None, None]
            top = torch.cat([text, to_image.expand(-1, width, patches.shape[2])], 2)  # (C, W, N)
            bottom = torch.cat([to_text.expand(-1, patches.shape[1], width), patches], 2)  # (C, P, N)
            parts = [torch.cat([top, bottom], 1)]  # (C, N, N)
        return parts[0].unflatten(0, (self.layers, -1)).unbind()


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Look up (N, N) rows of a (rows, C) table, as (C, N, N)."""
    return table.T.index_select(1, index.flatten()).unflatten(1, index.shape)


@dataclass(frozen=True)
class TableGrid:
    """The patch grid of an image table, by which `vlp.weights.reading.load` resizes the table.

    Args:
        size: (h, w) in the module.
        source: (h, w) in the weights. None means square.
    """

    size: tuple[int, int]
    source: tuple[int, int] | None = None

    def resize(self, table: Tensor) -> Tensor:
        """Resize a table to ``size`` as BEiT does: by cubic splines between source distances that are spread geometrically.

        So short distances, where biases vary most, keep their values. The three rows of the class token do not change. A table
        whose number of rows does not fit ``source`` is returned unchanged.

        Args:
            table: ((2h - 1)(2w - 1) + 3, C) in the weights.
        """
        side = (math.isqrt(max(len(table) - 3, 0)) + 1) // 2
        source = self.source or (side, side)
        rows, columns = (2 * each - 1 for each in source)
        if rows * columns + 3 != len(table):
            return table
        down, across = (spread(old, new).to(table) for old, new in zip(source, self.size))
        near = torch.einsum("yh,xw,hwc->yxc", down, across, table[:-3].unflatten(0, (rows, columns)))
        return torch.cat([near.flatten(0, 1), table[-3:]])


def spread(source: int, size: int) -> Tensor:
    """Return the matrix that interpolates values at the distances of ``source`` patches to the distances of ``size`` patches.

    The source distances count as 0, 1, 1 + q, 1 + q + q^2, ..., with the q at which the largest equals that of ``size``.

    Returns:
        (2 size - 1, 2 source - 1) float64.
    """
    if source in (1, size):
        return torch.eye(2 * source - 1, dtype=torch.float64).expand(2 * size - 1, -1)
    low, high = 1.01, 1.5  # BEiT's bounds of q
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (source - 1)) / (1 - q) > size - 1 else (q, high)
    far = (low ** torch.arange(source - 1, dtype=torch.float64)).cumsum(0)
    known = torch.cat([-far.flip(0), torch.zeros(1), far]) / far[-1]
    wanted = (torch.arange(1 - size, size, dtype=torch.float64) / far[-1]).clamp(-1, 1)  # no extrapolation
    return spline_basis(wanted, known) @ torch.linalg.inv(spline_basis(known, known))


def spline_basis(x: Tensor, knots: Tensor) -> Tensor:
    """Evaluate the basis of "not-a-knot" cubic splines on (n,) knots at (m,) positions, (m, n)."""
    powers = x[:, None] ** torch.arange(min(4, len(knots)))
    return torch.cat([powers, (x[:, None] - knots[2:-2]).clamp(min=0) ** 3], 1)
