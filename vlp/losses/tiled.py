"""Contrastive losses at constant memory: the (B, M) similarities exist only ``tile_rows`` rows at a time.

A tile contains whole rows, and with them all that the softmax of a row needs. So the gradient is computed in the forward
pass, while the tile exists, and the backward pass only scales it. That takes the three matrix products of the plain form,
none of them twice. Value and gradient equal those of the plain form. A second backward, of the gradient or (with
``retain_graph``) of the loss, raises RuntimeError.

`queue_info_nce` tiles the queue instead: a queue gets no gradient, so only the queries need its share.

B queries, M keys, K queue rows, E embedding, R rows of one tile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.losses.inputs import check_every_row, check_finite, check_ids, in_float32, refuse_double_backward

TileLoss = Callable[[slice, Tensor], Tensor]
"""Takes rows and their (R, M) logits, returns their () share of the loss, and overwrites the logits by its gradient."""


@in_float32
def tiled_info_nce(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    query_ids: Tensor,
    key_ids: Tensor,
    label_smoothing: float = 0.0,
    tile_rows: int = 256,
) -> Tensor:
    """`vlp.losses.softmax.info_nce` without the (B, M) matrix. ``tile_rows`` sets memory, not value."""
    check_ids(queries, keys, query_ids, key_ids)
    num_rows, num_keys = len(queries), len(keys)
    share = (1 - label_smoothing) * _share(query_ids, key_ids, queries.dtype)  # (B,)
    spread = label_smoothing / (num_keys * num_rows)

    def tile_loss(rows: slice, logits: Tensor) -> Tensor:
        positive, target = query_ids[rows, None] == key_ids, share[rows, None]  # (R, M), (R, 1)
        aligned = (target * logits.where(positive, 0)).sum() + (spread * logits.sum() if spread else 0)
        log_total = _softmax_(logits, 1 / num_rows)
        if spread:
            logits.sub_(spread)
        logits.sub_(target * positive)
        return log_total.sum() / num_rows - aligned

    loss = _tiled_loss(queries, keys, scale, None, tile_loss, tile_rows)
    zero_or_nan = 0 * keys.detach().sum()  # NaN for an infinite key, whose logits of -inf the loss does not show
    return check_finite(loss + zero_or_nan, queries=queries, keys=keys, scale=scale)


@in_float32
def queue_info_nce(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    scale: Tensor | float,
    query_ids: Tensor,
    key_ids: Tensor,
    queue_ids: Tensor,
    label_smoothing: float = 0.0,
    allowed: Tensor | None = None,
    tile_keys: int = 1024,
) -> Tensor:
    """`vlp.losses.softmax.info_nce` among ``cat([keys, queue])``, without the (B, K) matrix.

    For MoCo's loss, each query against its own key and the queue, pass ``allowed=torch.eye(B, dtype=torch.bool)`` and
    ``queue_ids`` that no query has. A queue may have any length. It may be shorter than the batch, or empty.

    Args:
        queries: (B, E) embeddings, normally of unit norm. Gradient flows to them, to ``keys`` and to ``scale``.
        keys: (M, E) embeddings. Their (B, M) similarities are stored.
        queue: (K, E) embeddings, without gradient.
        scale: () or (1,) inverse temperature.
        query_ids: (B,) int64.
        key_ids: (M,) int64. A key with the query's id is a positive.
        queue_ids: (K,) int64. A queue row with the query's id is a positive, too.
        label_smoothing: Probability spread evenly over the row's allowed keys and the queue.
        allowed: (B, M) bool, False where a pair of query and key is excluded from the softmax. None allows all.
        tile_keys: Sets memory, (B, tile_keys), not value.

    Returns:
        () mean over queries, in nats.

    Raises:
        ValueError: naming the row, if a query has no allowed positive.
        NonFiniteLoss: naming the row, if an embedding is not finite.
    """
    check_ids(queries, keys, query_ids, key_ids)
    check_ids(queries, queue, query_ids, queue_ids)
    if tile_keys < 1:
        raise ValueError(f"tile_keys is {tile_keys}, at least 1 is needed")
    queue = queue.detach()
    scaled, queue_sum = scale * queries, queue.sum(0)
    products = scaled @ keys.T  # (B, M)
    allowed = torch.ones_like(products, dtype=torch.bool) if allowed is None else allowed
    positive = (query_ids[:, None] == key_ids) & allowed
    queue_positives, queue_count = _sum_of_positives(query_ids, queue_ids, queue, tile_keys)  # (B, E), (B,)
    count = positive.sum(1) + queue_count
    check_every_row(count > 0, "has no positive: no allowed key and no queue row has its id")
    aligned = (products.where(positive, 0).sum(1) + (scaled * queue_positives).sum(1)) / count
    logits = products.masked_fill(~allowed, -torch.inf)
    log_total = torch.cat([logits, _queue_log_totals(scaled, queue, tile_keys)[:, None]], dim=1).logsumexp(1)
    loss = log_total - (1 - label_smoothing) * aligned
    if label_smoothing:
        everything = products.where(allowed, 0).sum(1) + scaled @ queue_sum
        loss = loss - label_smoothing * everything / (allowed.sum(1) + len(queue))
    # An infinite key that is excluded, or whose logits are -inf, would reach the gradients but not the loss.
    zero_or_nan = 0 * (keys.detach().sum() + queue_sum.sum())
    return check_finite(loss.mean() + zero_or_nan, queries=queries, keys=keys, queue=queue, scale=scale)


@in_float32
def tiled_sigmoid_loss(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    query_ids: Tensor,
    key_ids: Tensor,
    tile_rows: int = 256,
) -> Tensor:
    """`vlp.losses.sigmoid.sigmoid_loss` without the (B, M) matrix. ``tile_rows`` sets memory, not value."""
    check_ids(queries, keys, query_ids, key_ids)
    num_rows = len(queries)

    def tile_loss(rows: slice, logits: Tensor) -> Tensor:
        z = torch.where(query_ids[rows, None] == key_ids, 1, -1).to(logits.dtype)  # (R, M)
        logits.mul_(z)  # the margins z_ij (scale q_i . k_j + bias)
        loss = -F.logsigmoid(logits).sum() / num_rows
        logits.neg_().sigmoid_().div_(-num_rows).mul_(z)
        return loss

    loss = _tiled_loss(queries, keys, scale, bias, tile_loss, tile_rows)
    # NaN for an infinite row, whose logits of -inf the loss does not show
    zero_or_nan = 0 * (queries.detach().sum() + keys.detach().sum())
    return check_finite(loss + zero_or_nan, queries=queries, keys=keys, scale=scale, bias=bias)


def _tiled_loss(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    bias: Tensor | float | None,
    tile_loss: TileLoss,
    tile_rows: int,
) -> Tensor:
    """Return the () sum of ``tile_loss`` over the tiles of ``scale * queries @ keys.T + bias``, with gradient to all four."""
    if tile_rows < 1:
        raise ValueError(f"tile_rows is {tile_rows}, at least 1 is needed")
    inputs = [queries.contiguous(), keys.contiguous(), _scalar(scale, queries)]
    inputs.append(None if bias is None else _scalar(bias, queries))
    if not torch.is_grad_enabled():  # a Function sees requires_grad also then, and would compute unused gradients
        inputs = [None if value is None else value.detach() for value in inputs]
    return _TiledLoss.apply(*inputs, tile_loss, tile_rows)


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, scale, bias, tile_loss, tile_rows):
        needs_queries, needs_keys, needs_scale, needs_bias = ctx.needs_input_grad[:4]
        loss = queries.new_zeros(())
        query_grad = torch.empty_like(queries) if needs_queries or needs_scale else None
        key_grad = torch.zeros_like(keys) if needs_keys else None
        scale_grad, bias_grad = torch.zeros_like(loss), torch.zeros_like(loss)
        for rows, logits in _tiles(queries, keys, scale, tile_rows):
            if bias is not None:
                logits.add_(bias)
            loss += tile_loss(rows, logits)
            if query_grad is not None:
                torch.matmul(logits, keys, out=query_grad[rows])
                scale_grad += (queries[rows] * query_grad[rows]).sum()  # before the factor of the scale
                query_grad[rows] *= scale
            if needs_keys:
                key_grad.addmm_(logits.T, queries[rows] * scale)
            if needs_bias:
                bias_grad += logits.sum()
        gradients = query_grad, key_grad, scale_grad, bias_grad
        ctx.gradients = [grad if needed else None for grad, needed in zip(gradients, ctx.needs_input_grad)]
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        refuse_double_backward("a tiled loss")
        if ctx.gradients is None:
            raise RuntimeError("a tiled loss runs backward once: its gradients are returned without a copy")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if grad is None else grad.mul_(grad_output) for grad in gradients), None, None


def _tiles(queries: Tensor, keys: Tensor, scale: Tensor, tile_rows: int):
    """Yield (rows, their (R, M) logits). The logits are one buffer that the next tile overwrites."""
    buffer = queries.new_empty(min(tile_rows, len(queries)), len(keys))
    for start in range(0, len(queries), tile_rows):
        rows = slice(start, start + tile_rows)
        tile = queries[rows] * scale
        yield rows, torch.matmul(tile, keys.T, out=buffer[: len(tile)])


def _queue_log_totals(scaled: Tensor, queue: Tensor, tile_keys: int) -> Tensor:
    """Return (B,) log-sum-exp of ``scaled @ queue.T``, -inf for an empty queue."""
    return _QueueLogTotals.apply(scaled if torch.is_grad_enabled() else scaled.detach(), queue, tile_keys)


class _QueueLogTotals(torch.autograd.Function):
    """Log-sum-exp over the queue, with its gradient, in one pass (online softmax, Milakov & Gimelshein 2018).

    The gradient with respect to a query is its softmax-weighted mean of the queue, which is summed along with the
    log-sum-exp. Both are relative to the largest logit so far, and are scaled down when a larger one comes. So each tile
    of logits is computed once.
    """

    @staticmethod
    def forward(ctx, scaled, queue, tile_keys):
        peak, total = scaled.new_full((len(scaled), 1), -torch.inf), scaled.new_zeros(len(scaled), 1)
        mean = torch.zeros_like(scaled) if ctx.needs_input_grad[0] else None
        for start in range(0, len(queue), tile_keys):
            tile = queue[start : start + tile_keys]
            logits = scaled @ tile.T  # (B, tile_keys)
            new_peak = torch.maximum(peak, logits.amax(dim=1, keepdim=True))
            shrink, peak = (peak - new_peak).exp_(), new_peak
            logits.sub_(peak).exp_()
            total.mul_(shrink).add_(logits.sum(dim=1, keepdim=True))
            if mean is not None:
                mean.mul_(shrink).addmm_(logits, tile)
        total.clamp_(min=1)  # only an empty queue is below 1
        ctx.save_for_backward(None if mean is None else mean.div_(total))
        return (peak + total.log()).squeeze(1)

    @staticmethod
    def backward(ctx, grad_output):
        refuse_double_backward("queue_info_nce")
        (mean,) = ctx.saved_tensors
        return mean * grad_output[:, None], None, None


def _sum_of_positives(query_ids: Tensor, queue_ids: Tensor, queue: Tensor, tile_keys: int) -> tuple[Tensor, Tensor]:
    """Return the (B, E) sums and the (B,) numbers of the rows of the queue with the id of each query."""
    total = queue.new_zeros(len(query_ids), queue.shape[1])
    count = torch.zeros_like(query_ids)
    for start in range(0, len(queue), tile_keys):
        rows = slice(start, start + tile_keys)
        is_positive = query_ids[:, None] == queue_ids[rows]  # (B, tile_keys)
        total.addmm_(is_positive.to(queue.dtype), queue[rows])
        count += is_positive.sum(1)
    return total, count


def _softmax_(logits: Tensor, weight: float) -> Tensor:
    """Overwrite (R, M) logits with ``weight * softmax`` of each row and return the (R,) log-sum-exp of the rows.

    Written out because ``torch.logsumexp`` takes 18 times as long on a CPU (torch 2.x).
    """
    peak = logits.amax(dim=1, keepdim=True)
    total = logits.sub_(peak).exp_().sum(dim=1, keepdim=True)
    logits.mul_(weight / total)
    return (peak + total.log()).squeeze(1)


def _share(ids: Tensor, others: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (B,) weights of one positive in the mean over rows: 1 / (B * number of (M,) ``others`` with the row's id).

    Memory is linear in B + M. Raises ValueError naming a row without a match.
    """
    ordered = others.sort().values
    count = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    check_every_row(count > 0, "has no positive: no row of the other side has its id")
    return 1 / (count.to(dtype) * len(ids))


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(())
