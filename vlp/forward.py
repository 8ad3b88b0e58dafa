"""What a step runs: every network once, when first asked for, and its results by name.

B rows of this process, M rows of all processes, N tokens, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from vlp.distributed import gather, gather_with_gradient
from vlp.types import Batch, Encoded


@dataclass(frozen=True)
class Keys:
    """What the rows of this process are compared with: those of all processes, in the order of the processes.

    Args:
        image: (M, E) unit norm.
        text: (M, E) unit norm.
        index: (M,) equal index = same picture.
    """

    image: Tensor
    text: Tensor
    index: Tensor


class Forward:
    """A lazy, typed bundle of one model on one batch. No property writes state; nothing runs that no objective asks for."""

    def __init__(self, model, batch: Batch):
        self.model, self.batch = model, batch

    @cached_property
    def image(self) -> Encoded:
        return self.model.encode_image(self.batch.image)

    @cached_property
    def text(self) -> Encoded:
        return self.model.encode_text(self.batch.input_ids, self.batch.attention_mask)

    @cached_property
    def keys(self) -> Keys:
        """Gradient flows back to the process that encoded a row, summed over the processes that compared with it."""
        return Keys(
            gather_with_gradient(self.image.embed), gather_with_gradient(self.text.embed), gather(self.batch.index)
        )
