"""The samples of a data set with the images of other samples, for an evaluation that shows how much a model reads the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from vlp.errors import UserError


class OtherImages(Dataset):
    """The samples of a data set, each with the image of another usable sample.

    The images are exchanged in a random cycle over all samples, which depends only on the seed and their number. A data set
    with a single usable image shows it in black.

    Args:
        dataset: Data set for `vlp.data.stream.evaluation_batches` with ``with_image_of(sample, other)``.
        seed: Seed of the cycle.
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset = dataset
        order = np.random.default_rng(seed).permutation(len(dataset))
        self.following = np.empty_like(order)  # position of the next sample in the cycle
        self.following[order] = np.roll(order, -1)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, positions: Sequence[int]) -> tuple[list, list[dict]] | UserError:
        found, bad = [], []
        try:
            for position in positions:
                samples, unusable = self._read(position)
                bad += unusable
                found += [self.dataset.with_image_of(sample, self._other(position)) for sample in samples]
        except UserError as e:  # returned, as in `vlp.data.stream.TrainDataset`
            return e
        return found, bad

    def _other(self, position: int) -> Any | None:
        """Return the next usable sample of the cycle, None if there is no other."""
        other = self.following[position]
        while other != position:
            samples, _ = self._read(other)
            if samples:
                return samples[0]
            other = self.following[other]
        return None

    def _read(self, position: int) -> tuple[list, list[dict]]:
        read = self.dataset.__getitems__([position])
        if isinstance(read, UserError):
            raise read
        return read


def exchange(image: Any, other: Any | None) -> Any:
    """Return the transformed image ``other``, black for None.

    Args:
        image: Own image: a tensor, or a tuple of a tensor and facts about the image that its annotations refer to, which stay.
        other: Image in the same form.
    """
    if isinstance(image, Tensor):
        return image * 0 if other is None else other
    return exchange(image[0], other and other[0]), *image[1:]
