"""Input handling that all losses share: precision, and errors that name the row at fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from typing import ParamSpec

import torch
from torch import Tensor

from vlp.errors import NonFiniteLoss

P = ParamSpec("P")


def in_float32(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorate a loss to compute in float32 also under autocast. Half-precision arguments are widened, float64 ones stay.

    Each gradient has the dtype of its argument.
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


class DeferredChecks:
    """Checks of losses that wait for nobody, see `deferred_checks`.

    Attributes:
        refusal: Message of a loss that has refused its input at once, or "".
    """

    def __init__(self) -> None:
        self.refusal = ""
        self._checks: list[tuple[Tensor, Callable[[], None]]] = []

    def add(self, outcome: Tensor, check: Callable[[], None]) -> None:
        """Add a check.

        Args:
            outcome: A number on the device, finite if the check passes.
            check: Raises the error of the check if it fails.
        """
        self._checks.append((outcome, check))

    def applied_to(self, loss: Tensor) -> Tensor:
        """Return a () loss if all checks pass, and otherwise NaN. The gradient does not change."""
        if not self._checks:
            return loss
        outcomes = torch.cat([outcome.double().view(1) for outcome, _ in self._checks])
        return loss + (0 * outcomes.sum()).to(loss.dtype)

    def complaint(self) -> str:
        """Return the refusal, or else the message of the first check that fails, or ""."""
        if self.refusal:
            return self.refusal
        try:
            self.raise_first()
        except ValueError as e:  # a row that is not finite, or a target that no loss can use
            return str(e)
        return ""

    def raise_first(self) -> None:
        """Raise the error of the first check that fails, if any. Each check costs a host-device sync."""
        for _, check in self._checks:
            check()


_deferred: ContextVar[DeferredChecks | None] = ContextVar("deferred", default=None)


@contextmanager
def deferred_checks() -> Iterator[DeferredChecks]:
    """Collect the checks of losses within, instead of waiting for the result of each."""
    checks = DeferredChecks()
    token = _deferred.set(checks)
    try:
        yield checks
    finally:
        _deferred.reset(token)


def check_finite(loss: Tensor, **inputs: Tensor | float) -> Tensor:
    """Return ``loss`` if it is finite, and otherwise raise an error that names the row of ``inputs`` at fault.

    A NaN or infinity in any row reaches the loss, so only the () loss is checked: one host-device sync per loss, or none
    within `deferred_checks`.

    Raises:
        NonFiniteLoss: naming the input and its first row that is not finite, or the overflow if every row is finite.
    """
    checks, value = _deferred.get(), loss.detach()
    if checks is None:
        _require_finite(value, inputs)
    else:
        largest = {name: _largest(rows) for name, rows in inputs.items()}  # to name the row, without keeping the input
        checks.add(value, partial(_require_finite, value, largest))
    return loss


def _largest(rows: Tensor | float) -> Tensor | float:
    """Return the largest magnitude in each row of a (B, ...) tensor, (B,), NaN if the row has one."""
    if not isinstance(rows, Tensor):
        return rows
    rows = rows.detach()
    return rows if rows.dim() < 2 else torch.linalg.vector_norm(rows.flatten(1), torch.inf, dim=1)


def _require_finite(loss: Tensor, inputs: Mapping[str, Tensor | float]) -> None:
    if torch.isfinite(loss):
        return
    for name, value in inputs.items():
        rows = torch.atleast_1d(torch.as_tensor(value))
        bad = ~torch.isfinite(rows).flatten(1).all(1) if rows.dim() > 1 else ~torch.isfinite(rows)
        if bad.any():
            raise NonFiniteLoss(f"row {first(bad)} of {name} is not finite")
    raise NonFiniteLoss(f"the loss is {loss.item()} although its inputs are finite: they are empty, or they overflow")


def check_every_row(is_valid: Tensor, problem: str) -> None:
    """Raise ValueError ``row i PROBLEM`` for the first i where ``is_valid`` (B,) bool is False.

    It costs one host-device sync, or none within `deferred_checks`.
    """
    checks = _deferred.get()
    if checks is None:
        _require_every_row(is_valid, problem)
    else:
        checks.add(torch.where(is_valid.all(), 0.0, torch.nan), partial(_require_every_row, is_valid, problem))


def _require_every_row(is_valid: Tensor, problem: str) -> None:
    if not is_valid.all():
        raise ValueError(f"row {first(~is_valid)} {problem}")


def check_ids(queries: Tensor, keys: Tensor, query_ids: Tensor, key_ids: Tensor) -> None:
    """Raise ValueError unless there is one id for each row of (B, E) ``queries`` and (M, E) ``keys``."""
    if query_ids.shape != queries.shape[:1] or key_ids.shape != keys.shape[:1]:
        raise ValueError(
            f"one id per row is needed: queries {tuple(queries.shape)} have ids {tuple(query_ids.shape)}, "
            f"keys {tuple(keys.shape)} have ids {tuple(key_ids.shape)}"
        )


def refuse_double_backward(name: str) -> None:
    """Raise RuntimeError under ``create_graph=True``. Call it in the backward of a function that computes its gradient in
    the forward pass.

    Autograd takes such a gradient as a constant, so the second derivative would silently be 0. Torch's
    ``once_differentiable`` does not notice that if the incoming gradient is a constant.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative: backward with create_graph=True is not supported")


def first(flags: Tensor) -> int:
    """Return the first i where ``flags`` (B,) bool is True."""
    return int(flags.nonzero()[0])
