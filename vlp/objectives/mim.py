"""Masked image modelling on any model with a ViT: codes of a frozen tokenizer as in BEiT, or pixels as in MAE.

The model has one method for it, ``masked_image(f, positions) -> (M, outputs)``, and the head ``mim`` with the grid of its
patches and what is to be predicted of them.

B pictures, P patches, T masked ones of each, M = B T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.config import Experiment
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.losses.masked import masked_cross_entropy, masked_pixel_loss
from vlp.objectives.masking import block_masks
from vlp.objectives.needs import need_image


@dataclass(frozen=True)
class MaskedImage:
    """Predict the masked patches from the others (BEiT, Bao et al. 2022, eq. 2; with pixels: MAE, He et al. 2022).

    Cross-entropy where ``model.mim`` gives codes, mean squared error where it gives values; over masked patches alone, as
    many in every picture. See `vlp.objectives.masking.block_masks`. Of several views the first is masked. What a tower has for
    pooling alone (an attention pool) takes no part: freeze it where several processes train.

    Args:
        share: of the patches that are masked. The paper's 0.4; its code masks 75 of 196.
        min_patches: of a block.
        min_aspect: of a block, height over width; the largest is its inverse.
    """

    weight: float = 1.0
    share: float = 0.4
    min_patches: int = 16
    min_aspect: float = 0.3

    def validate(self, experiment: Experiment) -> None:
        need_image(experiment, "masked image modelling")
        if getattr(experiment.model, "mim", None) is None:
            raise UserError("masked image modelling has nothing to predict; set model.mim=Pixels()")
        if not 0 < self.share < 1 or self.min_patches < 1 or not 0 < self.min_aspect <= 1:
            raise UserError(
                f"blocks of share={self.share:g}, min_patches={self.min_patches}, min_aspect={self.min_aspect:g} cannot be "
                f"drawn; share is between 0 and 1, min_patches at least 1, min_aspect above 0 and at most 1"
            )

    def __call__(self, f: Forward) -> Tensor:
        image, mim = f.batch.image, f.model.mim
        blocks = block_masks(len(image), mim.grid, self.share, self.min_patches, self.min_aspect, image.device)
        first = torch.arange(len(image), device=image.device) * (mim.grid[0] * mim.grid[1])
        positions = (first[:, None] + blocks).flatten()
        targets = mim.targets(image).flatten(0, 1)[positions]
        predicted = f.model.masked_image(f, positions)
        loss = masked_pixel_loss if targets.is_floating_point() else masked_cross_entropy
        return loss(predicted, targets)
