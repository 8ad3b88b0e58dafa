"""Image transforms: crops, flips, ALBEF's RandAugment, SimCLR's distortions.

H, W pixels of the image; h, w pixels of the model's input. Pixels stay uint8; `Preprocess.normalise` converts a batch to
float on the device.

A transform is called as ``transform(image, size, interpolation, rng, caption)``. It crops, resizes, flips, and applies the
steps in its field ``then``. A step is called with a (3, h, w) uint8 image and ``rng``, and returns the same shape. Every
draw comes from ``rng``, so the pixels of a sample depend only on the seed of the generator.
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
from vlp.specs.fields import setting

GREY = 128.0


def warp(image: Tensor, matrix: list[list[float]]) -> Tensor:
    """Apply an affine transform with bilinear interpolation, filled with grey 128.

    Args:
        image: (3, h, w) uint8.
        matrix: (2, 3) map from (x, y, 1) in ``image`` to (x, y) in the result, pixel centres at integers (as OpenCV).

    Returns:
        (3, h, w) uint8.
    """
    height, width = image.shape[1:]
    inverse = torch.linalg.inv(torch.tensor([*matrix, [0.0, 0.0, 1.0]], dtype=torch.float64)).tolist()
    y, x = torch.arange(float(height))[:, None], torch.arange(float(width))
    u, v = (a * x + b * y + c for a, b, c in inverse[:2])  # (h, w) each: source coordinates of each pixel of the result
    grid = torch.stack([(2 * u + 1) / width - 1, (2 * v + 1) / height - 1], -1)  # (h, w, 2) in [-1, 1]
    moved = grid_sample(image[None].float() - GREY, grid[None], align_corners=False)  # (1, 3, h, w), zero outside
    return moved[0].add_(GREY).round_().to(torch.uint8)


def rotate(image: Tensor, degrees: float) -> Tensor:
    """Rotate about (w/2, h/2), filled with grey 128."""
    height, width = image.shape[1:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return warp(image, [[cos, sin, (1 - cos) * x - sin * y], [-sin, cos, sin * x + (1 - cos) * y]])


def sharpen(image: Tensor, factor: float) -> Tensor:
    """Apply PIL's sharpness enhancement."""
    pil = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())  # a third of torchvision's time
    return to_tensor(np.array(ImageEnhance.Sharpness(pil).enhance(factor)))


# Arguments: image, strength in [0, 1], sign of -1 or 1.
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

    ``n`` operations are drawn with replacement, and each is applied with ``probability``. At the published magnitude of 7
    of 10: brightness and sharpness x 1.36 (never less than 1), shear 0.21 about the top left pixel, translation by 7
    pixels for every image size, rotation by 21 degrees about (w/2, h/2). The last three have a random sign, are bilinear
    and filled with grey 128. Each result is within 1/255 of the published code's pixels, with two exceptions
    that are not reproduced. Its sharpness overflows at 0.4 % of the pixels. Its AutoContrast negates the darkest value as
    uint8, so that every channel whose darkest value is not 0 becomes white. torchvision's class of the same name has
    other strengths, signs and fill.

    Args:
        n: Number of operations.
        magnitude: From 0 to 10.
        probability: Probability that a drawn operation is applied.
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
    """SimCLR's colour jitter and greyscale (Chen et al. 2020, appendix A).

    Args:
        strength: s of the paper.
        probability: Probability of the colour jitter.
        greyscale: Probability of the conversion to grey.
    """

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
    """SimCLR's blur (Chen et al. 2020, appendix A) with a kernel of a tenth of the side.

    Args:
        probability: Probability of the blur.
        sigma: Range of the uniform distribution of the standard deviation, in pixels.
    """

    probability: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        if rng.random() >= self.probability:
            return image
        kernel = [side // 20 * 2 + 1 for side in (image.shape[-1], image.shape[-2])]  # (x, y), odd
        return F.gaussian_blur(image, kernel, [rng.uniform(*self.sigma)] * 2)


Step = RandAugment | ColourDistortion | GaussianBlur


def mentions_side(caption: str) -> bool:
    """Return whether the caption contains the word left or right, which mirroring would make wrong."""
    return re.search(r"\b(left|right)\b", caption, re.IGNORECASE) is not None


def resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize with PIL's antialiasing, within 2/255 of PIL's pixels.

    torch's kernel for bytes is 5 times as fast as PIL if the memory of ``image`` is in the order (H, W, 3).

    Args:
        image: (3, H, W) uint8.
        size: (h, w).

    Returns:
        (3, h, w) uint8.
    """
    if interpolation not in ("bicubic", "bilinear"):
        raise UserError(f"interpolation {interpolation!r} is unknown; use 'bicubic' or 'bilinear'")
    height, width = image.shape[1:]
    image = image[None]
    # Pillow >= 13 resizes the height first in these cases; torch always begins with the width. The order matters because
    # the first pass clips to [0, 255], which changes pixels at sharp edges by up to 30.
    if height > size[0] and height - size[0] > 2 * (width - size[1]):
        image = interpolate(image, (size[0], width), mode=interpolation, antialias=True)
    return interpolate(image, size, mode=interpolation, antialias=True)[0]


def resize_like_torchvision(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize with torchvision's pixels: as `resize`, always with the width first."""
    return interpolate(image[None], size, mode=interpolation, antialias=True)[0]


def resize_like_pil(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize with PIL's pixels."""
    pil = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return to_tensor(np.array(pil.resize(size[::-1], Image.Resampling[interpolation.upper()])))


RESAMPLERS = {"fast": resize, "pil": resize_like_pil, "torchvision": resize_like_torchvision}


def finish(image: Tensor, flip: float, then: tuple[Step, ...], rng: np.random.Generator, caption: str) -> Tensor:
    """Mirror with probability ``flip``, unless the caption mentions a side, then apply the further steps in order."""
    if rng.random() < flip and not mentions_side(caption):
        image = image.flip(-1)
    for step in then:
        image = step(image, rng)
    return image


def to_tensor(image: np.ndarray) -> Tensor:
    """Return a (3, H, W) view of an (H, W, 3) array."""
    return torch.from_numpy(image).permute(2, 0, 1)


@dataclass(frozen=True)
class RandomResizedCrop:
    """Random crop, resized to the size of the model, drawn as torchvision draws it.

    ALBEF uses scale (0.2, 1) and ``then=(RandAugment(),)``; open_clip uses scale (0.9, 1) and flip 0.

    Args:
        scale: Range of the crop's share of the area.
        ratio: Range of the crop's width over height.
        flip: Probability of mirroring.
        then: Further steps.
    """

    scale: tuple[float, float] = setting((0.2, 1.0), above=0)
    ratio: tuple[float, float] = setting((3 / 4, 4 / 3), above=0)
    flip: float = 0.5
    then: tuple[Step, ...] = ()

    def __call__(
        self, image: np.ndarray, size: tuple[int, int], interpolation: str, rng: np.random.Generator, caption: str = ""
    ) -> Tensor:
        top, left, height, width = self.box(image.shape[0], image.shape[1], rng)
        crop = to_tensor(image)[:, top : top + height, left : left + width]
        return finish(resize(crop, size, interpolation), self.flip, self.then, rng, caption)

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Return (top, left, height, width) in pixels: the first of ten draws that fits, or else the largest centred crop."""
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
    """ALIGN's transform: resize to a rectangle without keeping the aspect ratio, then a random crop.

    The published values are a square of 346 pixels and a crop of 289.

    Args:
        fraction: Side of the crop over the side of the rectangle.
        flip: Probability of mirroring.
        then: Further steps.
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
    """Deterministic transform for evaluation: resize the whole image, then crop the centre.

    Args:
        mode: "center" scales the image so that it just covers the model's shape (open_clip, timm). "squash" ignores the
            aspect ratio (ALBEF, ALIGN).
        fraction: Side of the crop over the side of the resized image (timm's crop_pct; ALIGN uses 289/346).
        resampler: "fast" is within 2/255 of PIL's pixels. "pil" and "torchvision" are the pixels of these libraries, for
            published weights whose own preprocessing uses one of them.
        odd_margin: Offset of the crop where its margin is an odd number of pixels: "round" to even (torchvision) or "floor"
            (transformers).
    """

    mode: Literal["center", "squash"] = "center"
    fraction: float = 1.0
    resampler: Literal["fast", "pil", "torchvision"] = "fast"
    odd_margin: Literal["round", "floor"] = "round"

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
        margins = (height - size[0]) / 2, (width - size[1]) / 2
        top, left = map(round if self.odd_margin == "round" else math.floor, margins)
        whole = RESAMPLERS[self.resampler](to_tensor(image), (height, width), interpolation)  # (3, height, width)
        return whole[:, top : top + size[0], left : left + size[1]]


Transform = RandomResizedCrop | ResizeCrop | Resize


def simclr(strength: float = 1.0, flip: float = 0.5) -> RandomResizedCrop:
    """Return SimCLR's transform (Chen et al. 2020, appendix A): small crops, colour distortion, blur."""
    return RandomResizedCrop(scale=(0.08, 1.0), flip=flip, then=(ColourDistortion(strength), GaussianBlur()))
