"""What every loss does with its inputs: the precision it computes in, and a clear end for those that have no loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


class NonFiniteLoss(ValueError):
    """A loss without a finite value; the message names the input row that caused it."""


def in_float32(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Make a loss compute in float32 whatever autocast says: half-precision arguments are widened, float64 ones stay.

    The gradient returns in the dtype of the argument.
    """

    @wraps(loss)
    def widened(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        def widen(value):
            is_half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
            return value.float() if is_half else value

        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(device.type, enabled=False):
            return loss(*map(widen, args), **{name: widen(value) for name, value in kwargs.items()})

    return widened


def check_finite(loss: Tensor, **inputs: Tensor | float) -> Tensor:
    """Return ``loss`` if it is finite, and otherwise name the row of ``inputs`` that is to blame.

    A NaN or infinity in any row reaches the loss, so only the () loss is looked at: one wait for the device per loss.

    Raises:
        NonFiniteLoss: naming the input and its first row that is not finite, or the overflow if every row is finite.
    """
    if torch.isfinite(loss):
        return loss
    for name, value in inputs.items():
        rows = torch.atleast_1d(torch.as_tensor(value))
        bad = ~torch.isfinite(rows).flatten(1).all(1) if rows.dim() > 1 else ~torch.isfinite(rows)
        if bad.any():
            raise NonFiniteLoss(f"row {first(bad)} of {name} is not finite")
    raise NonFiniteLoss(f"the loss is {loss.item()} although its inputs are finite: they are empty, or they overflow")


def check_every_row(holds: Tensor, complaint: str) -> None:
    """Raise ValueError ``row i COMPLAINT`` for the first i where ``holds`` (B,) bool is False."""
    if not holds.all():
        raise ValueError(f"row {first(~holds)} {complaint}")


def check_ids(queries: Tensor, keys: Tensor, query_ids: Tensor, key_ids: Tensor) -> None:
    """Raise ValueError unless there is one id for each row of (B, E) ``queries`` and (M, E) ``keys``."""
    if query_ids.shape != queries.shape[:1] or key_ids.shape != keys.shape[:1]:
        raise ValueError(
            f"one id per row is needed: queries {tuple(queries.shape)} have ids {tuple(query_ids.shape)}, "
            f"keys {tuple(keys.shape)} have ids {tuple(key_ids.shape)}"
        )


def refuse_double_backward(name: str) -> None:
    """To be called in the backward of a function whose gradient was made in its forward: autograd takes it as constant.

    Under ``create_graph=True`` that would silently be a second derivative of 0, which torch's ``once_differentiable``
    lets pass where the incoming gradient is a constant.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative: backward with create_graph=True is not supported")


def first(flags: Tensor) -> int:
    """The first i where ``flags`` (B,) bool is True."""
    return int(flags.nonzero()[0])
