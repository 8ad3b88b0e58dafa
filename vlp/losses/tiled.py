"""The batch losses at constant memory: the (B, M) similarities exist only ``tile_rows`` rows at a time.

The gradient of a tile needs nothing from outside the tile's rows (the softmax of a row is complete in it), so it is
made in the forward pass while the tile is there, and kept at the size of the inputs for the backward pass to scale.
That is the plain form's three matrix products, none of them twice. Value and gradient equal the plain form's. A second
backward, of the gradient or (``retain_graph``) of the loss, is not supported and raises.

A queue is taken some of its rows at a time instead, because nothing but the queries needs its share of the gradient.

B queries, M keys, K queue rows, E embedding, R rows of one tile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.losses.inputs import check_every_row, check_finite, check_ids, in_float32, refuse_double_backward

TileLoss = Callable[[slice, Tensor], Tensor]
"""(rows, their (R, M) logits) -> () their share of the loss; overwrites the logits with its gradient by them."""


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
    """`vlp.losses.info_nce.info_nce` without the (B, M) matrix; ``tile_rows`` sets memory, not value."""
    check_ids(queries, keys, query_ids, key_ids)
    num_rows, num_keys = len(queries), len(keys)
    share = (1 - label_smoothing) * _share(query_ids, key_ids, queries.dtype)  # (B,)
    spread = label_smoothing / (num_keys * num_rows)

    def tile_loss(rows: slice, logits: Tensor) -> Tensor:
        row, column = (query_ids[rows, None] == key_ids).nonzero(as_tuple=True)
        target = share[rows][row]
        aligned = (target * logits[row, column]).sum() + (spread * logits.sum() if spread else 0)
        log_total = _softmax_(logits, 1 / num_rows)
        if spread:
            logits.sub_(spread)
        logits[row, column] -= target
        return log_total.sum() / num_rows - aligned

    loss = _stream(queries, keys, scale, None, tile_loss, tile_rows)
    seen = 0 * keys.detach().sum()  # NaN if an infinite key hides behind logits of -inf
    return check_finite(loss + seen, queries=queries, keys=keys, scale=scale)


@in_float32
def tiled_symmetric_info_nce(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    query_ids: Tensor,
    key_ids: Tensor,
    label_smoothing: float = 0.0,
    tile_rows: int = 256,
) -> Tensor:
    """``info_nce`` of queries among keys plus ``info_nce`` of keys among queries, from one set of tiles.

    Four matrix products instead of six. Only for one process: ``queries`` must be all the candidates of ``keys``.

    Raises:
        ValueError: as `info_nce`, for rows of either side.
    """
    check_ids(queries, keys, query_ids, key_ids)
    num_rows, num_keys = len(queries), len(keys)
    row_share = (1 - label_smoothing) * _share(query_ids, key_ids, queries.dtype)  # (B,)
    column_share = (1 - label_smoothing) * _share(key_ids, query_ids, queries.dtype)  # (M,)
    spread = 2 * label_smoothing / (num_keys * num_rows)
    # A column's softmax is complete only after all tiles, so the columns' log-sum-exp is taken first.
    column_log_total = _row_log_totals(keys, queries, scale, tile_rows)  # (M,)
    scratch = queries.new_empty(min(tile_rows, num_rows), num_keys)

    def tile_loss(rows: slice, logits: Tensor) -> Tensor:
        row, column = (query_ids[rows, None] == key_ids).nonzero(as_tuple=True)
        target = row_share[rows][row] + column_share[column]
        aligned = (target * logits[row, column]).sum() + (spread * logits.sum() if spread else 0)
        column_softmax = torch.sub(logits, column_log_total, out=scratch[: len(logits)]).exp_()
        row_log_total = _softmax_(logits, 1 / num_rows)
        logits.add_(column_softmax, alpha=1 / num_keys)
        if spread:
            logits.sub_(spread)
        logits[row, column] -= target
        return row_log_total.sum() / num_rows - aligned

    loss = _stream(queries, keys, scale, None, tile_loss, tile_rows) + column_log_total.mean()
    return check_finite(loss, queries=queries, keys=keys, scale=scale)


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
    """`vlp.losses.info_nce.info_nce` among ``cat([keys, queue])``, at the cost of its matrix products alone.

    MoCo's loss has each query's own key and the queue: ``allowed=torch.eye(B, dtype=torch.bool)``, ``queue_ids`` that no
    query has. A queue may be of any length, also shorter than the batch or empty.

    Args:
        queries: (B, E) embeddings, normally of unit norm. Gradient flows to them, to ``keys`` and to ``scale``.
        keys: (M, E) embeddings. (B, M) is held; (B, K) is not.
        queue: (K, E) embeddings, without gradient.
        scale: () or (1,) inverse temperature.
        query_ids: (B,) int64.
        key_ids: (M,) int64; a key with the query's id is a positive.
        queue_ids: (K,) int64; so is a queue row.
        label_smoothing: probability spread evenly over the row's allowed keys and the queue.
        allowed: (B, M) bool, False where a pair of query and key is left out of the softmax.
        tile_keys: sets memory, (B, tile_keys), not value.

    Returns:
        () mean over queries, in nats.

    Raises:
        ValueError: naming the row, if a query has no allowed positive or an embedding is not finite.
    """
    check_ids(queries, keys, query_ids, key_ids)
    check_ids(queries, queue, query_ids, queue_ids)
    queue = queue.detach()
    scaled, queue_sum = scale * queries, queue.sum(0)
    products = scaled @ keys.T
    allowed = torch.ones_like(products, dtype=torch.bool) if allowed is None else allowed
    positive = (query_ids[:, None] == key_ids) & allowed
    row, column = _equal_ids(query_ids, queue_ids)
    count = positive.sum(1) + row.bincount(minlength=len(queries))
    check_every_row(count > 0, "has no positive: no allowed key and no queue row has its id")
    aligned = products.where(positive, 0).sum(1).index_add(0, row, (scaled[row] * queue[column]).sum(1)) / count
    logits = products.masked_fill(~allowed, -torch.inf)
    log_total = torch.cat([logits, _queue_log_totals(scaled, queue, tile_keys)[:, None]], dim=1).logsumexp(1)
    loss = log_total - (1 - label_smoothing) * aligned
    if label_smoothing:
        everything = products.where(allowed, 0).sum(1) + scaled @ queue_sum
        loss = loss - label_smoothing * everything / (allowed.sum(1) + len(queue))
    # A key that is left out, or whose infinity makes its logits -inf, reaches the gradients but not the loss.
    seen = 0 * (keys.detach().sum() + queue_sum.sum())  # 0 or NaN
    return check_finite(loss.mean() + seen, queries=queries, keys=keys, queue=queue, scale=scale)


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
    """`vlp.losses.sigmoid.sigmoid_loss` without the (B, M) matrix; ``tile_rows`` sets memory, not value."""
    check_ids(queries, keys, query_ids, key_ids)
    num_rows = len(queries)

    def tile_loss(rows: slice, logits: Tensor) -> Tensor:
        positives = (query_ids[rows, None] == key_ids).nonzero(as_tuple=True)
        logits.neg_()
        logits[positives] *= -1  # now the margins z_ij (scale q.k + bias)
        loss = -F.logsigmoid(logits).sum() / num_rows
        logits.neg_().sigmoid_().div_(num_rows)
        logits[positives] *= -1
        return loss

    loss = _stream(queries, keys, scale, bias, tile_loss, tile_rows)
    seen = 0 * (queries.detach().sum() + keys.detach().sum())  # NaN if an infinite row hides behind logits of -inf
    return check_finite(loss + seen, queries=queries, keys=keys, scale=scale, bias=bias)


def _stream(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    bias: Tensor | float | None,
    tile_loss: TileLoss,
    tile_rows: int,
) -> Tensor:
    """() sum of ``tile_loss`` over the tiles of ``scale * queries @ keys.T + bias``, differentiable by all four."""
    if tile_rows < 1:
        raise ValueError(f"tile_rows is {tile_rows}, at least 1 is needed")
    inputs = [queries.contiguous(), keys.contiguous(), _scalar(scale, queries)]
    inputs.append(None if bias is None else _scalar(bias, queries))
    if not torch.is_grad_enabled():  # a Function would still see requires_grad, and make gradients for nobody
        inputs = [None if value is None else value.detach() for value in inputs]
    return _Stream.apply(*inputs, tile_loss, tile_rows)


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, scale, bias, tile_loss, tile_rows):
        wants_queries, wants_keys, wants_scale, wants_bias = ctx.needs_input_grad[:4]
        loss = queries.new_zeros(())
        query_grad = torch.empty_like(queries) if wants_queries or wants_scale else None
        key_grad = torch.zeros_like(keys) if wants_keys else None
        scale_grad, bias_grad = torch.zeros_like(loss), torch.zeros_like(loss)
        for rows, logits in _tiles(queries, keys, scale, tile_rows):
            if bias is not None:
                logits.add_(bias)
            loss += tile_loss(rows, logits)
            if query_grad is not None:
                torch.matmul(logits, keys, out=query_grad[rows])
                scale_grad += (queries[rows] * query_grad[rows]).sum()  # before query_grad is multiplied by the scale
                query_grad[rows] *= scale
            if wants_keys:
                key_grad.addmm_(logits.T, queries[rows] * scale)
            if wants_bias:
                bias_grad += logits.sum()
        made = query_grad, key_grad, scale_grad, bias_grad
        ctx.gradients = [grad if wanted else None for grad, wanted in zip(made, ctx.needs_input_grad)]
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        refuse_double_backward("a tiled loss")
        if ctx.gradients is None:
            raise RuntimeError("a tiled loss runs backward once: it hands its gradients over instead of a copy of them")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if grad is None else grad.mul_(grad_output) for grad in gradients), None, None


def _tiles(queries: Tensor, keys: Tensor, scale: Tensor, tile_rows: int):
    """Yield (rows, their (R, M) logits); the logits are one buffer that the next tile overwrites."""
    buffer = queries.new_empty(min(tile_rows, len(queries)), len(keys))
    for start in range(0, len(queries), tile_rows):
        rows = slice(start, start + tile_rows)
        tile = queries[rows] * scale
        yield rows, torch.matmul(tile, keys.T, out=buffer[: len(tile)])


@torch.no_grad()
def _row_log_totals(queries: Tensor, keys: Tensor, scale: Tensor | float, tile_rows: int) -> Tensor:
    """(B,) log-sum-exp over the keys of each query's logits."""
    tiles = _tiles(queries, keys, _scalar(scale, queries), tile_rows)
    return torch.cat([_softmax_(logits, 1.0) for _, logits in tiles])


def _queue_log_totals(scaled: Tensor, queue: Tensor, tile_keys: int) -> Tensor:
    """(B,) log-sum-exp of ``scaled @ queue.T``; -inf where the queue is empty."""
    if tile_keys < 1:
        raise ValueError(f"tile_keys is {tile_keys}, at least 1 is needed")
    return _QueueLogTotals.apply(scaled if torch.is_grad_enabled() else scaled.detach(), queue, tile_keys)


class _QueueLogTotals(torch.autograd.Function):
    """The gradient by a query is its softmax-weighted mean of the queue, which can be summed beside the log-sum-exp.

    Both are relative to the largest logit so far and shrink when a larger one comes (online softmax, Milakov &
    Gimelshein 2018): each tile of logits is made once, and is used up while it is in the cache.
    """

    @staticmethod
    def forward(ctx, scaled, queue, tile_keys):
        peak, total = scaled.new_full((len(scaled), 1), -torch.inf), scaled.new_zeros(len(scaled), 1)
        mean = torch.zeros_like(scaled) if ctx.needs_input_grad[0] else None
        for start in range(0, len(queue), tile_keys):
            tile = queue[start : start + tile_keys]
            logits = scaled @ tile.T
            new_peak = torch.maximum(peak, logits.amax(dim=1, keepdim=True))
            shrink, peak = (peak - new_peak).exp_(), new_peak
            logits.sub_(peak).exp_()
            total.mul_(shrink).add_(logits.sum(dim=1, keepdim=True))
            if mean is not None:
                mean.mul_(shrink).addmm_(logits, tile)
        total.clamp_(min=1)  # which only an empty queue is below
        ctx.save_for_backward(None if mean is None else mean.div_(total))
        return (peak + total.log()).squeeze(1)

    @staticmethod
    def backward(ctx, grad_output):
        refuse_double_backward("queue_info_nce")
        (mean,) = ctx.saved_tensors
        return mean * grad_output[:, None], None, None


def _equal_ids(query_ids: Tensor, key_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns where (B, M) ``query_ids[:, None] == key_ids``, without that matrix where few keys match."""
    if len(query_ids) == 0:
        return query_ids, query_ids
    ordered = query_ids.sort().values
    place = torch.searchsorted(ordered, key_ids).clamp(max=len(ordered) - 1)
    matched = (ordered[place] == key_ids).nonzero().squeeze(1)
    row, column = (query_ids[:, None] == key_ids[matched]).nonzero(as_tuple=True)
    return row, matched[column]


def _softmax_(logits: Tensor, weight: float) -> Tensor:
    """Overwrite (R, M) logits with ``weight * softmax`` of each row and return the rows' (R,) log-sum-exp.

    In place, and by hand because ``torch.logsumexp`` takes 18 times as long on a CPU (2.x).
    """
    peak = logits.amax(dim=1, keepdim=True)
    total = logits.sub_(peak).exp_().sum(dim=1, keepdim=True)
    logits.mul_(weight / total)
    return (peak + total.log()).squeeze(1)


def _share(ids: Tensor, others: Tensor, dtype: torch.dtype) -> Tensor:
    """(B,) weight of one positive in the mean over rows: 1 / (B * how many of (M,) ``others`` equal the row's id).

    In memory linear in B + M. ValueError naming a row that nothing equals.
    """
    ordered = others.sort().values
    count = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    check_every_row(count > 0, "has no positive: no row of the other side has its id")
    return 1 / (count.to(dtype) * len(ids))


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(())
