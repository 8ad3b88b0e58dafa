"""Exponential moving average of the weights, and the settings of the momentum encoder."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class MomentumConfig:
    """The momentum encoder: a moving average of the whole model that encodes keys or gives targets, without gradient.

    Args:
        decay: share of the old weights that stays at each step (MoCo 0.999, ALBEF and ESimCSE 0.995).
        mode: "train" = with dropout and batch statistics, as MoCo and ALBEF run theirs, but where the model is frozen;
            "eval" = without (ESimCSE).
    """

    decay: float = 0.999
    mode: Literal["train", "eval"] = "train"


class EMA:
    """Exponential moving average of a model's weights: a <- decay * a + (1 - decay) * w, in float32 after every step.

    Buffers (running means) are copied, not averaged. ``network`` is the model with the averaged weights; it takes no
    gradient.
    """

    def __init__(self, model: nn.Module, decay: float, mode: Literal["train", "eval"] = "eval"):
        self.decay = decay
        self.network = copy.deepcopy(model).float().requires_grad_(False)
        if mode == "eval":  # else as the model: what is frozen there stays in evaluation mode here too
            self.network.eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        current = [p.detach().float() for p in model.parameters()]
        torch._foreach_lerp_(list(self.network.parameters()), current, 1 - self.decay)
        for own, buffer in zip(self.network.buffers(), model.buffers()):
            own.copy_(buffer)

    def tensors(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.network.load_state_dict(tensors)
