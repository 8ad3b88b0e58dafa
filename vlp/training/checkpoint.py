"""Save checkpoints: folders of safetensors and JSON in the same form for every engine.

    step-00000500/ model.safetensors  optimizer.safetensors  average.safetensors  state.json  manifest.json

The folder is written under a temporary name, synced, and renamed, so a folder with the final name is complete.
manifest.json has the SHA-256 of every file, which is checked before anything is loaded. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from vlp.errors import UserError
from vlp.files import file_hash, write_atomically
from vlp.weights.checkpoints import Tensors, all_steps, best_path, step_of, step_path


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(folder: Path, step: int, files: dict[str, Tensors], state: dict) -> Path:
    """Write the checkpoint ``folder/step-STEP``.

    Args:
        folder: Folder of the checkpoints.
        step: Optimizer steps so far.
        files: Name of a safetensors file -> its tensors.
        state: Counters for state.json.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: If the folder cannot be written (disk full, no permission). An earlier checkpoint is not changed.
    """
    final = step_path(folder, step)
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*.tmp"):  # of a process that was killed during a save
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        for name, tensors in files.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        hashes = {path.name: file_hash(path) for path in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps({"step": step, "sha256": hashes}, indent=1))
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync(folder)
    except (OSError, SafetensorError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        full = isinstance(e, OSError) and e.errno == errno.ENOSPC or "No space" in str(e)
        advice = "free some space" if full else "check that the folder can be written"
        raise UserError(f"cannot save {final}: {reason}; {advice}, then resume the run") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def prune(folder: Path, keep: int, step: int) -> None:
    """Remove all checkpoints except for the newest ``keep`` ones up to ``step`` and the best one.

    A checkpoint after ``step`` is damaged, since the run was resumed from an earlier one.
    """
    newest = [path for path in all_steps(folder) if step_of(path) <= step][:keep]
    for path in all_steps(folder):
        if path not in newest and path != best_path(folder):
            # renamed first, so that a partly removed checkpoint never has a final name
            gone = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            os.replace(path, gone)
            shutil.rmtree(gone, ignore_errors=True)


def mark_best(folder: Path, step: int, metric: str, value: float) -> None:
    """Record which checkpoint is the best one."""
    write_atomically(folder / "best.json", json.dumps({"step": step, "metric": metric, "value": value}).encode())


# Optimizer state has one form for every engine: "KEY/PARAMETER NAME" -> full-sized tensor.


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, zero: bool) -> Tensors:
    """Return the optimizer state of every trained parameter.

    Args:
        model: Model without the engine's wrapper.
        optimizer: A torch optimizer, or DeepSpeed's ZeRO optimizer with ``zero``.
        zero: Whether the state is sharded over processes. Then every process must call this.
    """
    if zero:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        inner = next(iter(optimizer.optimizer.state.values()), {})
        if inner:
            _link_state(optimizer)
        keys = [k for k, v in inner.items() if v.ndim > 0] if inner else []
        tensors = {f"{k}/{n}": safe_get_full_optimizer_state(p, k) for n, p in _trained(model) for k in keys}
        if "step" in inner:  # SGD has no step count
            tensors |= {f"step/{n}": inner["step"].clone() for n, _ in _trained(model)}
        return tensors | {f"master/{n}": safe_get_full_fp32_param(p) for n, p in _trained(model)}
    state = {n: optimizer.state[p] for n, p in _trained(model) if p in optimizer.state}
    return {f"{k}/{n}": v for n, values in state.items() for k, v in values.items()}


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, zero: bool, tensors: Tensors) -> None:
    """Load the result of `optimizer_tensors`, which another engine or number of processes may have saved."""
    by_parameter: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        key, _, parameter = name.partition("/")
        by_parameter.setdefault(parameter, {})[key] = tensor
    if zero:
        _load_zero(model, optimizer, by_parameter)
        return
    fused = optimizer.defaults.get("fused", False)
    for name, p in _trained(model):
        values = {k: v for k, v in by_parameter.get(name, {}).items() if k != "master"}
        if values:
            # Fused optimizers assume that averages have the memory layout of the parameter, and that the step count is on
            # its device. Other optimizers count steps on the CPU.
            optimizer.state[p] = {
                k: torch.empty_like(p).copy_(v) if v.shape == p.shape and k != "step" else v.clone()
                for k, v in values.items()
            }
            if fused and "step" in values:
                optimizer.state[p]["step"] = values["step"].to(p.device, copy=True)


def _link_state(optimizer) -> None:
    """Make ZeRO's state accessible by parameter.

    DeepSpeed does so itself after the first step, but only for the first parameter group, because the other groups have no
    state yet at that moment (deepspeed 0.19.8).
    """
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def _load_zero(model: nn.Module, optimizer, by_parameter: dict[str, Tensors]) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

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
