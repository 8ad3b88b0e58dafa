"""What a step runs: every network once, when first asked for, and its results by name.

B rows of this process, M rows of all processes, N tokens, E embedding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.distributed import gather_with_gradient, rank, world_size
from vlp.types import Batch, Encoded, MaskedIds, Vocabulary

Among = Literal["all", "process"]
Head = Literal["first", "vl"]


@dataclass(frozen=True)
class Keys:
    """What the rows of this process are compared with: those of all processes, in the order of the data.

    Args:
        image: (M, E) unit norm.
        text: (M, E) unit norm.
        image_id: (M,) equal index = same picture.
    """

    image: Tensor
    text: Tensor
    image_id: Tensor


@dataclass(frozen=True)
class StepContext:
    """What a step has besides model and batch.

    Args:
        queues: objective -> its queue or bank, as it was before the step.
        vocabulary: of the run's tokenizer; None where there is no text.
        progress: in epochs, for ramps.
        step: optimizer steps done.
    """

    queues: Mapping[Any, Any] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    progress: float = 0.0
    step: int = 0

    def ramp(self, epochs: float) -> float:
        """What grows from 0 to 1 over the first ``epochs``; 1 where there are none."""
        return min(1.0, self.progress / epochs) if epochs else 1.0


class Forward:
    """A lazy, typed bundle of one model on one batch. No property writes state; nothing runs that no objective asks for.

    Args:
        momentum: the momentum encoder's bundle of the same batch; its parameters take no gradient. None = there is none.
    """

    def __init__(self, model, batch: Batch, momentum: Forward | None = None, context: StepContext = StepContext()):
        self.model, self.batch, self.momentum, self.context = model, batch, momentum, context
        self._micro_batches: tuple[Forward, ...] = ()  # not (self,): a bundle that refers to itself outlives its step
        self._masked: dict[Callable[..., MaskedIds], MaskedIds] = {}

    @cached_property
    def views(self) -> tuple[Forward, ...]:
        """The bundles of the further views."""
        teachers = self.momentum.views if self.momentum else (None,) * len(self.batch.views)
        return tuple(self.for_view(b, t) for b, t in zip(self.batch.views, teachers))

    def for_view(self, batch: Batch, momentum: Forward | None) -> Forward:
        """A bundle of the same model in the same step."""
        return Forward(self.model, batch, momentum, self.context)

    def with_head(self, head: Head) -> Forward:
        """This bundle as contrastive losses see it by the model's "first" head, or by its second, "vl"."""
        return self if head == "first" else HeadView(self)

    def encode(self, encode: Callable[..., Encoded], *given: Tensor) -> Encoded:
        """Every pass of a tower goes through here."""
        return encode(*given)

    @cached_property
    def image(self) -> Encoded:
        return self.encode(self.model.encode_image, self.batch.image)

    @cached_property
    def text(self) -> Encoded:
        return self.encode(self.model.encode_text, self.batch.input_ids, self.batch.attention_mask)

    @cached_property
    def projected(self) -> Any:
        """What fusion reads of the pictures, once for every pass that fuses texts with them: `model.project`."""
        return self.model.project(self.image)

    @cached_property
    def fused(self) -> Tensor:
        """(B, L, D) the texts when they have looked at their pictures, once for all that read every state: `model.fuse_all`."""
        return self.model.fuse_all(self)

    @cached_property
    def images(self) -> tuple[Encoded, ...]:
        """All views of the pictures in one pass, so that a BatchNorm sees them together (as SimCLR's does)."""
        views = [self.batch.image, *(b.image for b in self.batch.views)]
        return _split(self.encode(self.model.encode_image, torch.cat(views)), len(views))

    @cached_property
    def texts(self) -> tuple[Encoded, ...]:
        """All views of the texts in one pass. Each row has its own dropout: two equal texts are two views."""
        views = [self.batch, *self.batch.views]
        longest = max(b.input_ids.shape[1] for b in views)
        ids = [F.pad(b.input_ids, (0, longest - b.input_ids.shape[1])) for b in views]
        mask = [F.pad(b.attention_mask, (0, longest - b.attention_mask.shape[1])) for b in views]
        return _split(self.encode(self.model.encode_text, torch.cat(ids), torch.cat(mask)), len(views))

    @property
    def micro_batches(self) -> tuple[Forward, ...]:
        """The bundles of the micro-batches that losses take as one batch, this one among them; see `vlp.training.grad_cache`."""
        return self._micro_batches or (self,)

    @micro_batches.setter
    def micro_batches(self, micro_batches: tuple[Forward, ...]) -> None:
        self._micro_batches = micro_batches

    def masked(self, masking: Callable[..., MaskedIds]) -> MaskedIds:
        """The texts with masks, drawn when first asked for; the momentum encoder is to read the same."""
        if masking not in self._masked:
            self._masked[masking] = masking(self.batch.input_ids, self.batch.attention_mask, self.context.vocabulary)
        return self._masked[masking]

    def gathered(self, what: Callable[[Forward], Tensor], among: Among = "all") -> Tensor:
        """``what`` (B, ...) of every bundle that counts as the same batch, in the order of the data.

        Gradient flows back to where a row was made, summed over the processes that used it.

        Args:
            among: "all" processes, or this "process" alone, without communication.
        """
        gather = gather_with_gradient if among == "all" else lambda x: x
        parts = [gather(what(micro_batch)) for micro_batch in self.micro_batches]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def rows(self, among: Among = "all") -> Tensor:
        """(B,) where the rows of this bundle are among the `gathered` ones."""
        size, places, place = len(self.batch), *((world_size(), rank()) if among == "all" else (1, 0))
        first = (self.micro_batches.index(self) * places + place) * size
        return torch.arange(first, first + size, device=self.batch.image_id.device)

    @cached_property
    def keys(self) -> Keys:
        """Everything that the rows of this bundle can be compared with, with gradient; see `gathered`."""
        return self._keys("all")

    def keys_among(self, among: Among) -> Keys:
        return self.keys if among == "all" else self._keys(among)

    def _keys(self, among: Among) -> Keys:
        return Keys(
            self.gathered(lambda f: f.image.embed, among),
            self.gathered(lambda f: f.text.embed, among),
            self.gathered(lambda f: f.batch.image_id, among),
        )

    def losses(self, objectives: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """The losses by name, and sum(weight * loss)."""
        losses = {name: objective(self) for name, objective in objectives.items()}
        self.free_activations()
        return losses, sum(o.weight * losses[name] for name, o in objectives.items())

    def free_activations(self) -> None:
        """Drops what only losses read. From then on their graph alone holds it, and lets go of it in the backward."""
        for bundle in filter(None, (self, self.momentum)):
            for name in ("projected", "fused"):
                vars(bundle).pop(name, None)

    def cached_embeddings(self) -> dict[str, Tensor]:
        """(B, E) embeddings that were made on the way, by name, for measures; none is computed for this."""
        made = vars(self)
        found = {name: made[name].embed for name in ("image", "text") if name in made}
        for name in ("images", "texts"):
            found |= {f"view_{i}": view.embed for i, view in enumerate(made.get(name, ()))}
        if self.momentum and not len(found) > 1:
            taught = [
                e for teacher in (self.momentum, *self.momentum.views) for e in teacher.cached_embeddings().values()
            ]
            found |= dict(zip(["key"], taught))
        return found


class HeadView(Forward):
    """The same encodings by a model's second contrastive head: `Encoded.vl`, and ``model.vl`` with its own scale."""

    def __init__(self, first: Forward):
        momentum = HeadView(first.momentum) if first.momentum else None
        super().__init__(first.model.vl, first.batch, momentum, first.context)
        self.first = first

    @property
    def image(self) -> Encoded:
        return self.first.image.vl

    @property
    def text(self) -> Encoded:
        return self.first.text.vl

    @property
    def micro_batches(self) -> tuple[Forward, ...]:
        return tuple(
            self if micro_batch is self.first else HeadView(micro_batch) for micro_batch in self.first.micro_batches
        )


def _split(encoded: Encoded, views: int) -> tuple[Encoded, ...]:
    size = len(encoded.embed) // views
    return tuple(encoded[i * size : (i + 1) * size] for i in range(views))
