import dataclasses
import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from vlp.data.augment import (
    OPERATIONS,
    ColourDistortion,
    GaussianBlur,
    RandAugment,
    RandomResizedCrop,
    Resize,
    ResizeCrop,
    mentions_side,
    resize,
    simclr,
    to_tensor,
)
from vlp.data.image import decode
from vlp.errors import UserError

PHOTOS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "photos_500px"
SIZE = (32, 48)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """A image with a different gradient in every channel, so that every displacement shows."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9) + np.cos(y / 7), np.cos((x + y) / 11) * 2, np.sin(x / 5) * np.cos(y / 13) * 2]
    return np.stack([(w * 60 + 128).clip(0, 255) for w in waves], -1).astype(np.uint8)


class TorchDraws:
    """numpy's interface over torch's global stream, drawn as torchvision draws."""

    def uniform(self, low, high):
        return torch.empty(1).uniform_(low, high).item()

    def integers(self, high):
        return torch.randint(0, high, (1,)).item()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (60, 900), (900, 60), (1, 1), (3, 400)])
def test_crop_boxes_equal_torchvisions(height, width):
    image = torch.empty(3, height, width)
    crop = RandomResizedCrop(scale=(0.08, 1.0))
    for seed in range(200):
        torch.manual_seed(seed)
        expected = T.RandomResizedCrop.get_params(image, list(crop.scale), list(crop.ratio))
        torch.manual_seed(seed)
        assert crop.box(height, width, TorchDraws()) == tuple(expected)


def pil_resize(pixels: np.ndarray, size: tuple[int, int], height_first: bool, resample) -> np.ndarray:
    """One axis after the other: which comes first depends on Pillow's version, a single axis does not."""
    image = Image.fromarray(pixels)
    between = (image.width, size[0]) if height_first else (size[1], image.height)
    return np.asarray(image.resize(between, resample).resize((size[1], size[0]), resample)).astype(int)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("shape", "height_first"),
    [((300, 400), False), ((400, 300), True), ((300, 300), False), ((500, 100), True), ((150, 120), False)]
    + [((230, 174), True), ((250, 249), False), ((1000, 990), False), ((224, 300), False), ((700, 224), True)],
)
def test_resize_is_within_2_of_pil(shape, height_first, interpolation):
    pixels = noise(*shape)
    mine = resize(to_tensor(pixels), (224, 224), interpolation).permute(1, 2, 0).numpy()
    resample = Image.Resampling[interpolation.upper()]
    assert np.abs(mine - pil_resize(pixels, (224, 224), height_first, resample)).max() <= 2


def test_crops_of_photos_are_within_2_of_pil():
    if not PHOTOS.is_dir():
        pytest.skip("needs ../shared/data/photos_500px")
    crop = RandomResizedCrop(flip=0)
    for seed, path in enumerate(sorted(PHOTOS.rglob("*.[jJ][pP]*[gG]"))[:40]):
        pixels = decode(path.read_bytes())
        mine = crop(pixels, (224, 224), "bicubic", np.random.default_rng(seed)).permute(1, 2, 0).numpy()
        top, left, h, w = crop.box(*pixels.shape[:2], np.random.default_rng(seed))
        height_first = h > 224 and h - 224 > 2 * (w - 224)
        part = pixels[top : top + h, left : left + w]
        expected = pil_resize(part, (224, 224), height_first, Image.Resampling.BICUBIC)
        assert np.abs(mine - expected).max() <= 2
        assert (mine != expected).mean() < 0.02


def test_unknown_interpolation_raises_user_error():
    with pytest.raises(UserError, match="'lanczos' is unknown; use 'bicubic' or 'bilinear'"):
        Resize()(noise(8, 8), (4, 4), "lanczos")


TRANSFORMS = [
    RandomResizedCrop(),
    RandomResizedCrop(then=(RandAugment(probability=1.0),)),
    simclr(),
    ResizeCrop(),
    ResizeCrop(then=(ColourDistortion(), GaussianBlur(), RandAugment())),
    Resize(),
    Resize("squash", 0.875),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_pixels_depend_only_on_the_generator(transform):
    image = noise(60, 90)
    kept = image.copy()
    outputs = []
    for state in (1, 2):  # the global streams differ
        torch.manual_seed(state)
        np.random.seed(state)
        rng = np.random.default_rng(5)
        outputs.append(torch.stack([transform(image, SIZE, "bicubic", rng, "a dog") for _ in range(20)]))
    assert outputs[0].shape == (20, 3, *SIZE) and outputs[0].dtype == torch.uint8
    assert torch.equal(*outputs)
    np.testing.assert_array_equal(image, kept)
    others = torch.stack([transform(image, SIZE, "bicubic", np.random.default_rng(i), "a dog") for i in range(20)])
    assert torch.equal(outputs[0], others) == isinstance(transform, Resize)
    assert dataclasses.is_dataclass(transform) and hash(transform) is not None


@pytest.mark.parametrize("caption", ["turn left", "The RIGHT hand", "left-handed man", "on her right."])
def test_captions_with_a_side_are_found(caption):
    assert mentions_side(caption)


@pytest.mark.parametrize("caption", ["", "a bright light", "leftovers on a plate", "brightly", "an upright piano"])
def test_words_that_contain_a_side_do_not_count(caption):
    assert not mentions_side(caption)


@pytest.mark.parametrize("make", [RandomResizedCrop, ResizeCrop])
def test_flip_mirrors_half_of_the_images_but_never_under_a_side(make):
    image, whole = (
        smooth(60, 60),
        {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)} if make is RandomResizedCrop else {"fraction": 1.0},
    )
    transform = make(flip=0.5, **whole)
    plain = Resize("squash")(image, SIZE, "bicubic")
    mirrored = 0
    for seed in range(400):
        out = transform(image, SIZE, "bicubic", np.random.default_rng(seed), "a dog on the left")
        assert torch.equal(out, plain)
        out = transform(image, SIZE, "bicubic", np.random.default_rng(seed), "a dog")
        assert torch.equal(out, plain) or torch.equal(out, plain.flip(-1))
        mirrored += torch.equal(out, plain.flip(-1))
    assert 160 < mirrored < 240  # 4 standard deviations


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (224, 224), (100, 333), (480, 640), (427, 640), (1000, 13)])
@pytest.mark.parametrize("side", [224, 97])
def test_center_equals_open_clip(shape, side):
    pixels = smooth(*shape)
    theirs = open_clip.image_transform(side, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(Image.fromarray(pixels))
    mine = Resize()(pixels, (side, side), "bicubic")
    assert (mine.float() / 255 - theirs).abs().max() <= 2.5 / 255


def test_fraction_is_timms_crop_pct_and_squash_ignores_the_shape():
    pixels = smooth(300, 400)
    bigger = Resize()(pixels, (256, 256), "bicubic")
    assert torch.equal(Resize(fraction=0.875)(pixels, (224, 224), "bicubic"), bigger[:, 16:240, 16:240])
    assert torch.equal(Resize("squash")(pixels, SIZE, "bicubic"), resize(to_tensor(pixels), SIZE, "bicubic"))


def test_center_covers_a_rectangle_exactly():
    pixels = smooth(300, 400)
    wide = Resize()(pixels, (100, 200), "bicubic")
    assert torch.equal(wide, resize(to_tensor(pixels), (150, 200), "bicubic")[:, 25:125])


def test_resize_crop_draws_every_place_of_the_346_square():
    pixels, size = smooth(200, 300), (289, 289)
    square = resize(to_tensor(pixels), (346, 346), "bicubic")
    tops = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        top, left = int(rng.integers(58)), int(rng.integers(58))
        out = ResizeCrop(flip=0)(pixels, size, "bicubic", np.random.default_rng(seed))
        assert torch.equal(out, square[:, top : top + 289, left : left + 289])
        tops.add(top)
    assert min(tops) < 6 and max(tops) > 51


def warp_slowly(image: np.ndarray, matrix: np.ndarray, fill: float = 128.0) -> np.ndarray:
    """OpenCV's warpAffine: ``matrix`` (2, 3) maps source to target, pixel centres at whole numbers, bilinear."""
    height, width = image.shape[:2]
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    padded = np.full((height + 2, width + 2, 3), fill)
    padded[1:-1, 1:-1] = image
    out = np.full((height, width, 3), fill)
    for y in range(height):
        for x in range(width):
            u, v, _ = inverse @ [x, y, 1]
            if -1 < u < width and -1 < v < height:
                left, top = math.floor(u), math.floor(v)
                a, b = u - left, v - top
                rows = padded[top + 1 : top + 3, left + 1 : left + 3]
                out[y, x] = (1 - b) * ((1 - a) * rows[0, 0] + a * rows[0, 1]) + b * (
                    (1 - a) * rows[1, 0] + a * rows[1, 1]
                )
    return out


def published_matrix(name: str, magnitude: float, sign: int, height: int, width: int) -> np.ndarray:
    """What ALBEF's code passes to warpAffine (facts of dataset/randaugment.py, level out of 10)."""
    level = magnitude / 10
    shear, offset = sign * 0.3 * level, sign * 10 * level
    if name == "Rotate":  # cv2.getRotationMatrix2D: about (w/2, h/2)
        angle, (cx, cy) = math.radians(sign * 30 * level), (width / 2, height / 2)
        a, b = math.cos(angle), math.sin(angle)
        return np.array([[a, b, (1 - a) * cx - b * cy], [-b, a, b * cx + (1 - a) * cy]])
    return {
        "ShearX": np.array([[1, shear, 0], [0, 1, 0]]),
        "ShearY": np.array([[1, 0, 0], [shear, 1, 0]]),
        "TranslateX": np.array([[1, 0, offset], [0, 1, 0]]),
        "TranslateY": np.array([[1, 0, 0], [0, 1, offset]]),
    }[name]


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_geometric_operations_equal_the_published_warps(name, sign):
    pixels = smooth(40, 60)
    expected = warp_slowly(pixels, published_matrix(name, 7, sign, 40, 60))
    out = OPERATIONS[name](to_tensor(pixels), 0.7, sign).permute(1, 2, 0).numpy()
    assert np.abs(out - expected).max() < 1.01
    assert np.abs(out.astype(int) - pixels).max() > 50


def test_photometric_operations_equal_pil():
    from PIL import ImageEnhance, ImageOps

    image = Image.fromarray(noise(30, 40) // 2 + 40)  # room for autocontrast
    expected = {
        "Identity": image,
        "AutoContrast": ImageOps.autocontrast(image),
        "Equalize": ImageOps.equalize(image),
        "Brightness": ImageEnhance.Brightness(image).enhance(1.36),
        "Sharpness": ImageEnhance.Sharpness(image).enhance(1.36),
    }
    for name, theirs in expected.items():
        mine = OPERATIONS[name](to_tensor(np.array(image)), 0.7, 1).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(mine - np.asarray(theirs).astype(int)).max() <= 1, name


def test_randaugment_draws_each_of_ten_operations_half_of_the_time(monkeypatch):
    counts = dict.fromkeys(OPERATIONS, 0)
    signs = {-1: 0, 1: 0}

    def count(name):
        def operation(image, strength, sign):
            assert strength == 0.7
            counts[name] += 1
            signs[sign] += 1
            return image

        return operation

    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, count(name))
    rng = np.random.default_rng(0)
    for _ in range(5000):
        RandAugment()(torch.zeros(3, 4, 4, dtype=torch.uint8), rng)
    assert len(counts) == 10
    assert all(abs(n - 500) < 5 * math.sqrt(500) for n in counts.values())  # 10,000 draws / 10 / 2
    assert abs(signs[1] - signs[-1]) < 5 * math.sqrt(5000)


def test_colour_distortion_of_strength_0_changes_only_rounding():
    image = to_tensor(smooth(40, 40)).clone()
    out = ColourDistortion(strength=0.0, probability=1.0, greyscale=0.0)(image, np.random.default_rng(0))
    assert (out.int() - image.int()).abs().max() <= 3  # by way of hue and saturation in bytes


def test_colour_distortion_draws_its_probabilities():
    image = to_tensor(smooth(24, 24)).clone()
    rng, n = np.random.default_rng(0), 600
    outs = [ColourDistortion()(image, rng) for _ in range(n)]
    grey = sum(bool((o[0] == o[1]).all() and (o[1] == o[2]).all()) for o in outs)
    same = sum(torch.equal(o, image) for o in outs)
    assert abs(grey / n - 0.2) < 0.08 and abs(same / n - 0.2 * 0.8) < 0.08


def test_blur_equals_a_gaussian_of_a_tenth_of_the_side():
    image = to_tensor(noise(40, 60)).clone()
    out = GaussianBlur(probability=1.0, sigma=(1.3, 1.3))(image, np.random.default_rng(0))

    def weights(side):
        offsets = np.arange(-(side // 20), side // 20 + 1)
        w = np.exp(-(offsets**2) / (2 * 1.3**2))
        return offsets, w / w.sum()

    reflected = np.pad(image.numpy().astype(float), ((0, 0), (2, 2), (3, 3)), mode="reflect")
    (dy, wy), (dx, wx) = weights(40), weights(60)
    assert len(dy) == 5 and len(dx) == 7
    expected = sum(a * b * reflected[:, 2 + i : 42 + i, 3 + j : 63 + j] for i, a in zip(dy, wy) for j, b in zip(dx, wx))
    assert np.abs(out.numpy() - expected).max() <= 0.51
