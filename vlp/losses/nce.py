"""Instance discrimination against a memory bank (Wu et al. 2018): every row of the bank is a class.

The bank is an argument, the (n, E) tensor of its rows, and gets no gradient. ``scale`` is 1 over the paper's temperature
(0.07). The paper's proximal term is `vlp.losses.geometry.alignment` of the queries with their own rows of the bank.

B queries, n rows of the bank, m noise rows per query, E embedding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.losses.inputs import check_finite, in_float32
from vlp.losses.tiled import queue_info_nce


@in_float32
def nce_loss(
    queries: Tensor, bank: Tensor, scale: Tensor | float, rows: Tensor, noise: Tensor, log_partition: Tensor | float
) -> Tensor:
    """Noise-contrastive estimation of a query's own row of the bank against m noise rows (Wu et al. 2018, eq. 7).

    ``-1/B sum_i [log h(i, rows_i) + sum_k log(1 - h(i, noise_ik))]`` with ``h(i, j) = P / (P + m Pn)``, ``P =
    exp(scale q_i . b_j) / Z`` and ``Pn = 1/n``. Computed from log-odds, which do not underflow (the published code adds
    1e-7). If the noise is the whole bank, k times each row, the gradient with respect to the logits is that of
    `instance_softmax_loss` times ``k / (P + k)``: the two losses agree as m grows.

    Args:
        queries: (B, E) embeddings, normally of unit norm. Gradient flows to them and to ``scale``.
        bank: (n, E) embeddings.
        scale: () or (1,) inverse temperature.
        rows: (B,) int64, each query's own row of the bank.
        noise: (B, m) int64 rows of the bank, from `draw_noise`.
        log_partition: () log Z, a constant from `log_partition`.

    Returns:
        () sum over the m + 1 rows, mean over queries, in nats.

    Raises:
        ValueError: if the shapes do not fit or there is no noise.
        NonFiniteLoss: naming the row, if an embedding is not finite.
    """
    _check_bank(queries, bank, rows)
    if noise.dim() != 2 or len(noise) != len(queries) or noise.shape[1] < 1:
        raise ValueError(f"noise must be ({len(queries)}, m) rows of the bank with m >= 1, got {tuple(noise.shape)}")
    num_noise = noise.shape[1]
    logits = _bank_logits(queries, bank, scale, torch.cat([rows[:, None], noise], dim=1))  # (B, 1 + m)
    log_odds = logits - log_partition - math.log(num_noise / len(bank))  # of h: log P - log(m Pn)
    own, others = log_odds.split([1, num_noise], dim=1)
    return check_finite((F.softplus(-own).sum() + F.softplus(others).sum()) / len(queries), log_partition=log_partition)


@in_float32
def instance_softmax_loss(queries: Tensor, bank: Tensor, scale: Tensor | float, rows: Tensor) -> Tensor:
    """Softmax over all rows of the bank (Wu et al. 2018, eq. 2), which `nce_loss` approximates.

    Args and Raises: as in `nce_loss`. Never stores (B, n).

    Returns:
        () mean over queries, in nats.
    """
    _check_bank(queries, bank, rows)
    bank, every_row = bank.detach(), torch.arange(len(bank), device=bank.device)
    return queue_info_nce(queries, bank[:0], bank, scale, rows, every_row[:0], every_row)


@torch.no_grad()
@in_float32
def log_partition(queries: Tensor, bank: Tensor, scale: Tensor | float) -> Tensor:
    """Estimate log Z, the constant in `nce_loss` (Wu et al. 2018, eq. 8).

    ``log mean_i sum_j exp(scale q_i . b_j)`` over the whole bank. The published code estimates it once, from the noise rows
    of the first batch. Call this function again to follow the bank as it changes.

    Args:
        queries: (B, E) embeddings of some samples, or rows of the bank.
        bank: (n, E) embeddings.
        scale: () or (1,) inverse temperature.

    Returns:
        () without gradient.

    Raises:
        NonFiniteLoss: naming the row, if an embedding is not finite.
    """
    total = log_partition_sum(queries, bank, scale)
    return check_finite(total, queries=queries, bank=bank, scale=scale) - math.log(len(queries))


@torch.no_grad()
@in_float32
def log_partition_sum(queries: Tensor, bank: Tensor, scale: Tensor | float) -> Tensor:
    """Compute ``log sum_i sum_j exp(scale q_i . b_j)``, not checked: processes gather their sums before they check Z.

    Args: as in `log_partition`.

    Returns:
        () without gradient.
    """
    return ((scale * queries) @ bank.T).logsumexp((0, 1))  # of (B, n)


def draw_noise(
    rows: Tensor, num_rows: int, num_noise: int, generator: torch.Generator | None = None, may_be_own: bool = False
) -> Tensor:
    """Draw noise rows of the bank for each query, uniformly and with replacement.

    Args:
        rows: (B,) int64, each query's own row of the bank.
        num_rows: n.
        num_noise: m.
        generator: On the device of ``rows``. None uses torch's default.
        may_be_own: Draw from all rows, as the published code does, so that a query's own row may be among its noise.

    Returns:
        (B, m) int64.

    Raises:
        ValueError: if the bank has no row to draw.
    """
    choices = num_rows if may_be_own else num_rows - 1
    if choices < 1:
        raise ValueError(f"a bank of {num_rows} rows has none to draw noise from")
    noise = torch.randint(choices, (len(rows), num_noise), generator=generator, device=rows.device)
    return noise if may_be_own else noise + (noise >= rows[:, None])  # step over the own row


def _bank_logits(queries: Tensor, bank: Tensor, scale: Tensor | float, columns: Tensor) -> Tensor:
    """Return (B, m) ``scale * q_i . b_j`` for j in (B, m) columns, by the cheaper of two ways."""
    scaled, bank = scale * queries, bank.detach()
    if len(bank) <= columns.shape[1] * bank.shape[1]:  # (B, n) products take less memory than (B, m, E) rows
        products = scaled @ bank.T  # (B, n)
        # also of the other rows: their gradient is 0 times the row, which is NaN for an infinite one
        check_finite(products.detach().sum(), queries=queries, bank=bank, scale=scale)
        return products.gather(1, columns)
    logits = torch.einsum("be,bme->bm", scaled, bank[columns])
    check_finite(logits.detach().sum(), queries=queries, bank=bank, scale=scale)
    return logits


def _check_bank(queries: Tensor, bank: Tensor, rows: Tensor) -> None:
    if len(queries) < 1 or queries.shape[1:] != bank.shape[1:] or rows.shape != queries.shape[:1]:
        raise ValueError(
            f"queries {tuple(queries.shape)} need one row of the bank each: {tuple(bank.shape)}, got {tuple(rows.shape)}"
        )
