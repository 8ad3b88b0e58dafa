"""Processes: start-up with a check that the launcher did what it was asked, and the few collectives that training needs.

Every collective is the identity in a single process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlp.config import Training
from vlp.errors import UserError


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gather(x: Tensor) -> Tensor:
    """(B, ...) of each process -> (W * B, ...) of all, in the order of the processes; no gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def gather_with_gradient(x: Tensor) -> Tensor:
    """As `gather`; the gradient of a row is summed over all processes and given to the one that it came from."""
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


def gather_objects(x: object) -> list:
    """The object of every process. It is pickled on the way: for this run's own small records only."""
    if world_size() == 1:
        return [x]
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, x)
    return parts


def sum_over_processes(values: list[float], device: torch.device) -> list[float]:
    """Agrees on a few numbers with one all-reduce."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def take_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrites the tensors of every process with those of the main one."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def start(train: Training, micro_batch: int) -> Accelerator:
    """The Accelerator of this process.

    Args:
        micro_batch: samples of one forward pass over all processes.

    Raises:
        UserError: where engine, number of processes or backend are not what the launcher or the config asked for (several
            launch commands silently start one process, unconnected ones, or another engine).
    """
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    cuda = torch.cuda.is_available()
    if deepspeed and not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if deepspeed:
        _need_deepspeed()
    if train.threads and not cuda:
        torch.set_num_threads(train.threads)
    accelerator = Accelerator(
        cpu=not cuda and not deepspeed,
        mixed_precision={"fp32": "no", "bf16": "bf16"}[train.precision],
        gradient_accumulation_steps=train.accumulation,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if deepspeed and not cuda else [],
    )
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # one that ends because of what follows would break off the others' connecting
    _check_launch(accelerator, train, deepspeed)
    if micro_batch % accelerator.num_processes:
        raise UserError(
            f"a micro-batch of {micro_batch} (data.batch_size / train.accumulation) cannot be split over "
            f"{accelerator.num_processes} processes; make data.batch_size a multiple of their product"
        )
    if deepspeed:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = micro_batch // accelerator.num_processes
        settings["gradient_accumulation_steps"] = train.accumulation
        settings["gradient_clipping"] = train.clip_norm or 0.0
        # a torch optimizer of ours, not DeepSpeed's own
        settings["zero_allow_untested_optimizer"] = True
    return accelerator


def engine(accelerator: Accelerator) -> str:
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return "deepspeed"
    return "single" if accelerator.num_processes == 1 else "ddp"


def _need_deepspeed() -> None:
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise UserError(
            "this launch config uses DeepSpeed, which is not installed; pip install 'vlp[deepspeed]'"
        ) from None


def _check_launch(accelerator: Accelerator, train: Training, deepspeed: bool) -> None:
    announced = int(os.environ.get("WORLD_SIZE", 1))
    if os.environ.get("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate was asked for several CPU processes but starts a single one (--cpu --num_processes N does that); "
            "use --config_file launch/cpu2.yaml"
        )
    for other in ("FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{other}", "false").lower() == "true":
            raise UserError(
                f"the launcher asks for {other}, which vlp does not use; use one of the launch/*.yaml configs"
            )
    if accelerator.num_processes != announced:
        raise UserError(
            f"the launcher announced {announced} processes but {accelerator.num_processes} are connected; "
            f"use one of the launch/*.yaml configs"
        )
    if deepspeed != (accelerator.distributed_type == DistributedType.DEEPSPEED):
        raise UserError(
            "DeepSpeed was asked for but does not run; unset ACCELERATE_USE_CPU and use launch/zero2_*.yaml"
        )
    if train.processes not in (None, accelerator.num_processes):
        raise UserError(
            f"train.processes is {train.processes} but {accelerator.num_processes} run; launch with "
            f"`accelerate launch --config_file launch/...`, or set train.processes=none"
        )
    if deepspeed and accelerator.state.deepspeed_plugin.zero_stage > 2:
        raise UserError("ZeRO stage 3 is not supported yet; use launch/zero2_*.yaml")
    if train.engine not in (None, engine(accelerator)):
        raise UserError(
            f"train.engine is {train.engine!r} but {engine(accelerator)!r} runs; launch with the config in launch/ that starts it"
        )
    if announced > 1 and not dist.is_initialized():
        raise UserError("the processes are not connected; use one of the launch/*.yaml configs")
