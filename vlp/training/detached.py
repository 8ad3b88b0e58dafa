"""Split the graph of a step to save memory: gradient caching, and one backward pass per loss.

Tensors that several losses read, such as the encodings of the towers, are detached: the losses see leaves. Each loss then
has a backward pass of its own, from the loss to parameters and leaves, which frees its graph. At the end the gradients at the
leaves are propagated through the parts of the graph that produced them. The gradient is exact for every parameter.

``train.grad_cache`` (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup") contrasts
against all micro-batches of the step. The towers encode each micro-batch without a graph. After the losses, they encode it a
second time with the same dropout and propagate the gradient. Fusion and heads run once, one micro-batch at a time.

``train.backward="per_loss"`` runs the losses on single modalities first, together, and then the losses that fuse
(``supports_split_backward``) one by one. The peak is that of the largest pass instead of the sum of all passes. It pays where
passes over pairs are large, as VLMo's, and not where fusion is small compared to the towers, as ALBEF's
(``python -m benchmarks albef_step vlmo_step``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vlp.config import Experiment
from vlp.distributed import any_process
from vlp.errors import NonFiniteLoss, UserError
from vlp.forward import Forward, Graph, compute_losses, weighted_sum
from vlp.losses.inputs import check_finite
from vlp.models.base import Model
from vlp.objectives.base import Objective
from vlp.types import Encoded, computing_on_host

Value = TypeVar("Value")


def validate(experiment: Experiment) -> None:
    """Raise UserError if the graph cannot be split as the experiment asks, or if splitting it has no effect."""
    if experiment.train.grad_cache:
        for name, objective in experiment.objectives.items():
            if not objective.supports_grad_cache:
                raise UserError(
                    f"train.grad_cache: objectives.{name} ({type(objective).__name__}) is not the loss of the whole batch "
                    f"when micro-batches are contrasted with each other; remove it, or set train.grad_cache=false"
                )
    fuses = any(objective.supports_split_backward for objective in experiment.objectives.values())
    if experiment.train.backward == "per_loss" and not fuses:
        raise UserError(
            "train.backward=per_loss saves nothing here: no objective fuses; leave it out, or see "
            "train.activation_checkpointing"
        )


@dataclass
class Segment:
    """A part of the graph that was detached.

    Args:
        outputs: Returns the outputs with their graph.
        leaves: What the losses saw in place of the outputs, in the same order.
    """

    outputs: Callable[[], list[Tensor]]
    leaves: list[Tensor]


class DetachedGraph(Graph):
    """A graph of detached segments.

    Args:
        model: The model whose parameters get the gradient.
        recompute: Run the towers without a graph and a second time after the losses (gradient caching).
        per_loss: One backward pass for each loss that fuses, so that the inputs of fusion are detached too.
    """

    def __init__(self, model: nn.Module, recompute: bool = False, per_loss: bool = False):
        self.parameters, self.recompute, self.per_loss = list(model.parameters()), recompute, per_loss
        self.segments: list[Segment] = []

    def encode(self, model: Model, encode: Callable[..., Encoded], *inputs: Tensor) -> Encoded:
        if self.recompute:
            return self._encode_without_graph(encode, *inputs)
        if model.fuses_inputs:
            return encode(*inputs, detach=self.detach)
        return self.detach(encode(*inputs))

    def share(self, value: Value) -> Value:
        return self.detach(value) if self.per_loss else value

    def detach(self, value: Value) -> Value:
        """Return ``value``, a tensor or tensors in tuples and dataclasses, without the graph that produced it."""
        return self._add_segment(value, lambda x: x.requires_grad and not x.is_leaf)

    def _encode_without_graph(self, encode: Callable[..., Encoded], *inputs: Tensor) -> Encoded:
        with computing_on_host():
            seed = int(torch.randint(2**62, ()).numpy())

        def run() -> Encoded:
            with seeded(seed, inputs[0].device):
                return encode(*inputs)

        with torch.no_grad():
            encoded = run()
        torch.clear_autocast_cache()  # casts of weights made without a graph must not be reused by passes with one
        return self._add_segment(encoded, Tensor.is_floating_point, run)

    def _add_segment(
        self, value: Value, is_detached: Callable[[Tensor], bool], rerun: Callable[[], Value] | None = None
    ) -> Value:
        outputs = [x for x in _tensors(value) if is_detached(x)]
        if not outputs:
            return value
        leaves = [x.detach().requires_grad_() for x in outputs]
        if rerun is None:
            self.segments.append(Segment(lambda: outputs, leaves))
        else:
            self.segments.append(Segment(lambda: [x for x in _tensors(rerun()) if is_detached(x)], leaves))
        replacements = iter(leaves)
        return _map(value, lambda x: next(replacements) if is_detached(x) else x)

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for segment in self.segments for leaf in segment.leaves]

    def losses(
        self, objectives: Mapping[str, Objective], micro_batches: Sequence[Forward]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the losses, without graphs, and a total whose backward pass gives the gradient found on the way.

        Raises:
            NonFiniteLoss: On all processes, if a loss of any process raises it, because their backward passes communicate.
        """
        gradients = Gradients(self.parameters)
        found: dict[str, list[Tensor]] = {name: [] for name in objectives}
        for f in micro_batches:
            for group in self._groups(objectives):
                losses = _finite_losses(group, f)
                gradients.add([weighted_sum(group, losses) / len(micro_batches)], self.leaves)
                for name, loss in losses.items():
                    found[name].append(loss.detach())
            f.free_activations()
        gradients.propagate(self.segments)
        means = {name: torch.stack(losses).mean() for name, losses in found.items()}
        return means, gradients.attach(weighted_sum(objectives, means))

    def _groups(self, objectives: Mapping[str, Objective]) -> Iterator[dict[str, Objective]]:
        """The objectives that take a backward pass together."""
        split = {name for name, o in objectives.items() if self.per_loss and o.supports_split_backward}
        if len(split) < len(objectives):
            yield {name: o for name, o in objectives.items() if name not in split}
        for name in objectives:
            if name in split:
                yield {name: objectives[name]}


def _finite_losses(group: Mapping[str, Objective], f: Forward) -> dict[str, Tensor]:
    """Compute the losses of ``group``; raise NonFiniteLoss on all processes if a loss of any raises it.

    Within `deferred_checks` only a loss that refuses its input at once does.
    """
    losses, complaint = {}, ""
    try:
        losses = compute_losses(group, f)
        check_finite(weighted_sum(group, losses))
    except NonFiniteLoss as error:
        complaint = str(error)
    if any_process(bool(complaint)):
        raise NonFiniteLoss(complaint or f"the loss of {', '.join(group)}, here or on another process,")
    return losses


class Gradients:
    """Gradients at parameters and at leaves, accumulated over backward passes."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.at: dict[int, Tensor] = {}

    def add(self, outputs: Sequence[Tensor], leaves: Sequence[Tensor], given: Sequence[Tensor] | None = None) -> None:
        """Run a backward pass from ``outputs`` to ``leaves`` and parameters. It frees their graph."""
        inputs = [*self.parameters, *leaves]
        with torch.autocast(outputs[0].device.type, enabled=False):
            found = torch.autograd.grad(outputs, inputs, given, allow_unused=True)
        for at, gradient in zip(inputs, found):
            if gradient is not None:
                before = self.at.get(id(at))
                # Not in place: autograd may have given the same tensor to several inputs.
                self.at[id(at)] = gradient if before is None else before + gradient

    def propagate(self, segments: list[Segment]) -> None:
        """Propagate the gradients at the leaves through their segments, the last first. Empties ``segments``.

        A segment may begin at the leaves of an earlier one.
        """
        while segments:
            segment = segments.pop()
            gradients = [self.at.pop(id(leaf), None) for leaf in segment.leaves]
            if all(gradient is None for gradient in gradients):
                continue
            pairs = zip(segment.outputs(), gradients)
            reached = [(x, gradient) for x, gradient in pairs if gradient is not None and x.requires_grad]
            if reached:  # a frozen tower has no graph
                outputs, given = zip(*reached)
                self.add(outputs, [leaf for earlier in segments for leaf in earlier.leaves], given)

    def attach(self, loss: Tensor) -> Tensor:
        """Return ``loss`` with a backward pass that gives the accumulated gradients to the parameters.

        The hooks of DDP and ZeRO run in that backward pass.
        """
        return _Attach.apply(loss, [self.at.pop(id(p), None) for p in self.parameters], *self.parameters)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: Tensor, gradients: list[Tensor | None], *parameters: nn.Parameter) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        scaled = []
        while gradients:  # one at a time, so that a second set of gradients never exists
            gradient = gradients.pop()
            scaled.append(None if gradient is None else gradient * upstream)
        return None, None, *reversed(scaled)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Fork the RNG with ``seed``; the outer state is restored on exit."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def collect(x: Tensor) -> Tensor:
        found.append(x)
        return x

    _map(value, collect)
    return found


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return ``value`` with ``change`` applied to every tensor in its tuples and dataclasses."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map(part, change) for part in value)
    if is_dataclass(value):
        return replace(value, **{name: _map(part, change) for name, part in vars(value).items()})
    return value
