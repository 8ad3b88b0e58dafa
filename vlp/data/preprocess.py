"""Input format of an image tower: size, normalisation and interpolation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Triple = tuple[float, float, float]


Interpolation = Literal["bicubic", "bilinear"]


@dataclass(frozen=True)
class Preprocess:
    """Pixel format that an image tower was trained with. It belongs to the weights and is stored with them.

    Args:
        size: (H, W) in pixels.
        mean: Mean per channel, of values in [0, 1].
        std: Standard deviation per channel, of values in [0, 1].
        interpolation: Filter that images are resized with.
    """

    size: tuple[int, int]
    mean: Triple
    std: Triple
    interpolation: Interpolation

    def normalise(self, image: Tensor) -> Tensor:
        """Compute ``(image / 255 - mean) / std`` on the device of the image.

        Args:
            image: (B, 3, H, W) uint8.

        Returns:
            (B, 3, H, W) float32.

        Raises:
            ValueError: if the image is not uint8, which usually means that it was normalised before.
        """
        if image.dtype != torch.uint8:
            raise ValueError(f"normalise takes uint8 images, not {image.dtype}")
        factor, shift = _constants(self.mean, self.std, image.device)
        # one multiplication and one subtraction, in place: the batch is copied once, by float()
        return image.float().mul_(factor).sub_(shift)


@cache  # copying numbers to a device makes the host wait
def _constants(mean: Triple, std: Triple, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (3, 1, 1) factor and shift with which uint8 images are normalised."""
    means, stds = (torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1) for values in (mean, std))
    return 1 / (255 * stds), means / stds
