"""Masked image modelling on any model with a ViT: codes of a frozen tokenizer as in BEiT, or pixels as in MAE.

The model predicts masked patches (`Model.masked_image`). Its head ``mim`` knows the grid of patches and the targets.

B images, P patches, T masked ones of each, M = B T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.config import Experiment
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.losses.masked import masked_cross_entropy, masked_pixel_loss
from vlp.objectives.base import Objective
from vlp.objectives.masking import block_masks
from vlp.objectives.requirements import require_image
from vlp.specs.fields import setting


@dataclass(frozen=True)
class MaskedImage(Objective):
    """Predict the masked patches from the others (BEiT, Bao et al. 2022, eq. 2; with pixels: MAE, He et al. 2022).

    Cross-entropy if ``model.mim`` gives codes, mean squared error if it gives values, over masked patches only. Every image
    has equally many, see `vlp.objectives.masking.block_masks`. Of several views, the first is masked. Parameters that the
    tower uses only for pooling (an attention pool) get no gradient: freeze them when training on several processes.

    Args:
        share: Share of the patches that are masked. The paper's is 0.4; its code masks 75 of 196.
        min_patches: Smallest size of a block.
        min_aspect: Smallest aspect ratio of a block, height over width; the largest is its inverse.
    """

    share: float = setting(0.4, above=0, below=1)
    min_patches: int = setting(16, least=1)
    min_aspect: float = setting(0.3, above=0, most=1)

    def validate(self, experiment: Experiment) -> None:
        require_image(experiment, "masked image modelling")
        if experiment.model.mim is None:
            raise UserError("masked image modelling has nothing to predict; set model.mim=Pixels()")

    def __call__(self, f: Forward) -> Tensor:
        image, mim = f.batch.image, f.model.mim
        blocks = block_masks(
            len(image), mim.grid, self.share, self.min_patches, self.min_aspect, image.device
        )  # (B, T)
        first = torch.arange(len(image), device=image.device) * (mim.grid[0] * mim.grid[1])
        positions = (first[:, None] + blocks).flatten()  # (M,) in the flattened (B * P)
        targets = mim.targets(image).flatten(0, 1)[positions]
        predicted = f.model.masked_image(f, positions)
        loss = masked_pixel_loss if targets.is_floating_point() else masked_cross_entropy
        return loss(predicted, targets)
