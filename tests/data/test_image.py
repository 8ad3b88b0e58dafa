import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from vlp.data.image import UPRIGHT, decode
from vlp.errors import BadSample


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_pixels_are_returned(format, options):
    pixels = noise(17, 31)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels), format, **options)), pixels)


def test_decoded_jpeg_equals_pil_and_is_writable():
    data = encoded(Image.fromarray(noise(40, 50)), "JPEG")
    pixels = decode(data)
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert pixels.flags.writeable  # torch.from_numpy warns of read-only memory


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_opaque_modes_become_rgb(mode):
    image = Image.fromarray(noise(9, 7)).convert(mode)
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_alpha_is_composited_on_white():
    rgba = noise(12, 8, 4)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    alpha = rgba[..., 3:].astype(float) / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    pixels = decode(encoded(Image.fromarray(rgba)))
    assert np.abs(pixels - expected).max() <= 1
    assert (pixels[0] == 255).all() and (pixels[1] == rgba[1, :, :3]).all()


def test_transparent_palette_and_grey_are_white():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    assert (decode(encoded(palette, transparency=1)) == 255).all()
    assert (decode(encoded(palette, transparency=0))[0, 0] == [200, 0, 0]).all()
    assert (decode(encoded(Image.new("LA", (4, 4), (10, 0)))) == 255).all()


def test_sixteen_bit_grey_keeps_its_upper_bits():
    grey = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey)))[..., 0], grey >> 8)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(noise(12, 20)), format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(decode(data), np.asarray(expected))
    assert (orientation in UPRIGHT) == (orientation > 1)


def test_damaged_exif_leaves_pixels_usable():
    data = encoded(Image.fromarray(noise(8, 8)), "JPEG", exif=b"Exif\0\0no tiff header")
    assert decode(data).shape == (8, 8, 3)


def test_other_formats_are_refused():
    for format in ("GIF", "BMP", "DDS", "TGA"):
        with pytest.raises(BadSample, match="not a JPEG, PNG, WEBP, PPM or TIFF"):
            decode(encoded(Image.fromarray(noise(8, 8)), format))
    for data in (b"", b"<html>404</html>", bytes(1000)):
        with pytest.raises(BadSample, match="not a JPEG, PNG, WEBP, PPM or TIFF"):
            decode(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_truncated_files_are_bad(format):
    data = encoded(Image.fromarray(noise(64, 64)), format)
    for part in (0.05, 0.5, 0.95):
        with pytest.raises(BadSample):
            decode(data[: int(len(data) * part)])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damaged_image_raises_only_bad_sample(format):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(noise(32, 32)), format, exif=exif)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), 400), 3):
            damaged[place] = rng.integers(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                outcomes.add(decode(bytes(damaged)).dtype)
            except BadSample:
                outcomes.add(BadSample)
    assert BadSample in outcomes


def test_pixel_limit_is_checked_from_the_header():
    data = encoded(Image.fromarray(noise(20, 30)))
    assert decode(data, max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(BadSample, match="30 x 20 pixels, over the limit of 599"):
        decode(data, max_pixels=599)
    # a header that promises 20,000 x 10,000 pixels with hardly any data behind it
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    bomb = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own limit
        with pytest.raises(BadSample, match="20000 x 10000|exceeds limit"):
            decode(bomb)
    webp = encoded(Image.new("RGB", (4000, 4000)), "WEBP", lossless=True)
    with pytest.raises(BadSample, match="over the limit"):
        decode(webp, max_pixels=1_000_000)
