"""The learned scale of similarities, as a part of every model that contrasts images with texts."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from vlp.errors import UserError

Form = Literal["temperature", "logit_scale"]


def check_temperatures(*values: float | None) -> None:
    """Raises UserError unless all of them, None aside, can divide similarities."""
    for value in values:
        if value is not None and value <= 0:
            raise UserError(f"a temperature of {value} cannot divide similarities; set one above 0")


class LearnedScale(nn.Module):
    """A model with the learned scalar ``temperature`` (divides) or ``logit_scale`` (log of what multiplies).

    It has shape (1,): engines refuse 0-dim ones. Losses read `scale`.
    """

    def add_scale(self, temperature: float, low: float | None, high: float | None, form: Form = "temperature") -> None:
        """Makes the parameter.

        Args:
            temperature: initial value.
            low: smallest temperature that takes effect; None = unbounded.
            high: largest.
            form: of the parameter.
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
        """(1,) what multiplies cosine similarities, kept within the bounds.

        Beyond a bound the value stops there but the gradient passes, so that an overshooting parameter can come back,
        and the mean of gradients over processes stays the gradient of the mean.
        """
        learned = self._learned
        if self.bounds != (None, None):
            learned = learned + (learned.clamp(*self.bounds) - learned).detach()
        return 1 / learned if self.temperature_form == "temperature" else learned.exp()

    def scalars(self) -> dict[str, float]:
        """For the log."""
        return {"temperature": 1 / float(self.scale.detach())}

    @torch.no_grad()
    def clamp_scalars(self) -> None:
        """Put the learned scalar back within the bounds, after an optimizer step.

        Without this it would have to come back all the way that it drifted beyond a bound before `scale` changes again.
        """
        if self.bounds != (None, None):
            self._learned.clamp_(*self.bounds)

    @property
    def _learned(self) -> Tensor:
        return self.temperature if self.temperature_form == "temperature" else self.logit_scale
