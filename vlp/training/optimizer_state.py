"""Optimizer state in one form for every engine: "KEY/PARAMETER NAME" -> full-sized tensor, e.g. ``exp_avg/text.model...``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlp.weights.checkpoints import Tensors


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


def _by_parameter(tensors: Tensors) -> dict[str, Tensors]:
    found: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        key, _, parameter = name.partition("/")
        found.setdefault(parameter, {})[key] = tensor
    return found


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """Return the state of every trained parameter of a torch optimizer, sharded as the parameters are.

    Args:
        model: Model without the engine's wrapper.
        optimizer: Its optimizer.
    """
    state = {n: optimizer.state[p] for n, p in _trained(model) if p in optimizer.state}
    return {f"{k}/{n}": v for n, values in state.items() for k, v in values.items()}


def load(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Load the state of a torch optimizer of whole or sharded parameters."""
    by_parameter = _by_parameter(tensors)
    fused = optimizer.defaults.get("fused", False)
    for name, p in _trained(model):
        values = {k: v for k, v in by_parameter.get(name, {}).items() if k != "master"}
        if values:
            # Fused optimizers assume that averages have the memory layout of the parameter, and that the step count is on
            # its device. Other optimizers count steps on the CPU.
            optimizer.state[p] = {
                k: _like(p, v) if v.shape == p.shape and k != "step" else v.clone() for k, v in values.items()
            }
            if fused and "step" in values:
                optimizer.state[p]["step"] = values["step"].to(p.device, copy=True)


@torch.no_grad()
def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Return ``value`` in the memory layout of a parameter, and sharded as the parameter is."""
    own = torch.empty_like(parameter)
    if not isinstance(own, DTensor):
        return own.copy_(value)
    mesh, local = own.device_mesh, own.to_local()
    rows = torch.chunk(value, mesh.size())  # FSDP2 shards along the first dimension
    if mesh.get_local_rank() < len(rows):
        local.copy_(rows[mesh.get_local_rank()])
    return own


def zero_tensors(model: nn.Module, optimizer) -> Tensors:
    """Return the state of every trained parameter of DeepSpeed's ZeRO optimizer. Every process must call this."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    inner = next(iter(optimizer.optimizer.state.values()), {})
    if inner:
        _link_state(optimizer)
    keys = [k for k, v in inner.items() if v.ndim > 0] if inner else []
    tensors = {f"{k}/{n}": safe_get_full_optimizer_state(p, k) for n, p in _trained(model) for k in keys}
    if "step" in inner:  # SGD has no step count
        tensors |= {f"step/{n}": inner["step"].clone() for n, _ in _trained(model)}
    return tensors | {f"master/{n}": safe_get_full_fp32_param(p) for n, p in _trained(model)}


def _link_state(optimizer) -> None:
    """Make ZeRO's state accessible by parameter.

    DeepSpeed does so itself after the first step, but only for the first parameter group, because the other groups have no
    state yet at that moment (deepspeed 0.19.8).
    """
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def load_zero(model: nn.Module, optimizer, tensors: Tensors) -> None:
    """Load the state of DeepSpeed's ZeRO optimizer."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    by_parameter = _by_parameter(tensors)
    example = next(iter(by_parameter.values()), {})
    keys = [k for k, v in example.items() if k not in ("step", "master")]
    if keys:
        # ZeRO creates its state in the first step, and only existing state can be set
        for flat in optimizer.single_partition_of_fp32_groups:
            state = optimizer.optimizer.state[flat] = {k: torch.zeros_like(flat) for k in keys}
            if "step" in example:
                state["step"] = example["step"].clone()
        _link_state(optimizer)
    for name, p in _trained(model):
        for key in keys:
            safe_set_full_optimizer_state(p, by_parameter[name][key].to(p.device), key)
        if "master" in by_parameter.get(name, {}):
            safe_set_full_fp32_param(p, by_parameter[name]["master"].to(p.device))


@dataclass
class Shard:
    """This process's shard of a tensor that is sharded as DeepSpeed's ZeRO-3 shards parameters.

    The flat tensor is split into equal parts, the last of which is padded.

    Args:
        local: (ceil(numel / W),) part of this process of W.
        shape: Shape of the whole tensor.
    """

    local: Tensor
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    @torch.no_grad()
    def full_tensor(self) -> Tensor:
        """Gather the tensor. Every process must call this."""
        parts = [torch.empty_like(self.local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, self.local.contiguous())
        return torch.cat(parts)[: self.shape.numel()].view(self.shape)

    @torch.no_grad()
    def copy_(self, whole: Tensor) -> None:
        """Copy the part of this process from a whole tensor."""
        start = dist.get_rank() * len(self.local)
        part = whole.reshape(-1)[start : start + len(self.local)]
        self.local[: len(part)].copy_(part)


def zero3_tensors(model: nn.Module, optimizer) -> dict[str, Tensor | Shard]:
    """Return the state of every trained parameter of DeepSpeed's ZeRO-3 optimizer, sharded as the parameters are."""
    state = next(iter(optimizer.optimizer.state.values()), {})
    tensors = {}
    for name, p in _trained(model):
        for key, value in {"master": None, **state}.items():
            tensors[f"{key}/{name}"] = _zero3_shard(optimizer, p, key) if value is None or value.ndim else value.clone()
    return tensors


def _zero3_shard(optimizer, parameter: nn.Parameter, key: str) -> Shard:
    local = optimizer.get_local_fp32_param(parameter, None if key == "master" else key)
    return Shard(local, parameter.ds_shape)


def load_zero3(model: nn.Module, optimizer, tensors: Tensors) -> None:
    """Load the state of DeepSpeed's ZeRO-3 optimizer."""
    by_parameter = _by_parameter(tensors)
    example = next(iter(by_parameter.values()), {})
    for flat in optimizer.fp32_partitioned_groups_flat:  # ZeRO creates its state in the first step
        optimizer.optimizer.state[flat] |= {
            key: value.clone() if key == "step" else torch.zeros_like(flat)
            for key, value in example.items()
            if key != "master"
        }
    for name, p in _trained(model):
        for key, value in by_parameter.get(name, {}).items():
            if key != "step":
                _zero3_shard(optimizer, p, key).copy_(value)
