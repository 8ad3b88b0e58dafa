"""A tiny ALBEF in float64, and its objectives in one process, in two, or over accumulated micro-batches.

Random choices are replaced by functions of the rows, so that they do not depend on how a batch is divided: the most similar
candidate is the negative, and every token with an even id is masked.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.objectives.toys import CPU
from vlp.distributed import all_reduce_sum
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.forward import Bundle, Forward, StepContext
from vlp.models.albef import Albef
from vlp.objectives import itm
from vlp.objectives.itc import MomentumContrast
from vlp.objectives.masking import TextMasking
from vlp.objectives.queues import Queue
from vlp.optim.ema import EMA
from vlp.testing import divide, part_of
from vlp.train import Pretrainer, single_graph
from vlp.training.detached import DetachedGraph
from vlp.types import Batch, MaskedIds

ROWS, LENGTH, WIDTH = 8, 9, 24
SIZES = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
SIZES |= {"model_type": "bert", "max_position_embeddings": 40, "num_hidden_layers": 2}


def tiny(dropout: float = 0.0, **parts) -> Albef:
    text = BertText(config=SIZES, dropout=dropout, length_groups=2)
    return Albef(TimmImage("test_vit", image_size=32), text, Fusion(layers=2), embed_size=WIDTH, **parts)


def pairs(rows: int = ROWS) -> Batch:
    """Return pairs of which rows 1 and 6 show the same image with different captions. Captions differ in length."""
    torch.manual_seed(1)
    index = torch.arange(rows) + 100
    index[6 % rows] = index[1 % rows]
    image = torch.randn(rows, 3, 32, 32, dtype=torch.float64)[index - 100]
    mask = torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (rows, 1))
    ids = torch.randint(5, 99, (rows, LENGTH)).masked_fill(~mask, 0)
    return Batch(index, image, ids, mask)


def queue_of(size: int, filled: int, device: torch.device = CPU) -> Queue:
    """Return a queue of which one row shows the image of row 2."""
    generator = torch.Generator().manual_seed(4)
    queue = Queue(size, {"image": WIDTH, "text": WIDTH}, device)
    columns = {n: F.normalize(torch.randn(filled, WIDTH, generator=generator), dim=1) for n in ("image", "text")}
    queue.push(torch.arange(filled, device=device) + 102, **{n: rows.to(device) for n, rows in columns.items()})
    return queue


def context_of(objectives: dict, filled: int = 5, progress: float = 0.5, device: torch.device = CPU) -> StepContext:
    contrasts = [o for o in objectives.values() if isinstance(o, MomentumContrast)]
    queues = {o: queue_of(o.queue_size, min(filled, o.queue_size), device) for o in contrasts}
    return StepContext(queues, progress=progress)


def networks(spec: Any = None, **how) -> tuple[nn.Module, nn.Module]:
    """Return a model of ``spec``, by default a tiny ALBEF, and a momentum encoder with other weights."""
    built = []
    for seed in (0, 9):
        torch.manual_seed(seed)
        built.append((spec or tiny(**how)).build().double())
    return built[0], EMA(built[1], 0.9, "train").network.double()


def bundle(batch: Batch, objectives: dict, model: nn.Module | None = None, **how) -> Forward:
    made, momentum = networks()
    context = context_of(objectives, **how)
    return Forward(model or made, batch, Bundle(momentum, batch, context), context)


@contextmanager
def drawn_by_row():
    def masking(self, input_ids: Tensor, attention_mask: Tensor, vocabulary) -> MaskedIds:
        chosen = (input_ids % 2 == 0) & attention_mask
        chosen[:, 0] = False
        positions = chosen.flatten().nonzero()[:, 0]
        return MaskedIds(input_ids.masked_fill(chosen, 3), positions, input_ids.flatten()[positions])

    def negatives(similarity: Tensor, candidates: Tensor, epsilon: float) -> Tensor:
        return similarity.masked_fill(~candidates, -torch.inf).argmax(1)

    with patch.object(TextMasking, "__call__", masking), patch.object(itm, "sample_hard_negatives", negatives):
        yield


def shortened(batch: Batch) -> Batch:
    """Truncate padding to the longest caption, as a loader does."""
    longest = int(batch.attention_mask.sum(1).max())
    return replace(batch, input_ids=batch.input_ids[:, :longest], attention_mask=batch.attention_mask[:, :longest])


def step(
    rank: int,
    world: int,
    objectives: dict,
    spec: Any = None,
    graph: Any = single_graph,
    parts: int = 1,
    device: torch.device = CPU,
    **how,
) -> tuple[dict, dict, dict]:
    """Return the means of the losses over processes, the gradients that DDP leaves, and what the queues get.

    Args:
        graph: Graph of the step, e.g. `CACHED`.
        parts: Micro-batches that losses take as one batch.
    """
    batches = [shortened(part_of(pairs(), rows)).to(device) for rows in divide(ROWS, parts, world, rank)]
    model, momentum = (network.to(device) for network in networks(spec, **how))
    pretrainer = Pretrainer(model, objectives, graph)
    called = DistributedDataParallel(pretrainer, find_unused_parameters=True) if world > 1 else pretrainer
    context = context_of(objectives, device=device)
    with drawn_by_row():
        losses, total, bundles = called(batches, momentum, context)
        total.backward()
    means = all_reduce_sum([loss.item() for loss in losses.values()])
    with torch.no_grad():
        kept = {name: o.enqueue(bundles[0]) for name, o in objectives.items() if o in context.queues}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: mean / world for name, mean in zip(losses, means)}, gradients, kept


CACHED = partial(DetachedGraph, recompute=True)
PER_LOSS = partial(DetachedGraph, per_loss=True)
CACHED_PER_LOSS = partial(DetachedGraph, recompute=True, per_loss=True)


def assert_same(found: tuple[dict, dict, dict], expected: tuple[dict, dict, dict]) -> None:
    """Compare losses, gradients of every parameter, and queues."""
    for name, loss in expected[0].items():
        assert abs(found[0][name] - loss) < 1e-9, name
    for name, gradient in expected[1].items():
        # a key's bias has a true gradient of 0
        assert (found[1][name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12, name
    for name, rows in expected[2].items():
        for column, values in rows.items():
            torch.testing.assert_close(found[2][name][column], values, rtol=1e-9, atol=1e-12)
