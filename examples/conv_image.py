"""An image tower of your own: four strided convolutions, pooled by the mean of the grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlp.data.preprocess import Preprocess
from vlp.encoders.base import ImageTower, ImageTowerSpec
from vlp.weights import reading
from vlp.weights.run import read_run


@dataclass(frozen=True)
class ConvNet(ImageTowerSpec):
    width: int = 128
    image_size: int = 64
    weights: str | None = None  # a run folder

    def build(self, load_weights: bool = True) -> ConvTower:
        tower = ConvTower(self)
        if load_weights and self.weights:
            tower.report = reading.load(tower, read_run(self.weights, "image"))
        return tower


class ConvTower(ImageTower):
    def __init__(self, spec: ConvNet):
        super().__init__()
        self.width, self.grid = spec.width, (spec.image_size // 16, spec.image_size // 16)
        self.preprocess = Preprocess((spec.image_size, spec.image_size), (0.5,) * 3, (0.5,) * 3, "bilinear")
        widths = [(3, 32), (32, 64), (64, 128), (128, spec.width)]
        layers = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.GELU()) for a, b in widths]
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        grid = self.layers(image).flatten(2).mT  # (B, D, h, w) -> (B, h w, D)
        return torch.cat([grid.mean(1, keepdim=True), grid], 1)  # (B, 1 + h w, D)
