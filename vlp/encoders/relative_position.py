"""Learned biases of attention by relative position, for images, texts, and both in one sequence (VLMo, Bao et al. 2022).

N tokens, P = 1 + h w of an image (class token first), W of a text, C = layers * heads.
"""

from __future__ import annotations

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
