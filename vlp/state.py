"""What a run carries from step to step besides weights and optimizer: outside the wrapped module, changed after the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of a model's weights: a <- decay * a + (1 - decay) * w, in float32 after every step.

    Buffers (running means) are copied, not averaged.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {n: p.detach().to(torch.float32, copy=True) for n, p in model.named_parameters()}
        self.buffers = {n: t.detach().clone() for n, t in model.state_dict().items() if n not in self.weights}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        current = [p.detach().float() for p in model.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - self.decay)
        current = model.state_dict()
        for name, buffer in self.buffers.items():
            buffer.copy_(current[name])

    def tensors(self) -> dict[str, Tensor]:
        return {**self.weights, **self.buffers}

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model has the averaged weights."""
        own = {n: t.detach().clone() for n, t in model.state_dict().items()}
        model.load_state_dict(self.tensors())
        try:
            yield
        finally:
            model.load_state_dict(own)


@dataclass
class TrainState:
    """Counters and averages of a run.

    Args:
        step: optimizer steps done.
        position: samples of the global stream consumed; the whole state of the data.
        skipped: steps left out because of a non-finite loss.
        truncated_captions: captions cut at ``data.max_length`` so far, all processes.
        average: None where no average is kept.
    """

    step: int = 0
    position: int = 0
    skipped: int = 0
    truncated_captions: int = 0
    average: Average | None = None

    def counters(self) -> dict:
        return {k: v for k, v in vars(self).items() if k != "average"}
