"""Image-text contrast between two towers: ALIGN's and CLIP's normalised softmax, SigLIP's pairwise sigmoid.

Each process takes its own rows against the keys of all processes, so that the mean over processes is the loss, and its
gradient, of one process with the whole batch - for the temperature too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlp.forward import Forward
from vlp.losses.info_nce import info_nce
from vlp.losses.sigmoid import sigmoid_loss
from vlp.losses.tiled import tiled_info_nce, tiled_sigmoid_loss


@dataclass(frozen=True)
class ImageTextContrast:
    """Symmetric contrastive loss L_i2t + L_t2i (Jia et al. 2021, eq. 1-2; Radford et al. 2021, fig. 3).

    Args:
        label_smoothing: share of the target spread evenly over all keys (ALIGN 0.1, CLIP 0).
        reduction: "sum" of both directions (ALIGN's paper) or their "mean" (CLIP, transformers' AlignModel).
        tile_rows: rows of the similarity matrix held at a time, for large batches; None = all.
    """

    weight: float = 1.0
    label_smoothing: float = 0.0
    reduction: Literal["sum", "mean"] = "mean"
    tile_rows: int | None = None

    def __call__(self, f: Forward) -> Tensor:
        def loss(queries: Tensor, keys: Tensor) -> Tensor:
            rest = (f.model.scale, f.batch.index, f.keys.index, self.label_smoothing)
            if self.tile_rows is None:
                return info_nce(queries, keys, *rest)
            return tiled_info_nce(queries, keys, *rest, tile_rows=self.tile_rows)

        total = loss(f.image.embed, f.keys.text) + loss(f.text.embed, f.keys.image)
        return total / 2 if self.reduction == "mean" else total


@dataclass(frozen=True)
class SigmoidContrast:
    """Every pair judged by itself: -1/B sum_ij log sigmoid(z_ij (t x_i.y_j + b)) (Zhai et al. 2023, eq. 1).

    Args:
        tile_rows: rows of the similarity matrix held at a time, for large batches; None = all.
    """

    weight: float = 1.0
    tile_rows: int | None = None

    def __call__(self, f: Forward) -> Tensor:
        given = (f.image.embed, f.keys.text, f.model.scale, f.model.bias, f.batch.index, f.keys.index)
        if self.tile_rows is None:
            return sigmoid_loss(*given)
        return tiled_sigmoid_loss(*given, tile_rows=self.tile_rows)
