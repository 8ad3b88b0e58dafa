"""Mixup and CutMix: every picture of a batch is mixed with another, and so are their classes. For fine-tuning on classes.

B pictures, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vlp.types import Batch


@dataclass(frozen=True)
class Mixup:
    """timm's: ``x = l x_i + (1 - l) x_j``, l from Beta(a, a) (Zhang et al. 2018), or a box of x_j in x_i (Yun et al. 2019).

    l, the box and which of the two it is are drawn once a micro-batch of a process; j goes through it backwards.

    Args:
        mixup: a of mixup; 0 = none.
        cutmix: a of CutMix; 0 = none.
        probability: that a batch is mixed at all.
        switch: share of CutMix where there are both.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    probability: float = 1.0
    switch: float = 0.5

    def __call__(self, batch: Batch, classes: int, key: tuple[int, ...]) -> Batch:
        """The batch with mixed pictures, in place, and (B, C) ``targets``; the same for the same ``key``.

        Args:
            batch: on its device, with normalised pictures and labels.
            key: non-negative integers that all draws depend on.

        Raises:
            ValueError: if B is odd, or there are no labels.
        """
        from timm.data import Mixup as TimmMixup

        if batch.labels is None or len(batch) % 2:
            raise ValueError("pictures are mixed in pairs, of an even number with labels")
        mixup = TimmMixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.probability,
            switch_prob=self.switch,
            label_smoothing=0.0,  # the objective's
            num_classes=classes,
        )
        before = np.random.get_state()  # timm draws from numpy's global generator
        np.random.seed(np.random.SeedSequence(key).generate_state(4))
        try:
            image, targets = mixup(batch.image, batch.labels)
        finally:
            np.random.set_state(before)
        return replace(batch, image=image, targets=targets)
