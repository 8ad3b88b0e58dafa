"""What masked image modelling predicts of a patch: codes of a frozen tokenizer, or pixels.

A spec has ``build(tower, load_weights) -> module``; the module is frozen, has ``width``, the outputs that its prediction
takes, and maps (B, 3, H, W) normalised pictures to (B, P) int64 codes below ``width``, or to (B, P, width) values. It is
part of the model, so that a checkpoint holds all that a run depends on. `vlp.encoders.dall_e` has BEiT's own tokenizer.

B pictures, P = h x w patches of p x q pixels, C = 3 p q values of a patch, K codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.encoders.base import PatchTower


def patchify(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) to (B, P, C), patches row by row, a patch's values pixel by pixel, as MAE orders them."""
    (batch, channels, height, width), (rows, columns) = image.shape, grid
    cut = image.reshape(batch, channels, rows, height // rows, columns, width // columns)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def normalised(patches: Tensor) -> Tensor:
    """(B, P, C) with mean 0 and variance 1 (unbiased, as published) within each patch; a flat one becomes 0."""
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


class Frozen(nn.Module):
    """Stays in evaluation mode, whatever the model is put to."""

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


@dataclass(frozen=True)
class Pixels:
    """The patch's own pixels (MAE, He et al. 2022, sec. 3).

    Args:
        normalise: each patch by its own mean and variance, which the paper found to be better than the pixels as they are.
    """

    normalise: bool = True

    def build(self, tower: PatchTower, load_weights: bool = True) -> PixelTargets:
        return PixelTargets(self, tower)


class PixelTargets(Frozen):
    def __init__(self, spec: Pixels, tower: PatchTower):
        super().__init__()
        self.normalise, self.grid = spec.normalise, tower.grid
        height, width = tower.preprocess.size
        self.width = 3 * (height // self.grid[0]) * (width // self.grid[1])

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        patches = patchify(image.float(), self.grid)
        return normalised(patches) if self.normalise else patches


@dataclass(frozen=True)
class RandomCodes:
    """A tokenizer that needs no training and no file: the row of a random codebook that is most similar to a random
    projection of the normalised patch (BEST-RQ, Chiu et al. 2022, sec. 3.1, there for speech).

    Args:
        codes: K.
        size: of the projections.
    """

    codes: int = 8192
    size: int = 16

    def build(self, tower: PatchTower, load_weights: bool = True) -> RandomTokenizer:
        return RandomTokenizer(self, tower)


class RandomTokenizer(Frozen):
    def __init__(self, spec: RandomCodes, tower: PatchTower):
        super().__init__()
        self.pixels, self.width = Pixels().build(tower), spec.codes
        # frozen parameters, not buffers: DDP sends buffers again with every batch
        self.projection = nn.Parameter(torch.empty(self.pixels.width, spec.size), requires_grad=False)
        self.codebook = nn.Parameter(F.normalize(torch.randn(spec.codes, spec.size), dim=1), requires_grad=False)
        nn.init.xavier_uniform_(self.projection)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            projected = self.pixels(image) @ self.projection
            # the nearest unit row is the one of the largest product, whatever the projection's own length
            return torch.stack([(rows @ self.codebook.T).argmax(1) for rows in projected])
