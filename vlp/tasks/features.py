"""Features of labelled images, the same for any number of processes.

n images, B images of a batch, D width of the features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.data.reading.labelled import LabelledImageDataset, LabelledImages
from vlp.errors import UserError
from vlp.tasks.base import EvalModel
from vlp.tasks.sharded import ShardedBatches, gather_rows
from vlp.types import Encoded

Features = Literal["pooled", "embed"]


@dataclass
class LabelledFeatures:
    """Features of the images that could be decoded, in their order, on the CPU.

    Args:
        features: (n, D) float32.
        labels: (n,) int64.
        bad: Records of skipped images.
    """

    features: Tensor
    labels: Tensor
    bad: list[dict]


def encode_labelled(
    model: EvalModel, images: LabelledImages, encode: Callable[[Tensor], Tensor], batch_size: int
) -> LabelledFeatures:
    """Encode every image once.

    Args:
        encode: From (B, 3, H, W) normalised images to (B, D) features.

    Raises:
        UserError: if the model has no image tower, no image can be decoded, or a feature is not finite.
    """
    if model.preprocess is None:
        raise UserError("images cannot be classified: this model has no image tower; evaluate it with sts")
    dataset = LabelledImageDataset(images, model.data.resize, model.data.max_pixels, model.preprocess)
    batches = ShardedBatches(model, dataset, batch_size)
    own = []
    for samples in batches:
        positions, pixels = zip(*samples)
        own.append((list(positions), encode(model.normalise(pixels)).float().cpu()))
    bad = batches.gather_skipped()
    features = gather_rows(len(images), own)  # (all images, D)
    kept = sorted(set(range(len(images))) - {record["number"] for record in bad})
    if not kept:
        raise UserError(f"none of the {len(images)} images can be decoded; the first is {images[0][0]}")
    features, labels = features[kept], torch.tensor([images[position][1] for position in kept])
    if not (finite := features.isfinite().all(1)).all():
        path = images[kept[int(finite.int().argmin())]][0]
        raise UserError(f"the features of {path} are not finite; evaluate an earlier checkpoint")
    return LabelledFeatures(features, labels, bad)


def select_features(encoded: Encoded, features: Features) -> Tensor:
    """Return (B, D) pooled outputs of the tower, or the (B, E) embeddings that the head makes of them."""
    return encoded.tokens[:, 0] if features == "pooled" else encoded.embed
