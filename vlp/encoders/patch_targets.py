"""Prediction targets of masked image modelling: pixels, or codes of a frozen tokenizer.

A spec has ``build(tower, load_weights) -> module``. The module is frozen and maps (B, 3, H, W) normalised images to (B, P) int64
codes below its ``width``, or to (B, P, ``width``) values. It is part of the model, so that a checkpoint contains everything a run
depends on. `vlp.encoders.dall_e` has the tokenizer of BEiT.

B images, P = h x w patches of p x q pixels, C = 3 p q values of a patch, K codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.encoders.base import PatchTower


def patchify(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cut (B, 3, H, W) images into (B, P, C) patches, row by row, with the values of a patch pixel by pixel as in MAE."""
    (batch, channels, height, width), (rows, columns) = image.shape, grid
    cut = image.reshape(batch, channels, rows, height // rows, columns, width // columns)  # (B, 3, h, p, w, q)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)  # (B, P, C)


def normalised(patches: Tensor) -> Tensor:
    """Normalise (B, P, C) patches to mean 0 and variance 1 each (unbiased, as published). A constant patch becomes 0."""
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


class Frozen(nn.Module):
    """A module that stays in evaluation mode when the model is switched to training."""

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


@dataclass(frozen=True)
class Pixels:
    """Prediction targets: the pixels of the patch (MAE, He et al. 2022, sec. 3).

    Args:
        normalise: Normalise each patch by its own mean and variance, which the paper found to be better than raw pixels.
    """

    normalise: bool = True

    def build(self, tower: PatchTower, load_weights: bool = True) -> PixelTargets:
        return PixelTargets(self, tower)


class PixelTargets(Frozen):
    """The module of `Pixels`."""

    def __init__(self, spec: Pixels, tower: PatchTower):
        super().__init__()
        self.normalise, self.grid = spec.normalise, tower.grid
        height, width = tower.preprocess.size
        self.width = 3 * (height // self.grid[0]) * (width // self.grid[1])

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        patches = patchify(image.float(), self.grid)  # (B, P, C)
        return normalised(patches) if self.normalise else patches


@dataclass(frozen=True)
class RandomCodes:
    """Prediction targets: codes of a random tokenizer, which needs no training and no file.

    A code is the row of a random codebook that is most similar to a random projection of the normalised patch (BEST-RQ, Chiu et
    al. 2022, sec. 3.1, there for speech).

    Args:
        codes: K.
        size: Width of the projection.
    """

    codes: int = 8192
    size: int = 16

    def build(self, tower: PatchTower, load_weights: bool = True) -> RandomTokenizer:
        return RandomTokenizer(self, tower)


class RandomTokenizer(Frozen):
    """The module of `RandomCodes`."""

    def __init__(self, spec: RandomCodes, tower: PatchTower):
        super().__init__()
        self.pixels, self.width = Pixels().build(tower), spec.codes
        # frozen parameters instead of buffers, which DDP would broadcast with every batch
        self.projection = nn.Parameter(torch.empty(self.pixels.width, spec.size), requires_grad=False)
        self.codebook = nn.Parameter(F.normalize(torch.randn(spec.codes, spec.size), dim=1), requires_grad=False)
        nn.init.xavier_uniform_(self.projection)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            projected = self.pixels(image) @ self.projection  # (B, P, size)
            # codebook rows have unit norm, so the nearest one has the largest product at any norm of the projection
            return torch.stack([(rows @ self.codebook.T).argmax(1) for rows in projected])  # (B, P)
