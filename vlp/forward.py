"""Lazy cache of a training step's forward passes: each network runs at most once, on first access.

B rows of a bundle, M rows of all processes and micro-batches, N tokens, L text tokens, D width, E embedding.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.nn import functional as F

from vlp.distributed import gather_with_gradient, rank, world_size
from vlp.errors import NonFiniteLoss, UserError
from vlp.models.base import Model
from vlp.types import Batch, Encoded, MaskedIds, Vocabulary, keep_host_copy, on_host

PART = "vlp/"
"""Beginning of the names by which `vlp.training.profile` finds the parts of a step."""

Scope = Literal["global", "local"]
"""Whose rows are compared: those of all processes, or those of this process only."""
Head = Literal["first", "vl"]
"""One of the contrastive heads of a model."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class StepContext:
    """Per-step context that is neither model nor batch.

    Args:
        queues: Objective -> its queue or memory bank, as it was before the step.
        vocabulary: Vocabulary of the run's tokenizer, or None without texts.
        progress: Progress of the run in epochs, for ramps.
        step: Optimizer steps done.
        max_text_length: Tokens of the longest text of a run, so that processes can pad texts equally. None if unknown.
    """

    queues: Mapping[Any, Any] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    progress: float = 0.0
    step: int = 0
    max_text_length: int | None = None

    def ramp(self, epochs: float) -> float:
        """Return a factor that grows linearly from 0 to 1 over the first ``epochs``, or 1 if ``epochs`` is 0."""
        return min(1.0, self.progress / epochs) if epochs else 1.0


def mark_part(name: str) -> record_function:
    """Mark the operations of a part of a step for a profile. Costs some microseconds if none is running."""
    return record_function(PART + name)


class Graph:
    """How the passes of a step are connected in autograd.

    Here it is a single graph from the losses to the parameters. `vlp.training.detached.DetachedGraph` splits it.
    """

    def encode(self, model: Model, encode: Callable[..., Encoded], *inputs: Tensor) -> Encoded:
        """Run a tower of ``model``."""
        return encode(*inputs)

    def share(self, value: Value) -> Value:
        """Return a result that several losses read, as they should see it."""
        return value

    def losses(
        self, objectives: Mapping[str, Any], micro_batches: Sequence[Forward]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute every loss, and the total whose backward pass gives the gradient of the step.

        Returns:
            The losses by name, means over the micro-batches, and sum(weight * loss).
        """
        parts = []
        for f in micro_batches:
            parts.append(compute_losses(objectives, f))
            f.free_activations()
        losses = {name: torch.stack([part[name] for part in parts]).mean() for name in objectives}
        return losses, weighted_sum(objectives, losses)


SINGLE_GRAPH = Graph()


def compute_losses(objectives: Mapping[str, Any], f: Forward) -> dict[str, Tensor]:
    """Compute the losses of a bundle.

    Raises:
        UserError: if a loss is not a scalar.
        NonFiniteLoss: the first one, after all losses have been computed. They communicate, and other processes, whose
            losses are finite, wait for this one.
    """
    losses, complaints = {}, []
    for name, objective in objectives.items():
        try:
            with mark_part(f"loss {name}"):
                losses[name] = objective(f)
            if losses[name].dim():
                raise UserError(
                    f"objectives.{name} returned a tensor of shape {tuple(losses[name].shape)}; a loss is a scalar, so average "
                    f"over the rows"
                )
        except NonFiniteLoss as error:
            complaints.append(error)
    if complaints:
        raise complaints[0]
    return losses


def weighted_sum(objectives: Mapping[str, Any], losses: Mapping[str, Tensor]) -> Tensor:
    """Return sum(weight * loss) over ``losses``."""
    return reduce(operator.add, (objectives[name].weight * loss for name, loss in losses.items()))


class Bundle:
    """One network on one batch: lazy, typed, without side effects.

    Args:
        model: The network: the trained model or its momentum encoder.
        batch: Its inputs.
        context: Context of the step.
        graph: How passes are connected in autograd.
        encoded: Encodings that exist already, by the name of the property that returns them, e.g. {"image": ...}.
    """

    def __init__(
        self,
        model: Model,
        batch: Batch,
        context: StepContext = StepContext(),
        graph: Graph = SINGLE_GRAPH,
        encoded: Mapping[str, Encoded] | None = None,
    ):
        self.model, self.batch, self.context, self.graph = model, batch, context, graph
        self._encoded = dict(encoded or {})
        self._masked: dict[Callable[..., MaskedIds], MaskedIds] = {}
        self._gathered: dict[tuple[str, Scope], Any] = {}

    def encode(self, name: str, encode: Callable[..., Encoded], *inputs: Tensor) -> Encoded:
        """Run a tower once and keep its result under ``name``. Every pass of a tower goes through here."""
        if name not in self._encoded:
            self._encoded[name] = self.graph.encode(self.model, encode, *inputs)
        return self._encoded[name]

    @property
    def image(self) -> Encoded:
        """The encoded images."""
        return self.encode("image", self.model.encode_image, self.batch.image)

    @property
    def text(self) -> Encoded:
        """The encoded texts."""
        return self.encode("text", self.model.encode_text, self.batch.input_ids, self.batch.attention_mask)

    @property
    def momentum(self) -> Bundle:
        """The momentum encoder on the same batch. Only `Forward` has one."""
        raise ValueError("a view, or a momentum encoder, has no momentum encoder; see f.momentum.views")

    @cached_property
    def views(self) -> tuple[Bundle, ...]:
        """The same network on the further views of the samples, each view in passes of its own."""
        return tuple(Bundle(self.model, view, self.context, self.graph) for view in self.batch.views)

    @cached_property
    def image_views(self) -> tuple[Encoded, ...]:
        """All views of the images, the first included, encoded in one pass. A BatchNorm sees them together."""
        views = [self.batch.image, *(view.image for view in self.batch.views)]
        return _split(self.encode("image_views", self.model.encode_image, torch.cat(views)), len(views))

    @cached_property
    def text_views(self) -> tuple[Encoded, ...]:
        """All views of the texts, encoded in one pass. Each row has its own dropout: two equal texts are two views."""
        views = [self.batch, *self.batch.views]
        longest = max(view.input_ids.shape[1] for view in views)
        ids = _joined([view.input_ids for view in views], longest)  # (views * B, L)
        mask = _joined([view.attention_mask for view in views], longest)
        return _split(self.encode("text_views", self.model.encode_text, ids, mask), len(views))

    @cached_property
    def projected(self) -> Any:
        """What fusion reads of the images (`Model.project`), shared by every pass that fuses texts with them."""
        return self.graph.share(self.model.project(self.image))

    @cached_property
    def fused(self) -> Tensor:
        """(B, L, D) every state of the texts fused with their images (`Model.fuse_all`)."""
        return self.model.fuse_all(self)

    def masked(self, masking: Callable[..., MaskedIds]) -> MaskedIds:
        """Mask the texts with ``masking``. The masks are drawn once, so that a teacher reads the same ones."""
        if masking not in self._masked:
            self._masked[masking] = masking(self.batch.input_ids, self.batch.attention_mask, self.context.vocabulary)
        return self._masked[masking]

    def free_activations(self) -> None:
        """Drop cached activations that only the losses use. Autograd keeps them alive until backward frees them."""
        for name in ("projected", "fused"):
            vars(self).pop(name, None)

    def cached_embeddings(self) -> dict[str, Tensor]:
        """Return the (B, E) embeddings that the step has computed, by name, for the log. Nothing is computed for it.

        What follows a colon in a name tells apart several ways to encode the same input, and is dropped.
        """
        joint = {"image_views", "text_views"}
        single = {name: encoded for name, encoded in sorted(self._encoded.items()) if name not in joint}
        found = {name.partition(":")[0]: encoded.embed for name, encoded in single.items()}
        for name in sorted(joint & self._encoded.keys()):
            views = self._encoded[name].embed.chunk(1 + len(self.batch.views))
            found |= {f"view_{i}": embed for i, embed in enumerate(views)}
        return found


class Forward(Bundle):
    """What an objective is called with: the trained model on a micro-batch, and everything that belongs to it.

    | member | meaning |
    |---|---|
    | ``image``, ``text`` | the encoded images and texts |
    | ``views`` | the same model on further views of the samples; ``image_views`` and ``text_views`` encode all in one pass |
    | ``momentum`` | the momentum encoder on the same batch, without gradient |
    | ``fused`` | the texts fused with their images; ``projected`` is what fusion reads of the images |
    | ``all`` | the rows of all processes and micro-batches, see `Gathered`: what contrastive losses compare with |
    | ``measure`` | records a number for the log, such as an accuracy |

    A loss is defined for the B rows of a bundle such that its mean over processes and micro-batches is the loss of one
    process with the whole batch. No property changes another one's value, whatever the order of access.

    Args:
        model: The trained model.
        batch: The micro-batch of this process.
        momentum: The momentum encoder's bundle of the same batch. Its parameters take no gradient.
        context: Context of the step.
        graph: How passes are connected in autograd.
        micro_batches: The bundles that losses take as one batch, this one among them; None means only this one.
        encoded: Encodings that exist already, by the name of the property that returns them.
    """

    def __init__(
        self,
        model: Model,
        batch: Batch,
        momentum: Bundle | None = None,
        context: StepContext = StepContext(),
        graph: Graph = SINGLE_GRAPH,
        micro_batches: MicroBatches | None = None,
        encoded: Mapping[str, Encoded] | None = None,
    ):
        super().__init__(model, batch, context, graph, encoded)
        self._momentum = momentum
        self._measured: dict[tuple[int, str], Tensor] = {}  # by the id of the objective, and the name
        # Weak, because bundles that refer to each other would outlive the step.
        self._micro_batches = None if micro_batches is None else weakref.ref(micro_batches)

    @property
    def momentum(self) -> Bundle:
        """The momentum encoder on the same batch; ValueError if the run keeps none."""
        if self._momentum is None:
            raise ValueError("this step has no momentum encoder; set momentum=MomentumConfig(...) in the experiment")
        return self._momentum

    @property
    def micro_batches(self) -> Sequence[Forward]:
        """The bundles that losses take as one batch, this one among them."""
        if self._micro_batches is None:
            return (self,)
        group = self._micro_batches()
        if group is None:
            raise RuntimeError("the micro-batches of this step are gone; keep their MicroBatches while you use one")
        return group

    @property
    def all(self) -> Gathered:
        """The rows of all processes and micro-batches, with gradient."""
        return self.scope("global")

    def scope(self, scope: Scope) -> Gathered:
        """Return the rows of all micro-batches, of all processes ("global") or only of this one ("local")."""
        return Gathered(self.micro_batches, self.micro_batches.index(self), scope)

    @property
    def scale(self) -> Tensor:
        """(1,) multiplier of cosine similarities."""
        return self.model.scale

    @torch.no_grad()
    def measure(self, objective: Any, name: str, values: Tensor, counted: Tensor) -> None:
        """Record a measure of the training for the log: the mean of ``values`` where ``counted``.

        Nothing waits for the device.

        Args:
            objective: The objective that measures.
            name: One of its ``measures``.
            values: (n,) numbers, or bools for a share.
            counted: (n,) bool.
        """
        if name not in objective.measures:
            raise ValueError(f"{type(objective).__name__}.measures does not name {name!r}")
        pair = torch.stack([torch.where(counted, values, 0).double().sum(), counted.double().sum()])  # (2,)
        self._measured[id(objective), name] = pair

    def measured(self, objectives: Iterable[Any]) -> Tensor:
        """Return (measures, 2) sums and counts of the measures of ``objectives``, 0 for one that was not recorded."""
        none = torch.zeros(2, dtype=torch.float64, device=self.batch.image_id.device)
        keys = [(id(objective), name) for objective in objectives for name in objective.measures]
        return torch.cat([none[:0], *(self._measured.get(key, none) for key in keys)]).view(-1, 2)

    def with_head(self, head: Head) -> Forward:
        """Return this bundle as contrastive losses see it through one of the model's contrastive heads."""
        return self if head == "first" else HeadView(self)

    def free_activations(self) -> None:
        super().free_activations()
        if self._momentum is not None:
            self._momentum.free_activations()

    def cached_embeddings(self) -> dict[str, Tensor]:
        found = super().cached_embeddings()
        if self._momentum is not None and len(found) < 2:  # a method that contrasts with the teacher's embedding
            teachers = (self._momentum, *self._momentum.views)
            keys = [embed for teacher in teachers for embed in teacher.cached_embeddings().values()]
            found |= dict(zip(["key"], keys))
        return found


class MicroBatches(Sequence[Forward]):
    """The micro-batches of one process that losses take as one batch.

    Bundles refer to it weakly: keep it alive as long as they are used. It is neither a list nor a tuple, because engines
    rebuild those when a module returns them.

    Args:
        batches: In the order of the data.
        momentum: The momentum encoder, or None.
    """

    def __init__(
        self,
        model: Model,
        batches: Sequence[Batch],
        momentum: Model | None = None,
        context: StepContext = StepContext(),
        graph: Graph = SINGLE_GRAPH,
    ):
        self._bundles = []
        for batch in batches:
            teacher = None if momentum is None else Bundle(momentum, batch, context)
            group = self if len(batches) > 1 else None
            self._bundles.append(Forward(model, batch, teacher, context, graph, group))

    def __len__(self) -> int:
        return len(self._bundles)

    def __getitem__(self, number: Any) -> Any:
        return self._bundles[number]

    def __iter__(self) -> Iterator[Forward]:
        return iter(self._bundles)


class Gathered:
    """The rows of several micro-batches and processes, in the order of the data.

    It mirrors the names of a bundle: ``f.all.views[0].image`` is the gathered ``f.views[0].image.embed``. Gradient flows
    back to where a row was computed, summed over the bundles and processes that used it.

    Args:
        bundles: One per micro-batch.
        own: Number of the micro-batch whose loss is computed.
        scope: "global" gathers from all processes; "local" does not communicate.
    """

    def __init__(self, bundles: Sequence[Bundle], own: int, scope: Scope):
        self.bundles, self.own, self.scope = bundles, own, scope

    def gather(self, rows: Callable[[Bundle], Tensor]) -> Tensor:
        """Gather ``rows(bundle)`` (B, ...) of every bundle to (M, ...)."""
        parts = [rows(bundle) for bundle in self.bundles]
        if self.scope == "global":
            parts = [gather_with_gradient(part) for part in parts]  # each (processes * B, ...)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def image(self) -> Tensor:
        """(M, E) embeddings of the images, unit norm."""
        return self._once("image", lambda bundle: bundle.image.embed)

    @property
    def text(self) -> Tensor:
        """(M, E) embeddings of the texts, unit norm."""
        return self._once("text", lambda bundle: bundle.text.embed)

    @property
    def image_id(self) -> Tensor:
        """(M,) ids; rows with equal ids show the same image."""
        return self._once("image_id", lambda bundle: bundle.batch.image_id)

    @property
    def views(self) -> tuple[Gathered, ...]:
        """The further views of the same rows."""
        views = zip(*(bundle.views for bundle in self.bundles))
        return tuple(Gathered(bundles, self.own, self.scope) for bundles in views)

    @property
    def momentum(self) -> Gathered:
        """The momentum encoder on the same rows."""
        return Gathered([bundle.momentum for bundle in self.bundles], self.own, self.scope)

    @property
    def num_rows(self) -> int:
        """M, without communication."""
        processes = world_size() if self.scope == "global" else 1
        return processes * sum(len(bundle.batch) for bundle in self.bundles)

    @property
    def is_own_rows(self) -> bool:
        """Whether the M rows are the B own rows, in one bundle of one process."""
        return len(self.bundles) == 1 and (self.scope == "local" or world_size() == 1)

    @property
    def rows(self) -> Tensor:
        """(B,) positions of the own micro-batch's rows of this process among the M rows."""
        batch = self.bundles[self.own].batch
        processes, process = (world_size(), rank()) if self.scope == "global" else (1, 0)
        first = (self.own * processes + process) * len(batch)
        return torch.arange(first, first + len(batch), device=batch.image_id.device)

    def _once(self, name: str, rows: Callable[[Bundle], Tensor]) -> Tensor:
        """Gather on first access: objectives that read the same name share one all-gather."""
        gathered = self.bundles[self.own]._gathered
        if (name, self.scope) not in gathered:
            gathered[name, self.scope] = self.gather(rows)
        return gathered[name, self.scope]


class _HeadBundle(Bundle):
    """The encodings of another bundle through the model's second contrastive head: `Encoded.vl`."""

    def __init__(self, first: Bundle):
        super().__init__(first.model, first.batch, first.context, first.graph)
        self._first = first

    @property
    def image(self) -> Encoded:
        return _second_head(self._first.image)

    @property
    def text(self) -> Encoded:
        return _second_head(self._first.text)


class HeadView(Forward):
    """The encodings of another bundle through the model's second contrastive head, with the scale of that head."""

    def __init__(self, first: Forward):
        momentum = None if first._momentum is None else _HeadBundle(first._momentum)
        super().__init__(first.model, first.batch, momentum, first.context, first.graph)
        self._first, self._measured = first, first._measured

    image = _HeadBundle.image
    text = _HeadBundle.text

    @property
    def micro_batches(self) -> Sequence[Forward]:
        return tuple(self if f is self._first else HeadView(f) for f in self._first.micro_batches)

    @property
    def scale(self) -> Tensor:
        return self.model.vl.scale


def _second_head(encoded: Encoded) -> Encoded:
    if encoded.vl is None:
        raise ValueError("the model has no second contrastive head; build it with itc_vl=True")
    return encoded.vl


def _split(encoded: Encoded, views: int) -> tuple[Encoded, ...]:
    size = len(encoded.embed) // views
    return tuple(encoded[i * size : (i + 1) * size] for i in range(views))


def _joined(parts: Sequence[Tensor], length: int) -> Tensor:
    """Pad the rows of several (B, <= L) tensors with zeros to L and join them. The result has a copy on the host too."""
    joined = torch.cat([F.pad(part, (0, length - part.shape[1])) for part in parts])
    return keep_host_copy(
        joined, np.concatenate([np.pad(x, ((0, 0), (0, length - x.shape[1]))) for x in map(on_host, parts)])
    )
