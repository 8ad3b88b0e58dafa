"""Learned biases of attention by relative position, for images, texts, and both in one sequence (VLMo, Bao et al. 2022).

N tokens, P = 1 + h w of an image (class token first), W of a text, C = layers * heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def image_index(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """(P, P) int64 rows of an image's table, (2h - 1)(2w - 1) + 3 of them, as BEiT numbers them.

    Between patches by (rows, columns) apart; then the class token's to patches, theirs to it, and its own.
    """
    height, width = grid
    y, x = (
        c.flatten()
        for c in torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    )
    down, right = y[:, None] - y + height - 1, x[:, None] - x + width - 1
    return _with_class_token(down * (2 * width - 1) + right, (2 * height - 1) * (2 * width - 1))


def text_index(width: int, max_length: int, device: torch.device | None = None) -> Tensor:
    """(W, W) int64 rows of a text's table, 2 * ``max_length`` of them; the first token counts as its class token."""
    place = torch.arange(width - 1, device=device)
    return _with_class_token(place - place[:, None] + max_length - 2, 2 * max_length - 3)


def _with_class_token(between: Tensor, distances: int) -> Tensor:
    size = len(between) + 1
    index = between.new_empty(size, size)
    index[1:, 1:] = between
    index[0, :], index[:, 0], index[0, 0] = distances, distances + 1, distances + 2
    return index


class RelativePositions(nn.Module):
    """One table for every kind of pair of tokens; a column for every head of every layer.

    They are parameters of their own, so that a stage can train one and leave the others.

    Args:
        grid: (h, w) patches; None = no images.
        max_text_length: longest text; None = no texts.
        joint: whether texts and images stand in one sequence; by two rows, text to image and image to text.
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
        """What is added to the scores of each layer: (heads, N, N), N = W + P, the text first.

        Args:
            width: W; 0 = no text.
            image: whether there is an image.
        """
        parts = []
        if width:
            parts.append(_rows(self.text, text_index(width, self.max_text_length, self.text.device)))
        if image:
            parts.append(_rows(self.image, image_index(self.grid, self.image.device)))
        if len(parts) == 2:
            (text, patches), (there, back) = parts, self.cross[:, :, None, None]
            top = torch.cat([text, there.expand(-1, width, patches.shape[2])], 2)
            bottom = torch.cat([back.expand(-1, patches.shape[1], width), patches], 2)
            parts = [torch.cat([top, bottom], 1)]
        return parts[0].unflatten(0, (self.layers, -1)).unbind()


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """(rows, C) and (N, N) to (C, N, N)."""
    return table.T.index_select(1, index.flatten()).unflatten(1, index.shape)


@dataclass(frozen=True)
class TableGrid:
    """Of which patches an image's table is: `vlp.weights.reading.load` resizes one by it.

    Args:
        size: (h, w) of the module's images.
        source: of the weights; None = square.
    """

    size: tuple[int, int]
    source: tuple[int, int] | None = None

    def resize(self, table: Tensor) -> Tensor:
        """((2h - 1)(2w - 1) + 3, C) for ``size``, as BEiT does: cubic between source distances that are spread geometrically.

        Near distances, where biases vary most, keep their place. The class token's three rows stay as they are. A table of no
        such grid is returned as it is.
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
    """(2 size - 1, 2 source - 1) float64: what takes values at the distances among ``source`` patches to those among ``size``.

    The source's distances are taken for 0, 1, 1 + q, 1 + q + q^2, ..., with the q at which they reach as far as
    the others.
    """
    if source in (1, size):
        return torch.eye(2 * source - 1, dtype=torch.float64).expand(2 * size - 1, -1)
    low, high = 1.01, 1.5  # BEiT's bounds of q
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (source - 1)) / (1 - q) > size - 1 else (q, high)
    far = (low ** torch.arange(source - 1, dtype=torch.float64)).cumsum(0)
    known = torch.cat([-far.flip(0), torch.zeros(1), far]) / far[-1]
    asked = (torch.arange(1 - size, size, dtype=torch.float64) / far[-1]).clamp(-1, 1)  # nothing is known beyond
    return spline_basis(asked, known) @ torch.linalg.inv(spline_basis(known, known))


def spline_basis(x: Tensor, knots: Tensor) -> Tensor:
    """(m,) places to (m, n) cubic splines on n knots, polynomials beyond the second and second to last ("not a knot")."""
    powers = x[:, None] ** torch.arange(min(4, len(knots)))
    return torch.cat([powers, (x[:, None] - knots[2:-2]).clamp(min=0) ** 3], 1)
