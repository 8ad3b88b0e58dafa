"""From decoded pixels to the ones that a model sees: crops, flips, RandAugment as ALBEF has it, SimCLR's distortions.

H, W pixels of the picture; h, w pixels that the model takes. Pixels stay uint8: `Preprocess.normalise` makes them float
once a batch, on the device.

A transform is called as ``transform(image, size, interpolation, rng, caption)``; it crops, resizes, flips, and then
carries out the steps of its ``then``, which are called with (3, h, w) uint8 and ``rng``, and return the same shape.
Every draw comes from ``rng``, so a sample's pixels are a function of the generator's seed alone.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate
from torchvision.transforms.v2 import functional as F

from vlp.errors import UserError

GREY = 128.0


def warp(image: Tensor, matrix: list[list[float]]) -> Tensor:
    """(3, h, w) moved, bilinearly; from outside comes grey 128.

    Args:
        matrix: (2, 3) from (x, y, 1) in ``image`` to (x, y) in the result, pixel centres at whole numbers (as OpenCV).
    """
    height, width = image.shape[1:]
    inverse = torch.linalg.inv(torch.tensor([*matrix, [0.0, 0.0, 1.0]], dtype=torch.float64)).tolist()
    y, x = torch.arange(float(height))[:, None], torch.arange(float(width))
    u, v = (a * x + b * y + c for a, b, c in inverse[:2])  # (h, w) each: where a pixel of the result comes from
    grid = torch.stack([(2 * u + 1) / width - 1, (2 * v + 1) / height - 1], -1)
    moved = grid_sample(image[None].float() - GREY, grid[None], align_corners=False)  # zeros outside
    return moved[0].add_(GREY).round_().to(torch.uint8)


def rotate(image: Tensor, degrees: float) -> Tensor:
    height, width = image.shape[1:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return warp(image, [[cos, sin, (1 - cos) * x - sin * y], [-sin, cos, sin * x + (1 - cos) * y]])


def sharpen(image: Tensor, factor: float) -> Tensor:
    pil = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())  # torchvision takes three times as long
    return to_tensor(np.array(ImageEnhance.Sharpness(pil).enhance(factor)))


# Each takes the image, the strength in [0, 1] and a sign of -1 or 1.
OPERATIONS = {
    "Identity": lambda image, strength, sign: image,
    "AutoContrast": lambda image, strength, sign: F.autocontrast(image),
    "Equalize": lambda image, strength, sign: F.equalize(image),
    "Brightness": lambda image, strength, sign: F.adjust_brightness(image, 1.8 * strength + 0.1),
    "Sharpness": lambda image, strength, sign: sharpen(image, 1.8 * strength + 0.1),
    "ShearX": lambda image, strength, sign: warp(image, [[1, sign * 0.3 * strength, 0], [0, 1, 0]]),
    "ShearY": lambda image, strength, sign: warp(image, [[1, 0, 0], [sign * 0.3 * strength, 1, 0]]),
    "TranslateX": lambda image, strength, sign: warp(image, [[1, 0, sign * 10 * strength], [0, 1, 0]]),
    "TranslateY": lambda image, strength, sign: warp(image, [[1, 0, 0], [0, 1, sign * 10 * strength]]),
    "Rotate": lambda image, strength, sign: rotate(image, sign * 30 * strength),
}


@dataclass(frozen=True)
class RandAugment:
    """ALBEF's ten operations without colour changes (its ``dataset/randaugment.py``), after Cubuk et al. 2020.

    ``n`` operations are drawn with replacement and each is carried out with ``probability``. At magnitude 7 of 10, as
    published: brightness and sharpness x 1.36 (never less than 1), shear 0.21 about the top left pixel, translation 7
    pixels whatever the image's size, rotation 21 degrees about (w/2, h/2); the last three with a random sign, bilinear,
    filled with grey 128: each within 1/255 of the published code's pixels (whose sharpness overflows at 0.4 % of them,
    which is not repeated here). torchvision's class of the same name has other strengths, signs and fill.
    """

    n: int = 2
    magnitude: float = 7.0
    probability: float = 0.5

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        for _ in range(self.n):
            operation = list(OPERATIONS.values())[rng.integers(len(OPERATIONS))]
            skip, negative = rng.random(2) > (self.probability, 0.5)
            if not skip:
                image = operation(image, self.magnitude / 10, -1 if negative else 1)
        return image


@dataclass(frozen=True)
class ColourDistortion:
    """SimCLR's colour jitter and greyscale (Chen et al. 2020, appendix A); ``strength`` is the paper's s."""

    strength: float = 1.0
    probability: float = 0.8
    greyscale: float = 0.2

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        if rng.random() < self.probability:
            wide, hue = 0.8 * self.strength, 0.2 * self.strength
            factors = rng.uniform(max(0.0, 1 - wide), 1 + wide, 3)
            turn = rng.uniform(-hue, hue)
            jitters = [
                lambda x: F.adjust_brightness(x, factors[0]),
                lambda x: F.adjust_contrast(x, factors[1]),
                lambda x: F.adjust_saturation(x, factors[2]),
                lambda x: F.adjust_hue(x, turn),
            ]
            for i in rng.permutation(4):
                image = jitters[i](image)
        if rng.random() < self.greyscale:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        return image


@dataclass(frozen=True)
class GaussianBlur:
    """SimCLR's blur (Chen et al. 2020, appendix A): kernel of a tenth of the side, sigma uniform in pixels."""

    probability: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        if rng.random() >= self.probability:
            return image
        kernel = [side // 20 * 2 + 1 for side in (image.shape[-1], image.shape[-2])]  # (x, y), odd
        return F.gaussian_blur(image, kernel, [rng.uniform(*self.sigma)] * 2)


Step = RandAugment | ColourDistortion | GaussianBlur


def mentions_side(caption: str) -> bool:
    """Whether mirroring the image would make the caption wrong: it has the word left or right."""
    return re.search(r"\b(left|right)\b", caption, re.IGNORECASE) is not None


def resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """(3, H, W) uint8 to (3, h, w) uint8, antialiased as PIL does it, within 2/255 of PIL's pixels.

    Fastest (by 5x over PIL, with torch's kernel for bytes) where the memory of ``image`` is in the order (H, W, 3).
    """
    if interpolation not in ("bicubic", "bilinear"):
        raise UserError(f"interpolation {interpolation!r} is unknown; use 'bicubic' or 'bilinear'")
    height, width = image.shape[1:]
    image = image[None]
    # The height first in the cases where Pillow >= 13 does so; torch begins with the width. What the first pass clips
    # to [0, 255] makes a difference of up to 30 at sharp edges.
    if height > size[0] and height - size[0] > 2 * (width - size[1]):
        image = interpolate(image, (size[0], width), mode=interpolation, antialias=True)
    return interpolate(image, size, mode=interpolation, antialias=True)[0]


def finish(image: Tensor, flip: float, then: tuple[Step, ...], rng: np.random.Generator, caption: str) -> Tensor:
    """Mirror with probability ``flip``, never where the caption mentions a side; then the further steps in order."""
    if rng.random() < flip and not mentions_side(caption):
        image = image.flip(-1)
    for step in then:
        image = step(image, rng)
    return image


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) to a (3, H, W) view of the same memory."""
    return torch.from_numpy(image).permute(2, 0, 1)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, resized: its share of the area in ``scale``, its width over height in ``ratio``.

    Drawn as torchvision draws it. ALBEF: scale (0.2, 1), ``then=(RandAugment(),)``; open_clip: scale (0.9, 1), flip 0.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    then: tuple[Step, ...] = ()

    def __call__(
        self, image: np.ndarray, size: tuple[int, int], interpolation: str, rng: np.random.Generator, caption: str = ""
    ) -> Tensor:
        top, left, height, width = self.box(image.shape[0], image.shape[1], rng)
        crop = to_tensor(image)[:, top : top + height, left : left + width]
        return finish(resize(crop, size, interpolation), self.flip, self.then, rng, caption)

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(top, left, height, width) in pixels: the first of ten draws that fits, or else the largest centred one."""
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class ResizeCrop:
    """ALIGN's: squashed to a rectangle of the model's shape, then a random crop whose side is ``fraction`` of it.

    The published numbers are a square of 346 pixels and a crop of 289.
    """

    fraction: float = 289 / 346
    flip: float = 0.5
    then: tuple[Step, ...] = ()

    def __call__(
        self, image: np.ndarray, size: tuple[int, int], interpolation: str, rng: np.random.Generator, caption: str = ""
    ) -> Tensor:
        height, width = (round(side / self.fraction) for side in size)
        whole = resize(to_tensor(image), (height, width), interpolation)
        top, left = (int(rng.integers(a - b + 1)) for a, b in zip((height, width), size))
        return finish(whole[:, top : top + size[0], left : left + size[1]], self.flip, self.then, rng, caption)


@dataclass(frozen=True)
class Resize:
    """The whole image or its centre, nothing random: for evaluation.

    ``mode`` "center" scales so that the model's shape is just covered (open_clip, timm); "squash" ignores the image's
    shape (ALBEF, ALIGN). Then the centre is cut out, its side ``fraction`` of the resized one (timm's crop_pct; ALIGN
    289/346).
    """

    mode: Literal["center", "squash"] = "center"
    fraction: float = 1.0

    def __call__(
        self,
        image: np.ndarray,
        size: tuple[int, int],
        interpolation: str,
        rng: np.random.Generator | None = None,
        caption: str = "",
    ) -> Tensor:
        height, width = (round(side / self.fraction) for side in size)
        if self.mode == "center":  # one side fits exactly, the other is rounded down, as torchvision's Resize does
            h, w = image.shape[:2]
            height, width = max(height, width * h // w), max(width, height * w // h)
        top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
        return resize(to_tensor(image), (height, width), interpolation)[:, top : top + size[0], left : left + size[1]]


Transform = RandomResizedCrop | ResizeCrop | Resize


def simclr(strength: float = 1.0, flip: float = 0.5) -> RandomResizedCrop:
    """SimCLR's views (Chen et al. 2020, appendix A): small crops, colour distortion, blur."""
    return RandomResizedCrop(scale=(0.08, 1.0), flip=flip, then=(ColourDistortion(strength), GaussianBlur()))
