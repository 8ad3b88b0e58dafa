"""Start the engine that the launcher has set up (one process, DDP, DeepSpeed or FSDP2), and check that it runs."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType

from vlp.config import Training
from vlp.distributed import any_process
from vlp.errors import UserError
from vlp.training.engines import Engine, Fsdp2, Zero, Zero3
from vlp.training.environment import PRECISIONS, check_settings, find_processes, number_of


def start_engine(train: Training, micro_batch: int) -> Engine:
    """Start the engine that the launcher has set up in the environment; return the one of this process.

    Several launch commands silently start a single process, unconnected processes, or another engine. So engine, number
    of processes and backend are compared with what the launcher and the config announced.

    Args:
        train: Settings of the training loop.
        micro_batch: Samples of a micro-batch over all processes.

    Raises:
        UserError: If they differ, or the micro-batch cannot be split over the processes.
    """
    deepspeed, fsdp = _is_set("ACCELERATE_USE_DEEPSPEED"), _is_set("ACCELERATE_USE_FSDP")
    cuda = torch.cuda.is_available()
    if deepspeed and not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if deepspeed:
        _need_deepspeed()
    if fsdp:
        _check_fsdp()
        # accelerate would silently run DDP on a CPU, so it only connects the processes and `Fsdp2` shards the weights
        del os.environ["ACCELERATE_USE_FSDP"]
    if _is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError(
            "the launcher asks for MEGATRON_LM, which vlp does not use; use one of the launch/*.yaml configs"
        )
    check_settings(train)
    store = find_processes()  # noqa: F841 - it must live until the process group exists
    if train.threads and not cuda:
        torch.set_num_threads(train.threads)
    accelerator = Accelerator(
        cpu=not cuda and not deepspeed,
        mixed_precision=PRECISIONS[train.precision],
        gradient_accumulation_steps=train.backward_passes,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if deepspeed and not cuda else [],
    )
    if fsdp and not dist.is_initialized():  # accelerate connects nothing for one process
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # a process that exits in the checks below would interrupt others that are still connecting
        _connect_hosts()
    engine = (Zero if deepspeed else Fsdp2 if fsdp else Engine)(accelerator)
    _check_launch(engine, train)
    if deepspeed and engine.stage == 3:  # known once DeepSpeed is sure to run
        engine = Zero3(accelerator)
    if micro_batch % accelerator.num_processes:
        raise UserError(
            f"a micro-batch of {micro_batch} (data.batch_size / train.accumulation) cannot be split over "
            f"{accelerator.num_processes} processes; make data.batch_size a multiple of their product"
        )
    engine.configure(train, micro_batch)
    return engine


def _connect_hosts() -> None:
    """Connect the hosts over gloo, which numbers of the host are exchanged by, next to NCCL.

    Raises:
        UserError: If they cannot be connected.
    """
    try:
        any_process(False)
    except RuntimeError as e:
        raise UserError(
            f"the processes cannot exchange numbers over gloo ({' '.join(str(e).split())[:150]}); set GLOO_SOCKET_IFNAME to the "
            f"network interface that connects the machines"
        ) from None


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _need_deepspeed() -> None:
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise UserError(
            "this launch config uses DeepSpeed, which is not installed; pip install 'vlp[deepspeed]'"
        ) from None


def _check_fsdp() -> None:
    """Raise UserError unless the launcher asks for FSDP version 2 without options that `Fsdp2` does not have."""
    if os.environ.get("FSDP_VERSION") != "2":
        raise UserError("the launcher asks for FSDP version 1, which vlp does not use; use launch/fsdp2_*.yaml")
    for option in ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING"):
        if _is_set(option):
            raise UserError(f"{option} has no effect in vlp; remove it from the launch config, see launch/fsdp2_*.yaml")


def _check_launch(engine: Engine, train: Training) -> None:
    accelerator = engine.accelerator
    announced = number_of("WORLD_SIZE", 1)
    if os.environ.get("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate was asked for several CPU processes but starts a single one (--cpu --num_processes N does that); "
            "use --config_file launch/ddp_cpu2.yaml"
        )
    if accelerator.num_processes != announced:
        raise UserError(
            f"the launcher announced {announced} processes but {accelerator.num_processes} are connected; "
            f"use one of the launch/*.yaml configs"
        )
    if isinstance(engine, Zero) != (accelerator.distributed_type == DistributedType.DEEPSPEED):
        raise UserError(
            "DeepSpeed was asked for but does not run; unset ACCELERATE_USE_CPU and use launch/zero2_*.yaml"
        )
    if train.processes not in (None, accelerator.num_processes):
        raise UserError(
            f"train.processes is {train.processes} but {accelerator.num_processes} run; launch with "
            f"`accelerate launch --config_file launch/...`, or set train.processes=none"
        )
    if train.engine not in (None, engine.name):
        raise UserError(
            f"train.engine is {train.engine!r} but {engine.name!r} runs; launch with the config in launch/ that starts it"
        )
    if announced > 1 and not dist.is_initialized():
        raise UserError("the processes are not connected; use one of the launch/*.yaml configs")
