"""The learned scale of similarities, a part of every model that contrasts images with texts."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from vlp.distributed import full_tensor

Form = Literal["temperature", "logit_scale"]


class LearnedScale(nn.Module):
    """A module with a learned ``temperature``, or with its inverse, learned as ``logit_scale`` (a log).

    The parameter has shape (1,), because engines refuse 0-dim parameters. Losses read `scale`.
    """

    def add_scale(self, temperature: float, low: float | None, high: float | None, form: Form = "temperature") -> None:
        """Create the parameter.

        Args:
            temperature: Initial temperature.
            low: Smallest temperature that takes effect. None leaves it unbounded.
            high: Largest temperature that takes effect. None leaves it unbounded.
            form: What is learned.
        """
        self.temperature_form = form
        if form == "temperature":
            self.temperature = nn.Parameter(torch.tensor([float(temperature)]))
            self.bounds = low, high
        else:
            self.logit_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))
            self.bounds = high and -math.log(high), low and -math.log(low)

    @property
    def scale(self) -> Tensor:
        """(1,) multiplier of cosine similarities, clamped to the bounds.

        Beyond a bound the value is clamped, but the gradient passes. So a parameter that overshoots can come back, and the
        mean of gradients over processes is still the gradient of the mean.
        """
        learned = self._learned
        if self.bounds != (None, None):
            learned = learned + (learned.clamp(*self.bounds) - learned).detach()
        return 1 / learned if self.temperature_form == "temperature" else learned.exp()

    def scalars(self) -> dict[str, float]:
        """Return the temperature for the log."""
        return {"temperature": 1 / float(full_tensor(self.scale.detach()))}

    @torch.no_grad()
    def clamp_scalars(self) -> None:
        """Clamp the parameter to the bounds after an optimizer step.

        Otherwise it would have to come back all the way that it drifted beyond a bound before `scale` changes again.
        """
        if self.bounds != (None, None):
            self._learned.clamp_(*self.bounds)

    @property
    def _learned(self) -> Tensor:
        return self.temperature if self.temperature_form == "temperature" else self.logit_scale
