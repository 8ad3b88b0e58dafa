"""Exponential moving average (EMA) of the weights, and the settings of the momentum encoder."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlp.distributed import local_shard
from vlp.specs.fields import setting


@dataclass(frozen=True)
class MomentumConfig:
    """Momentum encoder: an EMA of the whole model that encodes keys or computes targets, without gradient.

    Args:
        decay: Fraction of the old weights that remains at each step (0.999 in MoCo, 0.995 in ALBEF and ESimCSE).
        mode: "train" runs the momentum encoder with dropout and batch statistics, as MoCo and ALBEF do. Modules that
            are frozen in the model remain in evaluation mode. "eval" runs it without either (ESimCSE).
    """

    decay: float = setting(0.999, least=0, most=1)
    mode: Literal["train", "eval"] = "train"


class EMA:
    """Exponential moving average of a model's weights: a <- decay * a + (1 - decay) * w, in float32 after every step.

    Buffers such as running means are copied instead of averaged.

    Attributes:
        network: Copy of the model with the averaged weights. It takes no gradient.
    """

    def __init__(self, model: nn.Module, decay: float, mode: Literal["train", "eval"] = "eval"):
        self.decay = decay
        self.network = copy.deepcopy(model).float().requires_grad_(False)
        if mode == "eval":  # "train" keeps the mode of each module, so frozen modules remain in evaluation mode
            self.network.eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights of ``model`` by one step.

        If both are sharded over processes, each process averages its own part.
        """
        averaged = [local_shard(p) for p in self.network.parameters()]
        current = [local_shard(p).float() for p in model.parameters()]
        torch._foreach_lerp_(averaged, current, 1 - self.decay)
        for own, buffer in zip(self.network.buffers(), model.buffers()):
            own.copy_(buffer)

    def tensors(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.network.load_state_dict(tensors)
