"""Equal random choices on every device and in every precision, so that steps can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vlp.losses import pairwise
from vlp.objectives import itm

MAKERS = (torch.rand, torch.randn, torch.randint, torch.randperm)
CHOICES = ((itm, "sample_hard_negatives"), (pairwise, "_semi_hard"), (pairwise, "_hardest"))


class DrawsOnCpu(TorchFunctionMode):
    """Take every random number from the CPU's generator, and send it to the device that it was asked for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in MAKERS:
            device = kwargs.pop("device", "cpu")
            return function(*args, **kwargs).to(device)
        if function is torch.multinomial:
            weights, *rest = args
            return function(weights.cpu(), *rest, **kwargs).to(weights.device)
        if function is Tensor.exponential_:
            target, *rest = args
            return target.copy_(function(torch.empty(target.shape, dtype=target.dtype), *rest, **kwargs))
        return function(*args, **kwargs)


@contextmanager
def recorded(kept: list) -> Iterator[None]:
    """Keep which negatives and triplets are chosen."""

    def record(choose: Callable) -> Callable:
        def chosen(*given, **named):
            kept.append(choose(*given, **named))
            return kept[-1]

        return chosen

    with _each_choice(record):
        yield


@contextmanager
def replayed(kept: list) -> Iterator[None]:
    """Choose what was kept: with other rounding another row may win, and the losses would be of other pairs."""
    left = iter(kept)
    with _each_choice(lambda choose: lambda *given, **named: next(left)):
        yield


@contextmanager
def _each_choice(wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, name in CHOICES:
            stack.enter_context(patch.object(module, name, wrap(getattr(module, name))))
        yield
