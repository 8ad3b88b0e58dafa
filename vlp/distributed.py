"""The few collectives that training needs.

Every collective is the identity in a single process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from vlp.errors import UserError
from vlp.types import computing_on_host


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gather(x: Tensor) -> Tensor:
    """Gather (B, ...) rows of each of W processes to (W * B, ...), in the order of the processes, without gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def gather_with_gradient(x: Tensor) -> Tensor:
    """Gather rows like `gather`. The gradient of a row is summed over processes and returned to the one that computed it."""
    return x if world_size() == 1 else _Gather.apply(x)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


@contextmanager
def refuse_together() -> Iterator[None]:
    """Context in which a UserError of one process is raised in all of them. Otherwise the others wait for it for ever."""
    refusal = None
    try:
        yield
    except UserError as e:
        refusal = str(e)
    for each in gather_objects(refusal):
        if each is not None:
            raise UserError(each)


def gather_objects(x: object) -> list:
    """Return the object of every process. Objects are pickled, so use it only for small records of this run."""
    if world_size() == 1:
        return [x]
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, x)
    return parts


@computing_on_host()
def all_reduce_sum(values: list[float]) -> list[float]:
    """Sum a few numbers of the host over all processes. Nothing waits for a device."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=_host_group(dist.group.WORLD))
    return total.tolist()


def any_process(flag: bool) -> bool:
    """Return whether the flag of any process is set."""
    return all_reduce_sum([float(flag)])[0] > 0


@cache
def _host_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a group of all processes that can send numbers of the host: NCCL sends those of a device only.

    The "fake" group of a traced step (`vlp.planning.trace`) sends nothing.
    """
    return world if dist.get_backend() in ("gloo", "fake") else dist.new_group(backend="gloo")


def all_reduce_mean(x: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes, on its device."""
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / world_size()


def full_tensor(x: Tensor) -> Tensor:
    """Return a tensor that is sharded over processes in full, and any other tensor as it is.

    Every process must call this, because it communicates.
    """
    return x.full_tensor() if isinstance(x, DTensor) else x


def local_shard(x: Tensor) -> Tensor:
    """Return this process's part of a tensor that is sharded over processes, which shares its memory, and any other tensor
    as it is."""
    if hasattr(x, "ds_tensor"):  # a parameter that DeepSpeed's ZeRO-3 has sharded
        return x.ds_tensor
    return x.to_local() if isinstance(x, DTensor) else x


def broadcast_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors of every process with those of the main process."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
