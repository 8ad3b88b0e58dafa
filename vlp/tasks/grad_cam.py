"""Where a text looks, as a heat map: Grad-CAM of the matching logit over cross-attention (ALBEF, Li et al. 2021, sec. 6.4).

B images, n pairs, P image tokens of which the first is pooled and the others a grid of h x w, L text tokens.
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
from vlp.tasks.base import EvalModel, evaluating
from vlp.types import Encoded

# words that nothing in a picture stands for
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


def choose_layer(model, layer: int | None) -> int:
    """The layer of fusion that is looked at; None = a third of the way up: ALBEF's published one is 2 of 0 to 5.

    Raises:
        UserError: if the model does not fuse by cross-attention with a head for matching, or has no such layer.
    """
    if getattr(model, "itm", None) is None or not hasattr(getattr(model, "fusion", None), "with_attention"):
        raise UserError("Grad-CAM needs cross-attention and a head for image-text matching: an ALBEF with itm")
    layers = len(model.fusion.layers)
    if layer is None:
        return layers // 3
    if not 0 <= layer < layers:
        raise UserError(f"layer {layer} of fusion; this model has layers 0 to {layers - 1}")
    return layer


def grad_cam(model, image: Encoded, text: Encoded, layer: int, images: Tensor | None = None) -> Tensor:
    """``mean over heads of a * max(0, dy/da)``: a the attention of a text's tokens to the grid, y the pair's matching logit.

    Args:
        image: of B.
        text: of n.
        layer: of fusion, from 0.
        images: (n,) int64 image of each text; None = in their order, n = B.

    Returns:
        (n, L, h, w), zeros where there is no token.
    """
    height, width = model.image.grid
    if image.tokens.shape[1] != 1 + height * width:
        raise ValueError(f"{image.tokens.shape[1]} image tokens are no pooled one and a grid of {height} x {width}")
    if images is None:
        images = torch.arange(len(text.tokens), device=text.tokens.device)
    with torch.enable_grad():
        tokens = text.tokens.detach().requires_grad_()  # that of a model whose parameters take no gradient has one too
        projected = model.project(Encoded(image.tokens.detach(), image.mask, image.embed))
        states, attention = model.fusion.with_attention(layer, tokens, text.mask, projected, images=images)
        (gradient,) = torch.autograd.grad(model.itm(states[:, 0])[:, 1].sum(), attention)
    cam = (attention.detach() * gradient.clamp(min=0))[..., 1:].mean(1) * text.mask[..., None]
    return cam.unflatten(2, (height, width)).float()


def mean_over(cam: Tensor, tokens: Tensor) -> Tensor:
    """(n, L, h, w) and (n, L) bool, at least one a row, to the (n, h, w) mean over these tokens.

    The published mean is over the padding too, so that the scale depends on the longest text of the batch.
    """
    return (cam * tokens[..., None, None]).sum(1) / tokens.sum(1)[:, None, None]


def enlarged(cam: Tensor, height: int, width: int) -> Tensor:
    """(h, w) to (height, width) pixels, bicubically, as published."""
    return F.interpolate(cam[None, None], size=(height, width), mode="bicubic", align_corners=False)[0, 0]


@dataclass
class WordMaps:
    """A picture, its caption, and where each word looks.

    Args:
        pixels: (H, W, 3) uint8.
        maps: of each word, (H, W) float32.
    """

    pixels: np.ndarray
    caption: str
    maps: list[tuple[str, np.ndarray]]


def word_maps(subject: EvalModel, pixels: np.ndarray, caption: str, layer: int, most: int) -> WordMaps:
    """Of the first ``most`` words of the caption that something in a picture can stand for."""
    model, data, device = subject.model, subject.data, subject.device
    size, interpolation = subject.preprocess.size, subject.preprocess.interpolation
    whole = Resize(mode="squash")(pixels, size, interpolation)
    with evaluating(model):
        image = model.encode_image(subject.preprocess.normalise(whole[None].to(device)))
        ids, mask, _ = subject.tokenizer([caption], data.max_length)
        text = model.encode_text(ids.to(device), mask.to(device))
        cam = grad_cam(model, image, text, layer)
    kept = ids.shape[1] - 1 if subject.tokenizer.sep else ids.shape[1]  # a cut caption keeps its [SEP]
    maps = []
    for word, places in subject.tokenizer.words(caption):
        places = [place for place in places if place < kept]
        if places and word.lower() not in FUNCTION_WORDS and any(map(str.isalnum, word)) and len(maps) < most:
            chosen = torch.zeros_like(text.mask).index_fill(1, torch.tensor(places, device=device), True)
            maps.append((word, enlarged(mean_over(cam, chosen)[0], *pixels.shape[:2]).cpu().numpy()))
    return WordMaps(pixels, caption, maps)


def draw_words(
    subject: EvalModel,
    source: str,
    path: Path,
    words: tuple[str, ...] = (),
    pictures: int = 6,
    layer: int | None = None,
    most: int = 6,
) -> list[str]:
    """A PNG with a row a picture: the picture with its caption, then a heat map for each of its words.

    Args:
        source: shards, of which pictures are drawn at random, by the subject's seed.
        words: of which a caption is to have one at least; its pictures show these words alone. None = any.
        layer: see `choose_layer`.
        most: words of a caption.

    Returns:
        The captions.

    Raises:
        UserError: if no picture has such a caption, or the PNG cannot be written.
    """
    layer, reader, rows = choose_layer(subject.model, layer), ShardReader(source), []
    wanted = {word.lower() for word in words}
    for number in keyed_rng(subject.seed).permutation(len(reader)).tolist():
        if len(rows) == pictures:
            break
        try:
            sample = reader.read(*reader.locate(number))
            captions = [c for c in sample.captions if not wanted or wanted & _words(subject, c)]
            if not captions:
                continue
            found = word_maps(subject, decode(sample.image, subject.data.max_pixels), captions[0], layer, most)
        except BadSample:
            continue
        found.maps = [(word, cam) for word, cam in found.maps if not wanted or word.lower() in wanted]
        if found.maps:
            rows.append(found)
    if not rows:
        raise UserError(f"no caption of {source} has {' or '.join(words) or 'a word'}; give other words or data")
    _draw(rows, path)
    return [row.caption for row in rows]


def _words(subject: EvalModel, caption: str) -> set[str]:
    return {word.lower() for word, _ in subject.tokenizer.words(caption)}


def _draw(rows: list[WordMaps], path: Path) -> None:
    """Each map is scaled to its own maximum: it says where a word looks, not how much that mattered."""
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
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box stands for it
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=100, format="png")
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; check the folder, or give another --output") from None
