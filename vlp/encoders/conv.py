"""A small convolutional image tower, for training from random weights in minutes.

B images, H x W pixels, h x w grid, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from vlp.data.preprocess import Interpolation, Preprocess, Triple
from vlp.encoders.base import ImageTower, ImageTowerSpec
from vlp.errors import UserError
from vlp.specs.fields import check_limits, setting
from vlp.weights import reading
from vlp.weights.run import read_run, tower_spec


@dataclass(frozen=True)
class ConvImage(ImageTowerSpec):
    """Spec of convolutions of 3 x 3, the first one of 5 x 5, each with BatchNorm and ReLU.

    Args:
        channels: Output channels of each convolution. The last one is the width of the tower.
        strides: Stride of each convolution. Their product is the side of a grid cell in pixels.
        weights: A run folder, whose newest image tower is taken. None starts at random.
        image_size: In pixels, one number or (H, W).
        mean: Of the pixels, per channel.
        std: Of the pixels, per channel.
        interpolation: For resizing images.
    """

    channels: tuple[int, ...] = setting((32, 48, 64, 64, 96, 128, 128), least=1, least_items=1)
    strides: tuple[int, ...] = setting((2, 1, 2, 1, 1, 2, 1), least=1, least_items=1)
    weights: str | None = None
    image_size: int | tuple[int, int] = 64
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)
    interpolation: Interpolation = "bilinear"

    def resolved(self) -> ConvImage:
        """Return the same tower with both sides of the images filled in."""
        return replace(self, image_size=tuple(to_2tuple(self.image_size)))

    def build(self, load_weights: bool = True) -> ConvTower:
        """Build the tower.

        Args:
            load_weights: False leaves the parameters random even where ``weights`` is set.

        Raises:
            UserError: if channels and strides do not go together, or the weights do not fit.
        """
        check_limits(self)
        if len(self.channels) != len(self.strides):
            raise UserError(
                f"{len(self.channels)} convolutions have {len(self.strides)} strides; give as many strides as channels"
            )
        tower = ConvTower(self.resolved())
        if load_weights and self.weights:
            tower_spec(self.weights, "image", ConvImage)
            tower.report = reading.load(tower, read_run(self.weights, "image"))
        return tower


class ConvTower(ImageTower):
    """Convolutions. The pooled token is the maximum over the grid of each channel.

    A mean would dilute the shape of a small thing with its background.

    Args:
        spec: Resolved.
    """

    grid: tuple[int, int]
    grid_has_positions = False

    def __init__(self, spec: ConvImage):
        super().__init__()
        height, width = spec.image_size
        stride = math.prod(spec.strides)
        self.width, self.grid = spec.channels[-1], (math.ceil(height / stride), math.ceil(width / stride))
        self.preprocess = Preprocess(spec.image_size, spec.mean, spec.std, spec.interpolation)
        sides = (5, *[3] * (len(spec.channels) - 1))
        sizes = zip((3, *spec.channels), spec.channels, spec.strides, sides)
        self.convolutions = nn.Sequential(*(_convolution(*size) for size in sizes))

    def forward(self, image: Tensor) -> Tensor:
        """Return (B, 1 + h w, D) tokens of (B, 3, H, W) normalised images."""
        grid = self.convolutions(image).flatten(2).mT  # (B, D, h, w) -> (B, h w, D)
        return torch.cat([grid.amax(1, keepdim=True), grid], 1)  # (B, 1 + h w, D)


def _convolution(channels: int, out: int, stride: int, side: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, side, stride, side // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True))
