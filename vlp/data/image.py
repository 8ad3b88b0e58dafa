"""Decoding of image files. H, W pixels."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from vlp.errors import BadSample

FORMATS = ("JPEG", "PNG", "WEBP", "PPM", "TIFF")  # PPM includes PGM and PBM
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, max_pixels: int = 64_000_000) -> np.ndarray:
    """Decode a JPEG, PNG, WEBP, PPM or TIFF file; of an animation, the first frame.

    The EXIF orientation is applied, as viewers do (open_clip and ALBEF ignore it and show such a photo sideways).
    Transparent pixels are composited on white. 16-bit greys keep their upper 8 bits.

    Args:
        data: The encoded image.
        max_pixels: Limit of H * W. The header is checked before pixels are decoded.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        BadSample: if the file has another format, is truncated or damaged, or is over the limit.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise BadSample(f"{width} x {height} pixels, over the limit of {max_pixels}")
        return np.array(upright(opaque(image)))
    except BadSample:
        raise
    except Image.UnidentifiedImageError:
        raise BadSample(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except Exception as error:  # a damaged file raises OSError, SyntaxError, struct.error, zlib.error, ...
        raise BadSample(f"undecodable image: {error}") from error


def opaque(image: Image.Image) -> Image.Image:
    """Decode an image to RGB, composited on white if it has transparent pixels."""
    image.load()
    if image.mode.startswith("I"):  # Pillow would clip 16-bit values at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise BadSample("grey values of more than 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise BadSample("floating-point pixels, whose range the file does not tell")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        rgb.info = image.info
        return rgb
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() copies in every case


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation."""
    if "exif" not in image.info:
        return image
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata leaves the pixels usable
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
