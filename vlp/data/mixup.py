"""Mixup and CutMix for fine-tuning on classes: every image of a batch is mixed with another one, and so are their labels.

B images, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vlp.types import Batch


@dataclass(frozen=True)
class Mixup:
    """Mixup and CutMix as timm implements them.

    Mixup is ``x = l x_i + (1 - l) x_j`` with l from Beta(a, a) (Zhang et al. 2018). CutMix pastes a box of x_j into x_i
    (Yun et al. 2019). l, the box, and the choice between the two are drawn once per micro-batch of a process. j is i in
    reverse order.

    Args:
        mixup: a of Mixup; 0 disables it.
        cutmix: a of CutMix; 0 disables it.
        probability: Probability that a batch is mixed.
        switch: Share of CutMix where both are enabled.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    probability: float = 1.0
    switch: float = 0.5

    def __call__(self, batch: Batch, classes: int, key: tuple[int, ...]) -> Batch:
        """Mix the images of a batch in place and return the batch with (B, C) ``targets``.

        Args:
            batch: Batch on its device, with normalised images and labels.
            classes: C.
            key: Non-negative integers that all draws depend on. The same key gives the same result.

        Raises:
            ValueError: if B is odd, or the batch has no labels.
        """
        from timm.data import Mixup as TimmMixup

        if batch.labels is None or len(batch) % 2:
            raise ValueError("images are mixed in pairs: the batch needs an even number of images, with labels")
        mixup = TimmMixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.probability,
            switch_prob=self.switch,
            label_smoothing=0.0,  # applied by the objective
            num_classes=classes,
        )
        before = np.random.get_state()  # timm draws from numpy's global generator
        np.random.seed(np.random.SeedSequence(key).generate_state(4))
        try:
            image, targets = mixup(batch.image, batch.labels)  # (B, 3, H, W), (B, C)
        finally:
            np.random.set_state(before)
        return replace(batch, image=image, targets=targets)
