"""Gradient caching (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup").

Accumulated micro-batches, and yet every row is compared with those of all of them: the towers encode each micro-batch without
a graph, the losses see the encodings of the whole batch, and then each micro-batch is encoded once more, with the same
dropout, and takes the gradient that the losses have left at its encodings. Exact for every parameter. It costs a second
forward of the towers; fusion and heads run once, a micro-batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlp.config import Experiment
from vlp.distributed import world_size
from vlp.errors import UserError
from vlp.forward import Forward, StepContext
from vlp.types import Batch, Encoded


def validate(experiment: Experiment) -> None:
    """Raises UserError for objectives that would see one micro-batch alone."""
    for name, objective in experiment.objectives.items():
        if not getattr(objective, "supports_grad_cache", False):
            raise UserError(
                f"train.grad_cache: objectives.{name} ({type(objective).__name__}) compares the rows of a micro-batch alone; "
                f"leave it out, or set train.grad_cache=false"
            )


@dataclass
class Encoding:
    """One pass of a tower, to be repeated.

    Args:
        encode: the pass.
        given: its inputs.
        seed: of its dropout.
        out: what came out, leaves of the losses' graph.
    """

    encode: Callable[..., Encoded]
    given: tuple[Tensor, ...]
    seed: int
    out: Encoded


class CachedForward(Forward):
    """The bundle of one micro-batch, whose encodings have no graph until `replay`."""

    def __init__(self, model, batch: Batch, momentum: Forward | None, context: StepContext):
        super().__init__(model, batch, momentum, context)
        self.encodings: list[Encoding] = []

    def encode(self, encode: Callable[..., Encoded], *given: Tensor) -> Encoded:
        seed = int(torch.randint(2**62, ()))
        with torch.no_grad(), seeded(seed, given[0].device):
            made = encode(*given)
        for leaf in _differentiable(made).values():
            leaf.requires_grad_()
        self.encodings.append(Encoding(encode, given, seed, made))
        return made

    def for_view(self, batch: Batch, momentum: Forward | None) -> CachedForward:
        other = CachedForward(self.model, batch, momentum, self.context)
        other.encodings = self.encodings
        return other

    def replay(self) -> None:
        """Encodes again and takes the gradient from the encodings to the towers; to be called after all losses' backward."""
        for encoding in self.encodings:
            pairs = []
            with seeded(encoding.seed, encoding.given[0].device):
                made = encoding.encode(*encoding.given)
            again = _differentiable(made)
            for name, leaf in _differentiable(encoding.out).items():
                if leaf.grad is not None:
                    pairs.append((again[name], leaf.grad))
            if pairs:
                torch.autograd.backward(*zip(*pairs))
        self.encodings.clear()
        for bundle in filter(None, (self, self.momentum)):
            bundle.micro_batches = ()  # bundles that refer to each other would outlive the step


def _differentiable(encoded: Encoded, prefix: str = "") -> dict[str, Tensor]:
    found = {f"{prefix}{name}": getattr(encoded, name) for name in ("tokens", "embed", "inputs")}
    if encoded.vl is not None:
        found |= _differentiable(encoded.vl, f"{prefix}vl.")
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@contextmanager
def seeded(seed: int, device: torch.device):
    """Random numbers from ``seed`` inside, and outside as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def bundles(
    model: nn.Module, batches: Sequence[Batch], momentum: nn.Module | None, context: StepContext
) -> list[CachedForward]:
    """One of each micro-batch, all of which the losses take as one batch."""
    found = []
    for batch in batches:
        teacher = Forward(momentum, batch, context=context) if momentum else None
        found.append(CachedForward(model, batch, teacher, context))
    join(found)
    join([f.momentum for f in found if f.momentum])
    return found


def join(found: Sequence[Forward]) -> None:
    for f in found:
        f.micro_batches = tuple(found)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """What DDP does in its backward, for gradients that were made past it: one mean over the processes."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))
