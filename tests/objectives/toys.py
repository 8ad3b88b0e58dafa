"""A tower of a few numbers in float64, and an objective on it in one process or in two."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from vlp.distributed import all_reduce_sum
from vlp.forward import Forward, StepContext
from vlp.objectives.queues import MemoryBank
from vlp.types import Batch, Encoded

ROWS, SAMPLES, WIDTH = 8, 20, 5
CPU = torch.device("cpu")


class Net(nn.Module):
    """(B, 3, 2, 2) pictures or (B, L) words to WIDTH numbers, with a BatchNorm in between or without."""

    embed_size = WIDTH

    def __init__(self, norm: bool = False, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10) if norm else nn.Identity(), nn.Tanh())
        self.head, self.words = nn.Linear(10, WIDTH), nn.Embedding(20, 10)
        self.double()

    def _encoded(self, pooled):
        mask = torch.ones(len(pooled), 1, dtype=torch.bool)
        return Encoded(pooled[:, None], mask, normalize(self.head(pooled), dim=-1))

    def encode_image(self, image):
        return self._encoded(self.body(image.flatten(1)))

    def encode_text(self, input_ids, attention_mask):
        return self._encoded(self.words(input_ids).mean(1))


def views(rows: int = ROWS, others: int = 1, seed: int = 1) -> Batch:
    """Pictures with so many further views. Rows 1 and 6 show the same picture."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(rows) + 100
    index[6 % rows] = index[1 % rows]

    def one(further: tuple = ()) -> Batch:
        image = torch.randn(rows, 3, 2, 2, dtype=torch.float64, generator=generator)
        ids = torch.randint(20, (rows, 4), generator=generator)
        return Batch(index, image, ids, torch.ones_like(ids).bool(), dataset_row=torch.arange(rows) * 2, views=further)

    return one(tuple(one() for _ in range(others)))


def part_of(batch: Batch, rows: slice) -> Batch:
    tensors = {name: x[rows] for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}
    return replace(batch, **tensors, views=tuple(part_of(other, rows) for other in batch.views))


def queues_of(objective, model) -> dict:
    """The objective's queue or bank as a run starts it, in float64; a queue that was empty has a few rows."""
    if not hasattr(objective, "init_queue"):
        return {}
    memory = objective.init_queue(model, SAMPLES, CPU, torch.Generator().manual_seed(3))
    if isinstance(memory, MemoryBank):
        memory.rows = memory.rows.double()
        return {objective: memory}
    if len(memory) == 0:
        generator = torch.Generator().manual_seed(4)
        memory.push(torch.tensor([101, 200, 201]), key=normalize(torch.randn(3, WIDTH, generator=generator), dim=1))
    memory._columns = {name: rows.double() for name, rows in memory._columns.items()}
    return {objective: memory}


def forward_of(objective, batch: Batch, norm: bool = False, queues: dict | None = None, step: int = 0) -> Forward:
    """The bundle that the objective is called with; its momentum encoder has other weights."""
    model, momentum = Net(norm), Net(norm, seed=9).requires_grad_(False)
    context = StepContext(queues_of(objective, model) if queues is None else queues, step=step)
    return Forward(model, batch, Forward(momentum, batch, context=context), context)


class Wrapped(nn.Module):
    """What DDP wraps: the model and the objective, as the trainer does it."""

    def __init__(self, model: nn.Module, objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, f: Forward):
        f.model = self.model
        return self.objective(f)


def step(rank: int, world: int, objective, norm: bool = False) -> tuple[float, dict, dict]:
    """Mean of the loss over processes, the gradients that DDP leaves, and what the objective would remember."""
    f = forward_of(objective, part_of(views(), slice(rank * ROWS // world, (rank + 1) * ROWS // world)), norm)
    model = f.model
    wrapped = Wrapped(model, objective)
    called = DistributedDataParallel(wrapped, find_unused_parameters=True) if world > 1 else wrapped
    torch.manual_seed(7)
    loss = called(f)
    loss.backward()
    total = all_reduce_sum([loss.item()], CPU)[0] / world
    with torch.no_grad():
        remembered = objective.enqueue(f) if hasattr(objective, "enqueue") else {}
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, remembered


def assert_two_are_one(pair, objective, one, norm: bool = False) -> None:
    """Two processes with ``objective`` have the loss, the gradients and the memories of one process with ``one``."""
    loss, expected, kept = step(0, 1, one, norm)
    assert any(gradient.norm() > 1e-6 for gradient in expected.values())
    for total, found, remembered in pair(step, 2, objective, norm):
        assert abs(total - loss) < 1e-9
        # with nothing to do, the words' gradient is None or, under DDP, 0
        assert all(torch.allclose(found[n], expected.get(n, torch.zeros(())), rtol=1e-7, atol=1e-9) for n in found)
        assert expected.keys() <= found.keys() and remembered.keys() == kept.keys()
        assert all(torch.allclose(remembered[name].double(), kept[name].double()) for name in kept)
