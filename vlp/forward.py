"""What a step runs: every network once, when first asked for, and its results by name.

B rows of this process, M rows of all processes, N tokens, E embedding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.distributed import gather, gather_with_gradient
from vlp.state import Memory
from vlp.types import Batch, Encoded, Vocabulary


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


@dataclass(frozen=True)
class Surroundings:
    """What a step has besides model and batch.

    Args:
        memory: objective -> its queue or bank, as it was before the step.
        vocabulary: of the run's tokenizer; None where there is no text.
        progress: in epochs, for ramps.
    """

    memory: Mapping[Any, Memory] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    progress: float = 0.0


class Forward:
    """A lazy, typed bundle of one model on one batch. No property writes state; nothing runs that no objective asks for.

    Args:
        momentum: the momentum encoder's bundle of the same batch; its parameters take no gradient. None = there is none.
    """

    def __init__(self, model, batch: Batch, momentum: Forward | None = None, around: Surroundings = Surroundings()):
        self.model, self.batch, self.momentum, self.around = model, batch, momentum, around

    @cached_property
    def others(self) -> tuple[Forward, ...]:
        """The bundles of the further views."""
        teachers = self.momentum.others if self.momentum else (None,) * len(self.batch.others)
        return tuple(Forward(self.model, b, t, self.around) for b, t in zip(self.batch.others, teachers))

    @cached_property
    def image(self) -> Encoded:
        return self.model.encode_image(self.batch.image)

    @cached_property
    def text(self) -> Encoded:
        return self.model.encode_text(self.batch.input_ids, self.batch.attention_mask)

    @cached_property
    def images(self) -> tuple[Encoded, ...]:
        """All views of the pictures in one pass, so that a BatchNorm sees them together (as SimCLR's does)."""
        views = [self.batch.image, *(b.image for b in self.batch.others)]
        return _split(self.model.encode_image(torch.cat(views)), len(views))

    @cached_property
    def texts(self) -> tuple[Encoded, ...]:
        """All views of the texts in one pass. Each row has its own dropout: two equal texts are two views."""
        views = [self.batch, *self.batch.others]
        longest = max(b.input_ids.shape[1] for b in views)
        ids = [F.pad(b.input_ids, (0, longest - b.input_ids.shape[1])) for b in views]
        mask = [F.pad(b.attention_mask, (0, longest - b.attention_mask.shape[1])) for b in views]
        return _split(self.model.encode_text(torch.cat(ids), torch.cat(mask)), len(views))

    @cached_property
    def keys(self) -> Keys:
        """Gradient flows back to the process that encoded a row, summed over the processes that compared with it."""
        return Keys(
            gather_with_gradient(self.image.embed), gather_with_gradient(self.text.embed), gather(self.batch.index)
        )

    def ran(self) -> dict[str, Tensor]:
        """(B, E) embeddings that were made on the way, by name, for measures; none is computed for this."""
        made = vars(self)
        found = {name: made[name].embed for name in ("image", "text") if name in made}
        for name in ("images", "texts"):
            found |= {f"view_{i}": view.embed for i, view in enumerate(made.get(name, ()))}
        if self.momentum and not len(found) > 1:
            taught = [e for teacher in (self.momentum, *self.momentum.others) for e in teacher.ran().values()]
            found |= dict(zip(["key"], taught))
        return found


def _split(encoded: Encoded, views: int) -> tuple[Encoded, ...]:
    size = len(encoded.embed) // views
    return tuple(encoded[i * size : (i + 1) * size] for i in range(views))
