"""Start the engine that the launcher has set up (one process, DDP or DeepSpeed), and check that it runs."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType

from vlp.config import Training
from vlp.errors import UserError


def start_engine(train: Training, micro_batch: int) -> Accelerator:
    """Start the engine that the launcher has set up in the environment; return the Accelerator of this process.

    Several launch commands silently start a single process, unconnected processes, or another engine. So engine, number
    of processes and backend are compared with what the launcher and the config announced.

    Args:
        train: Settings of the training loop.
        micro_batch: Samples of a micro-batch over all processes.

    Raises:
        UserError: If they differ, or the micro-batch cannot be split over the processes.
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
        gradient_accumulation_steps=train.backward_passes,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if deepspeed and not cuda else [],
    )
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # a process that exits in the checks below would interrupt others that are still connecting
    _check_launch(accelerator, train, deepspeed)
    if micro_batch % accelerator.num_processes:
        raise UserError(
            f"a micro-batch of {micro_batch} (data.batch_size / train.accumulation) cannot be split over "
            f"{accelerator.num_processes} processes; make data.batch_size a multiple of their product"
        )
    if deepspeed:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        rows = micro_batch * train.accumulation // train.backward_passes  # of a backward pass
        settings["train_micro_batch_size_per_gpu"] = rows // accelerator.num_processes
        settings["gradient_accumulation_steps"] = train.backward_passes
        settings["gradient_clipping"] = train.clip_norm or 0.0
        # the optimizers of vlp are not among those that DeepSpeed has tested
        settings["zero_allow_untested_optimizer"] = True
    return accelerator


def engine(accelerator: Accelerator) -> str:
    """Return the name of the engine that runs: "single", "ddp" or "deepspeed"."""
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
