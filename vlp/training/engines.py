"""What differs between the engines: one process and DDP (`Engine`), DeepSpeed's ZeRO (`Zero`, `Zero3`), and FSDP2 (`Fsdp2`).

`vlp.training.launch` starts the engine that the launcher has set up. The training loop is the same for all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vlp.config import Experiment, Training
from vlp.distributed import broadcast_from_main, full_tensor
from vlp.encoders.base import TextTower
from vlp.errors import UserError
from vlp.optim.optimizers import Lamb, Lars
from vlp.training import optimizer_state
from vlp.training.optimizer_state import Tensors
from vlp.training.state import TrainState


class Engine:
    """One process, or DDP: every process holds all weights, gradients, moments and averages.

    Args:
        accelerator: Connects the processes.

    Attributes:
        name: Value of ``train.engine`` that demands this engine.
        is_sharded: Whether a checkpoint is gathered from all processes.
        steps_after_nonfinite_gradient: Whether the optimizer has stepped by the time that the norm is known.
        steps_in_backward: Whether the optimizer steps within the backward pass, so that the losses must be read before it.
    """

    is_sharded = False
    steps_after_nonfinite_gradient = False
    steps_in_backward = False

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    @property
    def name(self) -> str:
        return "single" if self.accelerator.num_processes == 1 else "ddp"

    @property
    def description(self) -> str:
        """Engine and backend, for the log."""
        return self.name + (f" over {dist.get_backend()}" if dist.is_available() and dist.is_initialized() else "")

    def configure(self, train: Training, micro_batch: int) -> None:
        """Pass settings on to the engine.

        Args:
            train: Settings of the training loop.
            micro_batch: Samples of a micro-batch over all processes.
        """

    def check(self, experiment: Experiment) -> None:
        """Check that the engine can train the experiment.

        Raises:
            UserError: If not, with the reason.
        """

    def place(self, model: nn.Module) -> None:
        """Move a new model to the device."""
        model.to(self.accelerator.device)
        # channels_last speeds up convolutions and is neutral for transformers
        model.to(memory_format=torch.channels_last)

    def prepare(
        self, module: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState
    ) -> tuple[nn.Module, AcceleratedOptimizer]:
        """Wrap the module that a step calls, and the optimizer.

        Args:
            module: The module that a step calls. It contains ``model``.
            model: The trained model.
            optimizer: Optimizer of the model's parameters, without state.
            state: State of the run, with its averages.
        """
        return self.accelerator.prepare(module, optimizer)

    def clip_gradients(self, module: nn.Module, limit: float | None) -> Tensor:
        """Scale the gradient down to the norm ``limit`` unless that is None, and return its () norm before."""
        norm = self.accelerator.clip_grad_norm_(module.parameters(), limit or math.inf)
        return torch.as_tensor(math.nan if norm is None else full_tensor(norm), device=self.accelerator.device)

    def abandon_step(self) -> None:
        """Prepare for the next step after one whose forward or backward pass did not complete."""

    @contextmanager
    def unsharded(self, network: nn.Module) -> Iterator[None]:
        """Gather the weights of a network for passes whose number may differ between processes."""
        yield

    def optimizer_tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
        """Return the optimizer's state in the form of checkpoints; see `vlp.training.optimizer_state`."""
        return optimizer_state.tensors(model, optimizer)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
        """Load the result of `optimizer_tensors`, which another engine or number of processes may have saved."""
        optimizer_state.load(model, optimizer, tensors)


class Zero(Engine):
    """DeepSpeed: ZeRO-1 and ZeRO-2 shard the moments of the optimizer, and ZeRO-2 the gradients."""

    name = "deepspeed"
    is_sharded = True
    steps_after_nonfinite_gradient = True
    steps_in_backward = True

    @property
    def description(self) -> str:
        return f"ZeRO-{self.stage} over {dist.get_backend()}"

    @property
    def stage(self) -> int:
        return self.accelerator.state.deepspeed_plugin.zero_stage

    def configure(self, train: Training, micro_batch: int) -> None:
        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
        rows = micro_batch * train.accumulation // train.backward_passes  # of a backward pass
        settings["train_micro_batch_size_per_gpu"] = rows // self.accelerator.num_processes
        settings["gradient_accumulation_steps"] = train.backward_passes
        settings["gradient_clipping"] = train.clip_norm or 0.0
        # the optimizers of vlp are not among those that DeepSpeed has tested
        settings["zero_allow_untested_optimizer"] = True
        # DeepSpeed's bf16 casts weights, averages and none of the inputs; `prepare` casts per operation, as DDP does
        settings["bf16"] = {"enabled": False}

    def check(self, experiment: Experiment) -> None:
        if isinstance(experiment.optim, (Lamb, Lars)):
            raise UserError(
                f"{type(experiment.optim).__name__} needs whole parameters and ZeRO cuts them up; use "
                f"vlp.optim.optimizers.AdamW, or another launch config"
            )
        if experiment.train.nonfinite == "skip" and experiment.train.backward_passes > 1:
            raise UserError("train.nonfinite=skip with DeepSpeed needs train.accumulation=1; set one of them")

    def place(self, model: nn.Module) -> None:
        model.to(self.accelerator.device)  # ZeRO sends weights as plain bytes, which loses the memory format

    def prepare(
        self, module: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState
    ) -> tuple[nn.Module, AcceleratedOptimizer]:
        is_bf16 = self.accelerator.mixed_precision == "bf16"
        autocast = torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=is_bf16)
        module.forward = autocast(module.forward)
        return self.accelerator.prepare(module, optimizer)

    def optimizer_tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
        return optimizer_state.zero_tensors(model, optimizer)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
        optimizer_state.load_zero(model, optimizer, tensors)


class Zero3(Zero):
    """DeepSpeed's ZeRO-3: every process holds its share of weights, gradients, moments and averages.

    DeepSpeed shards the weights, reduces the gradients and steps the optimizer. Its hooks gather weights at the forward pass
    of the module that holds them, and reuse the order of the first step. Models of vlp read weights outside of a forward
    pass, and their order of passes depends on the batch. `Gathering` takes the place of these hooks.
    """

    def configure(self, train: Training, micro_batch: int) -> None:
        super().configure(train, micro_batch)
        plugin = self.accelerator.state.deepspeed_plugin
        plugin.dschf = None  # or transformers would shard its models while it builds them, before they are copied
        settings = plugin.deepspeed_config["zero_optimization"]
        for option in ("offload_param", "offload_optimizer"):
            if settings.get(option, {}).get("device", "none") != "none":
                raise UserError(f"{option} is not supported with ZeRO-3; remove it from the DeepSpeed file")
        # DeepSpeed's own linear adds the bias in place, to a product that activation_checkpointing=cheap has stored
        settings["memory_efficient_linear"] = False
        settings["stage3_param_persistence_threshold"] = 1  # scalars stay whole, for the log

    def check(self, experiment: Experiment) -> None:
        super().check(experiment)
        _check_whole_weights(experiment.train, "ZeRO-3")

    def prepare(
        self, module: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState
    ) -> tuple[nn.Module, AcceleratedOptimizer]:
        from deepspeed.runtime.zero import Init

        averages = [average.network for average in (state.average, state.momentum) if average]
        for network in averages:
            broadcast_from_main(network.buffers())
            Init(module=network, mem_efficient_linear=False)  # outside of the module that DeepSpeed wraps
        self.gathering = {network: Gathering(network) for network in (model, *averages)}
        self.has_stepped = False  # since the last forward pass
        in_step = [self.gathering[model]] + ([self.gathering[state.momentum.network]] if state.momentum else [])

        def begin_pass(*_) -> None:
            if self.has_stepped:
                # DeepSpeed only overwrites the gradients that a step computes, and steps with the others again
                prepared.optimizer.grad_partitions_flat_buffer.zero_()
            self.has_stepped = False
            for each in in_step:
                each.begin_step()

        def release(*_) -> None:
            self.has_stepped = True
            for each in in_step:
                each.release()

        module.register_forward_pre_hook(begin_pass)
        wrapped, prepared = super().prepare(module, model, optimizer, state)
        prepared.optimizer.parameter_offload.destroy()  # its hooks
        for network in (model, *averages):
            network.register_state_dict_post_hook(_with_shards)
            _make_passes_equal(network)
        # DeepSpeed steps within the backward pass
        prepared.optimizer.optimizer.register_step_pre_hook(release)
        return wrapped, prepared

    def abandon_step(self) -> None:
        for each in self.gathering.values():
            each.release()

    @contextmanager
    def unsharded(self, network: nn.Module) -> Iterator[None]:
        with self.gathering[network].whole():
            yield

    def optimizer_tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
        return optimizer_state.zero3_tensors(model, optimizer)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
        optimizer_state.load_zero3(model, optimizer, tensors)


class Gathering:
    """Gathers the weights of a network that ZeRO-3 has sharded.

    The weights of a block are gathered for its passes only. All other weights are gathered for the whole step.

    Args:
        network: The network, before or after it is sharded.
    """

    def __init__(self, network: nn.Module):
        self.parameters = list(network.parameters())
        self.blocks = {block: list(block.parameters()) for block in repeated_blocks(network)}
        in_blocks = {id(p) for parameters in self.blocks.values() for p in parameters}
        self.others = [p for p in self.parameters if id(p) not in in_blocks]
        self.is_whole = False
        self.last: list[nn.Parameter] = []  # weights of the block whose backward pass was the last to begin
        for block in self.blocks:
            block.register_forward_pre_hook(self._before_forward)
            block.register_forward_hook(self._after_forward)

    def begin_step(self) -> None:
        """Gather the weights outside of blocks."""
        self.release()  # gathered weights are old ones if a step was taken since
        _gather_weights(self.others)

    def release(self) -> None:
        """Free all gathered weights. Each process keeps its shards."""
        self.last = []
        _release_weights(self.parameters)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather all weights, for passes whose number may differ between processes."""
        self.release()
        _gather_weights(self.parameters)
        self.is_whole = True
        try:
            yield
        finally:
            self.is_whole = False
            self.release()

    def _before_forward(self, block: nn.Module, inputs: tuple) -> None:
        if not self.is_whole:
            (self._begin_backward if _in_backward() else _gather_weights)(self.blocks[block])

    def _after_forward(self, block: nn.Module, inputs: tuple, outputs) -> None:
        # activation checkpointing recomputes the block within its backward pass, which still needs the weights
        if not self.is_whole and not _in_backward():
            _release_weights(self.blocks[block])
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda _: self._begin_backward(self.blocks[block]))

    def _begin_backward(self, parameters: list[nn.Parameter]) -> None:
        """Gather the weights of a block. The block whose backward pass began before has completed it."""
        if self.last is not parameters:
            _release_weights(self.last)
            self.last = parameters
        _gather_weights(parameters)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _gather_weights(parameters: list[nn.Parameter]) -> None:
    if parameters:
        parameters[0].all_gather(parameters)  # skips those that are gathered already


def _release_weights(parameters: list[nn.Parameter]) -> None:
    released = [p for p in parameters if not p.ds_persist]
    if released:
        released[0].partition(released)


def _with_shards(network: nn.Module, tensors: dict, prefix: str, metadata: dict) -> None:
    """Put shards that know their whole tensor in the place of the empty weights of a state dict."""
    for name, parameter in network.named_parameters(remove_duplicate=False):
        tensors[prefix + name] = optimizer_state.Shard(parameter.ds_tensor, parameter.ds_shape)


class Fsdp2(Engine):
    """torch's ``fully_shard``: every process holds its share of weights, gradients, moments and averages.

    The weights of a block are gathered for its passes only. All other weights are gathered for the whole step.
    """

    name = "fsdp2"
    is_sharded = True

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        self.root: Root | None = None

    def check(self, experiment: Experiment) -> None:
        _check_whole_weights(experiment.train, "FSDP2")

    def place(self, model: nn.Module) -> None:
        # `prepare` moves one block after the other, so that the device never holds the whole model. It takes only
        # contiguous weights.
        pass

    def prepare(
        self, module: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState
    ) -> tuple[nn.Module, AcceleratedOptimizer]:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        averages = [average.network for average in (state.average, state.momentum) if average]
        mesh = init_device_mesh(self.accelerator.device.type, (dist.get_world_size(),))
        for network in (model, *averages):
            self._broadcast(network)
            for block in repeated_blocks(network):
                fully_shard(block, mesh=mesh)
            _make_passes_equal(network)
        if state.average:  # not part of a step, so its other weights are not gathered in one
            fully_shard(state.average.network, mesh=mesh)
        self.root = Root(self.accelerator, module, averages)
        fully_shard(self.root, mesh=mesh)
        self.root._get_fsdp_state()._lazy_init()  # an evaluation may come before the first step
        # the parameters are new ones
        parameters = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [parameters[name] for name in group["names"]]
            if isinstance(optimizer, torch.optim.SGD):  # fused SGD does not know sharded parameters
                group["fused"], group["foreach"] = False, True
        return self.root, self.accelerator.prepare(optimizer)

    @torch.no_grad()
    def _broadcast(self, network: nn.Module) -> None:
        """Start from the weights of the main process, as DDP does. One tensor at a time is on the device."""
        for tensor in (*network.parameters(), *network.buffers()):
            moved = tensor.to(self.accelerator.device)
            broadcast_from_main([moved])
            tensor.copy_(moved)

    def abandon_step(self) -> None:
        self.root.reset_iter_state()

    @contextmanager
    def unsharded(self, network: nn.Module) -> Iterator[None]:
        from torch.distributed.fsdp import FSDPModule

        units = [module for module in network.modules() if isinstance(module, FSDPModule)]
        if network not in units:
            units.append(self.root)
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.set_reshard_after_forward(unit is not self.root, recurse=False)
            # Shards the weights, and forgets the order of these passes, which differs between processes: the next backward
            # pass would gather ahead what came before in that order, and the processes would wait for each other for ever.
            self.root.reset_iter_state()


def _check_whole_weights(train: Training, engine: str) -> None:
    """Raise UserError if a setting needs whole weights outside of a block's passes."""
    for name, is_set in (
        ("train.grad_cache=true", train.grad_cache),
        ("train.backward=per_loss", train.backward == "per_loss"),
    ):
        if is_set:
            raise UserError(
                f"{name} differentiates with respect to whole weights, which {engine} has only during a pass; use "
                f"launch/ddp_*.yaml or launch/zero2_*.yaml, or train.activation_checkpointing"
            )
    if train.compile:
        raise UserError(
            f"train.compile compiles whole towers, and {engine} gathers weights between their blocks; set it to false"
        )


def _make_passes_equal(network: nn.Module) -> None:
    """Let text towers run as many passes on every process, because each pass gathers weights from all of them."""
    for part in network.modules():
        if isinstance(part, TextTower):
            part.equal_passes = dist.get_world_size() > 1


class Root(nn.Module):
    """Root of the sharded modules. Weights outside of blocks are gathered from its forward pass to its backward pass.

    Args:
        accelerator: Has the precision.
        module: The module that a step calls.
        averages: Networks of averaged weights, to be sharded too.
    """

    def __init__(self, accelerator: Accelerator, module: nn.Module, averages: list[nn.Module]):
        super().__init__()
        self.accelerator, self.module, self.averages = accelerator, module, nn.ModuleList(averages)

    def forward(self, *inputs):
        with self.accelerator.autocast():
            return self.module(*inputs)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the modules whose weights are gathered for their forward pass only: the repeated blocks of a network.

    They are the items of each outermost ``nn.ModuleList`` or ``nn.Sequential`` that has several of the same class, such as
    the blocks of a ViT and the layers of BERT. Blocks without ``forward`` and blocks that share a parameter with another
    module are left out.
    """
    uses = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))

    def is_block(module: nn.Module) -> bool:
        parameters = list(module.parameters())
        has_forward = type(module).forward is not nn.Module.forward
        return has_forward and bool(parameters) and all(uses[id(p)] == 1 for p in parameters)

    blocks: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        children = list(module.children())
        classes = Counter(map(type, children)) if isinstance(module, (nn.ModuleList, nn.Sequential)) else {}
        for child in children:
            if classes and classes[type(child)] > 1 and is_block(child):
                blocks.append(child)
            else:
                visit(child)

    visit(network)
    return blocks
