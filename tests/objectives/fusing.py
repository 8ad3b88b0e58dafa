"""A tiny ALBEF in float64, and its objectives in one process, in two, or over accumulated micro-batches.

What a step draws is a function of the rows here, so that whoever has a row draws the same for it: the most similar candidate
is the negative, and every token with an even number is masked.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.objectives.toys import CPU, part_of
from vlp.distributed import all_reduce_sum
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.forward import Forward, StepContext
from vlp.models.albef import Albef
from vlp.objectives import itm
from vlp.objectives.masking import TextMasking
from vlp.objectives.queues import Queue
from vlp.optim.ema import EMA
from vlp.train import Pretrainer
from vlp.training.grad_cache import average_gradients, bundles
from vlp.types import Batch, MaskedIds

ROWS, LENGTH, WIDTH = 8, 9, 24
SIZES = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
SIZES |= {"model_type": "bert", "max_position_embeddings": 40, "num_hidden_layers": 2}


def tiny(dropout: float = 0.0, **parts) -> Albef:
    text = BertText(config=SIZES, dropout=dropout, length_groups=2)
    return Albef(TimmImage("test_vit", image_size=32), text, Fusion(layers=2), embed_size=WIDTH, **parts)


def pairs(rows: int = ROWS) -> Batch:
    """Rows 1 and 6 show the same picture, with other captions; captions have different lengths."""
    torch.manual_seed(1)
    index = torch.arange(rows) + 100
    index[6 % rows] = index[1 % rows]
    image = torch.randn(rows, 3, 32, 32, dtype=torch.float64)[index - 100]
    mask = torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (rows, 1))
    ids = torch.randint(5, 99, (rows, LENGTH)).masked_fill(~mask, 0)
    return Batch(index, image, ids, mask)


def queue_of(size: int, filled: int) -> Queue:
    """One of its rows shows the picture of row 2."""
    generator = torch.Generator().manual_seed(4)
    queue = Queue(size, {"image": WIDTH, "text": WIDTH}, CPU)
    columns = {n: F.normalize(torch.randn(filled, WIDTH, generator=generator), dim=1) for n in ("image", "text")}
    queue.push(torch.arange(filled) + 102, **columns)
    return queue


def context_of(objectives: dict, filled: int = 5, progress: float = 0.5) -> StepContext:
    memory = {
        o: queue_of(o.queue_size, min(filled, o.queue_size)) for o in objectives.values() if hasattr(o, "init_queue")
    }
    return StepContext(memory, progress=progress)


def networks(spec: Any = None, **how) -> tuple[nn.Module, nn.Module]:
    """A model, of ``spec`` or a tiny ALBEF, and a momentum encoder with other weights, without dropout unless asked for."""
    built = []
    for seed in (0, 9):
        torch.manual_seed(seed)
        built.append((spec or tiny(**how)).build().double())
    return built[0], EMA(built[1], 0.9, "train").network.double()


def bundle(batch: Batch, objectives: dict, model: nn.Module | None = None, **how) -> Forward:
    made, momentum = networks()
    context = context_of(objectives, **how)
    return Forward(model or made, batch, Forward(momentum, batch, context=context), context)


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
    """As a loader pads it: to its own longest caption."""
    longest = int(batch.attention_mask.sum(1).max())
    return replace(batch, input_ids=batch.input_ids[:, :longest], attention_mask=batch.attention_mask[:, :longest])


def step(
    rank: int, world: int, objectives: dict, spec: Any = None, bundle: type[Forward] = Forward
) -> tuple[dict, dict, dict]:
    """Means of the losses over processes, the gradients that DDP leaves, and what the memories get."""
    part = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    batch = shortened(part_of(pairs(), part))
    model, momentum = networks(spec)
    pretrainer = Pretrainer(model, objectives, bundle)
    called = DistributedDataParallel(pretrainer, find_unused_parameters=True) if world > 1 else pretrainer
    with drawn_by_row():
        losses, total, f = called(batch, momentum, context_of(objectives))
        total.backward()
    means = all_reduce_sum([loss.item() for loss in losses.values()], CPU)
    with torch.no_grad():
        kept = {name: o.enqueue(f) for name, o in objectives.items() if hasattr(o, "enqueue")}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: mean / world for name, mean in zip(losses, means)}, gradients, kept


def cached_step(
    rank: int, world: int, objectives: dict, parts: int, spec: Any = None, **how
) -> tuple[dict, dict, dict]:
    """As `step`, over so many accumulated micro-batches, by gradient caching."""
    size = ROWS // parts
    batches = []
    for n in range(parts):
        first = n * size + rank * size // world
        batches.append(shortened(part_of(pairs(), slice(first, first + size // world))))
    model, momentum = networks(spec, **how)
    found = bundles(model, batches, momentum, context_of(objectives))
    sums, kept = dict.fromkeys(objectives, 0.0), {}
    with drawn_by_row():
        for f in found:
            losses = {name: objective(f) for name, objective in objectives.items()}
            f.free_activations()
            (sum(objectives[name].weight * loss for name, loss in losses.items()) / parts).backward()
            sums = {name: total + losses[name].item() / parts for name, total in sums.items()}
        for f in found:
            f.replay()
    average_gradients(list(model.parameters()))
    means = all_reduce_sum(list(sums.values()), CPU)
    with torch.no_grad():
        for name, objective in objectives.items():
            rows = [objective.enqueue(f) for f in found] if hasattr(objective, "enqueue") else []
            kept |= {name: {column: torch.cat([row[column] for row in rows]) for column in rows[0]}} if rows else {}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: mean / world for name, mean in zip(sums, means)}, gradients, kept


def assert_same(found: tuple[dict, dict, dict], expected: tuple[dict, dict, dict]) -> None:
    """Losses, gradients of every parameter, memories."""
    for name, loss in expected[0].items():
        assert abs(found[0][name] - loss) < 1e-9, name
    for name, gradient in expected[1].items():
        # a key's bias has a true gradient of 0
        assert (found[1][name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12, name
    for name, rows in expected[2].items():
        for column, values in rows.items():
            torch.testing.assert_close(found[2][name][column], values, rtol=1e-9, atol=1e-12)
