"""Alignment, uniformity and modality gap of embeddings on the sphere. They are logged, and can be objectives.

n rows, E embedding, R rows of one tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlp.losses.inputs import check_finite, in_float32, refuse_double_backward


@in_float32
def alignment(x: Tensor, y: Tensor, alpha: float = 2) -> Tensor:
    """Mean distance of positive pairs, ``mean_i ||x_i - y_i||^alpha`` (Wang & Isola 2020, eq. 2). Lower is closer.

    Args:
        x: (n, E) unit-norm embeddings.
        y: (n, E) unit-norm embeddings. Row i is the positive of row i of ``x``.
        alpha: Exponent of the distance.

    Returns:
        () mean over pairs.

    Raises:
        ValueError: if the shapes differ or there is no row.
        NonFiniteLoss: naming the row, if an embedding is not finite.
    """
    if x.shape != y.shape or len(x) < 1:
        raise ValueError(f"alignment needs pairs of rows, got {tuple(x.shape)} and {tuple(y.shape)}")
    distance = torch.linalg.vector_norm(x - y, dim=1)
    return check_finite(distance.pow(alpha).mean(), x=x, y=y)


@in_float32
def uniformity(x: Tensor, t: float = 2, tile_rows: int = 256) -> Tensor:
    """Log of the mean Gaussian potential of distinct pairs (Wang & Isola 2020, eq. 3). Lower is more uniform.

    ``log mean_{i<j} exp(-t ||x_i - x_j||^2)``, 0 if all rows coincide. Only ``tile_rows`` rows of the (n, n) distances
    exist at a time. Double backward raises RuntimeError.

    Args:
        x: (n, E) unit-norm embeddings.
        t: Sharpness of the potential.
        tile_rows: Sets memory, not value.

    Returns:
        () log of the mean over the n (n - 1) / 2 distinct pairs.

    Raises:
        ValueError: if n < 2.
        NonFiniteLoss: naming the row, if an embedding is not finite.
    """
    if len(x) < 2:
        raise ValueError(f"uniformity needs at least 2 rows, got {tuple(x.shape)}")
    if tile_rows < 1:
        raise ValueError(f"tile_rows is {tile_rows}, at least 1 is needed")
    x = x.contiguous()
    return check_finite(_LogMeanPotential.apply(x if torch.is_grad_enabled() else x.detach(), t, tile_rows), x=x)


@in_float32
def modality_gap(x: Tensor, y: Tensor) -> Tensor:
    """Distance of the centroids of two modalities, ``||mean_i x_i - mean_j y_j||`` (Liang et al. 2022, sec. 2).

    Args:
        x: (n, E) unit-norm embeddings of one modality.
        y: (m, E) unit-norm embeddings of the other. Rows need not be paired.

    Returns:
        () Euclidean distance.

    Raises:
        ValueError: if a side has no row.
        NonFiniteLoss: naming the row, if an embedding is not finite.
    """
    if len(x) < 1 or len(y) < 1:
        raise ValueError(f"modality_gap needs rows on both sides, got {tuple(x.shape)} and {tuple(y.shape)}")
    return check_finite(torch.linalg.vector_norm(x.mean(0) - y.mean(0)), x=x, y=y)


class _LogMeanPotential(torch.autograd.Function):
    """Log-mean of the Gaussian potentials, with the gradient computed in the forward pass.

    Row i adds ``exp(r_i)`` with ``r_i = log sum_{j != i} exp(-t ||x_i - x_j||^2)``. The potential is symmetric, so the
    gradient of row i is twice that of its own sum: ``-4 t exp(r_i - L) sum_j p_ij (x_i - x_j)`` with p the row's softmax
    and L the log of the total. Everything but L is available while the row's tile exists.
    """

    @staticmethod
    def forward(ctx, x, t, tile_rows):
        n = len(x)
        square_norm = x.square().sum(1)
        log_total = x.new_empty(n)
        grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        buffer = x.new_empty(min(tile_rows, n), n)
        for start in range(0, n, tile_rows):
            rows = slice(start, start + tile_rows)
            tile = buffer[: len(x[rows])]
            torch.matmul(x[rows] * (2 * t), x.T, out=tile)  # (R, n)
            tile.sub_(t * square_norm).sub_(t * square_norm[rows, None])  # -t ||x_i - x_j||^2
            tile.diagonal(offset=start).fill_(-torch.inf)
            peak = tile.amax(1, keepdim=True)
            total = tile.sub_(peak).exp_().sum(1, keepdim=True)
            log_total[rows] = (peak + total.log()).squeeze(1)
            if grad is not None:
                torch.matmul(tile.div_(total), x, out=grad[rows])  # sum_j p_ij x_j
                torch.sub(x[rows], grad[rows], out=grad[rows])
        log_sum = log_total.logsumexp(0)
        if grad is not None:
            grad.mul_((-4 * t * (log_total - log_sum).exp())[:, None])
        ctx.save_for_backward(grad)
        return log_sum - math.log(n * (n - 1))

    @staticmethod
    def backward(ctx, grad_output):
        refuse_double_backward("uniformity")
        (grad,) = ctx.saved_tensors
        return grad * grad_output, None, None
