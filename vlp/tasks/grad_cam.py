"""Grad-CAM of the matching logit over cross-attention: heat maps of words over an image (ALBEF, Li et al. 2021, sec. 6.4).

B images, n pairs, P image tokens, of which the first is pooled and the others form a grid of h x w, L text tokens.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.data.augment import Resize
from vlp.data.image import decode
from vlp.data.order import keyed_rng
from vlp.data.reading.shards import ShardReader
from vlp.errors import BadSample, UserError
from vlp.models.base import Model
from vlp.tasks.base import EvalModel, evaluating
from vlp.types import Encoded

# words that no region of an image shows
FUNCTION_WORDS = set(
    [
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "to",
        "and",
        "or",
        "is",
        "are",
        "be",
        "with",
        "by",
        "for",
        "from",
        "as",
        "it",
        "its",
        "his",
        "her",
        "their",
        "that",
        "this",
    ]
)


def choose_layer(model: Model, layer: int | None) -> int:
    """Return the fusion layer to draw. None chooses the one at a third of the depth: layer 2 of 6 in ALBEF.

    Raises:
        UserError: if the model does not fuse by cross-attention with a matching head, or has no such layer.
    """
    if not model.can_attend:
        raise UserError("Grad-CAM needs cross-attention and a head for image-text matching: an ALBEF with itm")
    layers = model.num_attention_layers
    if layer is None:
        return layers // 3
    if not 0 <= layer < layers:
        raise UserError(f"layer {layer} of fusion; this model has layers 0 to {layers - 1}")
    return layer


def grad_cam(model: Model, image: Encoded, text: Encoded, layer: int, images: Tensor | None = None) -> Tensor:
    """Compute ``mean over heads of a * max(0, dy/da)``, with attention a of text tokens to the grid and matching logit y.

    Args:
        image: B encoded images.
        text: n encoded texts.
        layer: Fusion layer, from 0.
        images: (n,) int64 image of each text. None pairs them in order, n = B.

    Returns:
        (n, L, h, w), zero at padding.
    """
    height, width = model.image.grid
    if image.tokens.shape[1] != 1 + height * width:
        raise ValueError(f"{image.tokens.shape[1]} image tokens are not a pooled one and a {height} x {width} grid")
    with torch.enable_grad():
        # requires_grad here, since the parameters of the model may all be frozen
        tokens = text.tokens.detach().requires_grad_()
        logits, attention = model.match_with_attention(
            layer,
            Encoded(image.tokens.detach(), image.mask, image.embed),
            Encoded(tokens, text.mask, text.embed),
            images,
        )
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), attention)  # (n, heads, L, P)
    cam = (attention.detach() * gradient.clamp(min=0))[..., 1:].mean(1) * text.mask[..., None]  # (n, L, h * w)
    return cam.unflatten(2, (height, width)).float()


def mean_over_tokens(cam: Tensor, tokens: Tensor) -> Tensor:
    """Average the maps of some tokens of each text.

    The published code also averages over the padding, so its scale depends on the longest text of the batch.

    Args:
        cam: (n, L, h, w).
        tokens: (n, L) bool, True at one token of each text or more.

    Returns:
        (n, h, w).
    """
    return (cam * tokens[..., None, None]).sum(1) / tokens.sum(1)[:, None, None]


def enlarge(cam: Tensor, height: int, width: int) -> Tensor:
    """Resize an (h, w) map to (height, width) pixels, bicubically as published."""
    return F.interpolate(cam[None, None], size=(height, width), mode="bicubic", align_corners=False)[0, 0]


@dataclass
class WordMaps:
    """Heat maps of the words of a caption.

    Args:
        pixels: (H, W, 3) uint8 image.
        maps: Word and (H, W) float32 map of each.
    """

    pixels: np.ndarray
    caption: str
    maps: list[tuple[str, np.ndarray]]


def word_maps(model: EvalModel, pixels: np.ndarray, caption: str, layer: int, most: int) -> WordMaps:
    """Compute the maps of the first ``most`` words of a caption that are not function words."""
    network, device = model.model, model.device
    size, interpolation = model.preprocess.size, model.preprocess.interpolation
    whole = Resize(mode="squash")(pixels, size, interpolation)  # (3, h, w), not cropped
    with evaluating(network):
        image = model.encode_images([whole])
        ids, mask = model.tokenize([caption])
        text = network.encode_text(ids, mask)
        cam = grad_cam(network, image, text, layer)  # (1, L, h, w)
    kept = ids.shape[1] - 1 if model.tokenizer.sep else ids.shape[1]  # a truncated caption keeps its [SEP]
    maps = []
    for word, positions in model.tokenizer.words(caption):
        positions = [position for position in positions if position < kept]
        if positions and word.lower() not in FUNCTION_WORDS and any(map(str.isalnum, word)) and len(maps) < most:
            chosen = torch.zeros_like(text.mask).index_fill(1, torch.tensor(positions, device=device), True)  # (1, L)
            maps.append((word, enlarge(mean_over_tokens(cam, chosen)[0], *pixels.shape[:2]).cpu().numpy()))
    return WordMaps(pixels, caption, maps)


def draw_words(
    model: EvalModel,
    source: str,
    path: Path,
    words: tuple[str, ...] = (),
    images: int = 6,
    layer: int | None = None,
    most: int = 6,
) -> list[str]:
    """Write a PNG with a row for each image: the image with its caption, then a heat map of each word.

    Args:
        source: Shards. Images are drawn at random by the model's seed.
        words: Draw only captions with one of these words, and only the maps of these words. Empty means any word.
        images: Rows at most.
        layer: See `choose_layer`.
        most: Words of a caption at most.

    Returns:
        The captions.

    Raises:
        UserError: if no image has such a caption, or the PNG cannot be written.
    """
    layer, reader, rows = choose_layer(model.model, layer), ShardReader(source), []
    wanted = {word.lower() for word in words}
    for number in keyed_rng(model.seed).permutation(len(reader)).tolist():
        if len(rows) == images:
            break
        try:
            sample = reader.read(*reader.locate(number))
            captions = [c for c in sample.captions if not wanted or wanted & _words(model, c)]
            if not captions:
                continue
            found = word_maps(model, decode(sample.image, model.data.max_pixels), captions[0], layer, most)
        except BadSample:
            continue
        found.maps = [(word, cam) for word, cam in found.maps if not wanted or word.lower() in wanted]
        if found.maps:
            rows.append(found)
    if not rows:
        raise UserError(f"no caption of {source} has {' or '.join(words) or 'a word'}; give other words or data")
    _draw(rows, path)
    return [row.caption for row in rows]


def _words(model: EvalModel, caption: str) -> set[str]:
    return {word.lower() for word, _ in model.tokenizer.words(caption)}


def _draw(rows: list[WordMaps], path: Path) -> None:
    """Draw each map relative to its own maximum: maps show where a word attends, not how strongly."""
    from matplotlib.figure import Figure

    columns = 1 + max(len(row.maps) for row in rows)
    figure = Figure(figsize=(2.2 * columns, 2.1 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.ravel():
        axis.axis("off")
    for row, (first, *others) in zip(rows, axes):
        first.imshow(row.pixels)
        lines = textwrap.wrap(row.caption, 34, max_lines=3, placeholder=" ...")
        first.set_title("\n".join(lines), fontsize=7, parse_math=False)
        for axis, (word, cam) in zip(others, row.maps):
            axis.imshow(row.pixels)
            axis.imshow(cam.clip(0), cmap="jet", alpha=0.5, vmin=0, vmax=max(cam.max(), math.ulp(1.0)))
            axis.set_title(word, fontsize=9, parse_math=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box is drawn instead
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=100, format="png")
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; check the folder, or give another --output") from None
