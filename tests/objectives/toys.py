"""A tower of a few numbers in float64, and an objective on it in one process or in two."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from vlp.distributed import all_reduce_sum
from vlp.forward import Bundle, Forward, StepContext
from vlp.models.base import Model, encoded_by_head
from vlp.objectives.queues import MemoryBank
from vlp.testing import part_of
from vlp.train import Pretrainer
from vlp.types import Batch

ROWS, SAMPLES, WIDTH = 8, 20, 5
CPU = torch.device("cpu")


class Net(Model):
    """(B, 3, 2, 2) images or (B, L) words to WIDTH numbers, with a BatchNorm in between or without."""

    image = text = None
    embed_size = WIDTH

    def __init__(self, norm: bool = False, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10) if norm else nn.Identity(), nn.Tanh())
        self.head, self.words = nn.Linear(10, WIDTH), nn.Embedding(20, 10)
        self.double()

    def _encoded(self, pooled):
        mask = torch.ones(len(pooled), 1, dtype=torch.bool)
        return encoded_by_head(pooled[:, None], mask, self.head(pooled))

    def encode_image(self, image):
        return self._encoded(self.body(image.flatten(1)))

    def encode_text(self, input_ids, attention_mask):
        return self._encoded(self.words(input_ids).mean(1))


def views(rows: int = ROWS, others: int = 1, seed: int = 1) -> Batch:
    """Return images with ``others`` further views. Rows 1 and 6 show the same image."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(rows) + 100
    index[6 % rows] = index[1 % rows]

    def one(further: tuple = ()) -> Batch:
        image = torch.randn(rows, 3, 2, 2, dtype=torch.float64, generator=generator)
        ids = torch.randint(20, (rows, 4), generator=generator)
        return Batch(index, image, ids, torch.ones_like(ids).bool(), dataset_row=torch.arange(rows) * 2, views=further)

    return one(tuple(one() for _ in range(others)))


def queues_of(objective, model) -> dict:
    """Return the objective's queue or bank as a run starts it, in float64. A queue that starts empty has three rows."""
    queue = objective.init_queue(model, SAMPLES, CPU, torch.Generator().manual_seed(3))
    if queue is None:
        return {}
    if isinstance(queue, MemoryBank):
        queue.rows = queue.rows.double()
        return {objective: queue}
    if len(queue) == 0:
        generator = torch.Generator().manual_seed(4)
        queue.push(torch.tensor([101, 200, 201]), key=normalize(torch.randn(3, WIDTH, generator=generator), dim=1))
    queue._columns = {name: rows.double() for name, rows in queue._columns.items()}
    return {objective: queue}


def networks(norm: bool = False) -> tuple[Net, Net]:
    """Return a model and a momentum encoder with other weights."""
    return Net(norm), Net(norm, seed=9).requires_grad_(False)


def forward_of(objective, batch: Batch, norm: bool = False, queues: dict | None = None, step: int = 0) -> Forward:
    """Return the bundle that the objective is called with."""
    model, momentum = networks(norm)
    context = StepContext(queues_of(objective, model) if queues is None else queues, step=step)
    return Forward(model, batch, Bundle(momentum, batch, context), context)


def step(rank: int, world: int, objective, norm: bool = False) -> tuple[float, dict, dict]:
    """Return the mean of the loss over processes, the gradients that DDP leaves, and what the queue gets."""
    batch = part_of(views(), slice(rank * ROWS // world, (rank + 1) * ROWS // world))
    model, momentum = networks(norm)
    queues = queues_of(objective, model)
    pretrainer = Pretrainer(model, {"loss": objective})
    called = DistributedDataParallel(pretrainer, find_unused_parameters=True) if world > 1 else pretrainer
    torch.manual_seed(7)
    losses, total, (f,) = called([batch], momentum, StepContext(queues))
    total.backward()
    mean = all_reduce_sum([losses["loss"].item()])[0] / world
    with torch.no_grad():
        enqueued = objective.enqueue(f) if queues else {}
    return mean, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, enqueued


def assert_two_are_one(pair, objective, one, norm: bool = False) -> None:
    """Assert that two processes with ``objective`` have the loss, gradients and queue of one process with ``one``."""
    loss, expected, kept = step(0, 1, one, norm)
    assert any(gradient.norm() > 1e-6 for gradient in expected.values())
    for total, found, enqueued in pair(step, 2, objective, norm):
        assert abs(total - loss) < 1e-9
        # unused words have no gradient, or zero under DDP
        assert all(torch.allclose(found[n], expected.get(n, torch.zeros(())), rtol=1e-7, atol=1e-9) for n in found)
        assert expected.keys() <= found.keys() and enqueued.keys() == kept.keys()
        assert all(torch.allclose(enqueued[name].double(), kept[name].double()) for name in kept)
