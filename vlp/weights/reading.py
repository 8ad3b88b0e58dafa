"""Read weights files without running code, and load them into a module with an account of every tensor."""

from __future__ import annotations

import math
import pickle
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vlp.errors import UserError
from vlp.files import resolve


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file, on the CPU. Nothing in the file is executed.

    Reads safetensors, and torch files that load with ``weights_only=True``. A dictionary under ``state_dict`` or ``model`` is
    unwrapped, and the prefix ``module.`` of DistributedDataParallel is removed.

    Args:
        path: A file, or ``pip:PACKAGE/sub/path``.

    Raises:
        UserError: if the file is missing, damaged, would have to be unpickled, or contains anything but tensors.
    """
    path = resolve(str(path))
    if path.is_dir():
        raise UserError(f"{path} is a folder without experiment.json, so not a run; train it first, or name a file")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} is not a dictionary of tensors; save the model's state_dict()")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file; fetch it again ({error})") from error


def _read_torch(path: Path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types here, and only the message tells the cases apart
        refused = isinstance(error, pickle.UnpicklingError) and "nsupported" in str(error)
        if refused or "TorchScript" in str(error):
            raise UserError(
                f"{path} contains more than tensors and would run code on loading; if you trust it, convert it once: "
                "safetensors.torch.save_file(torch.load(..., weights_only=False), 'x.safetensors')"
            ) from error
        raise UserError(f"{path} is damaged or not a weights file; fetch it again") from error


@dataclass(frozen=True)
class LoadReport:
    """An account of every tensor of a module and of the weights that were loaded into it, by name.

    Args:
        loaded: Taken from the weights.
        resized: Those of ``loaded`` that were resized.
        copied: Those of ``loaded`` that come from the weights of another part.
        new: Missing in the weights, and declared to start at random.
        unexpected: Missing in the module, and declared to be ignored.
        replaced: In the weights, and declared to be new or copied all the same.
    """

    loaded: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()

    def __str__(self) -> str:
        counted = {"resized": self.resized, "copied": self.copied, "replaced": self.replaced}
        counted |= {"new": self.new, "unexpected": self.unexpected}
        parts = [f"{len(self.loaded)} loaded"]
        for word, names in counted.items():
            if names or word not in ("copied", "replaced"):
                parts.append(f"{len(names)} {word}" + (f" ({_first(names)})" if names else ""))
        return ", ".join(parts)


class Grid(NamedTuple):
    """The patch grid of an absolute position embedding.

    Args:
        size: (rows, columns) in the module.
        prefix: Tokens in front of the grid that have a position, too (class token, registers).
        source: (rows, columns) in the weights. None means square.
    """

    size: tuple[int, int]
    prefix: int
    source: tuple[int, int] | None = None

    def resize(self, embedding: Tensor) -> Tensor:
        """Resample (N, D) or (1, N, D) positions to ``size``. Unchanged if N does not fit ``source``."""
        from timm.layers import resample_abs_pos_embed

        positions = embedding.shape[-2] - self.prefix
        side = math.isqrt(max(positions, 0))
        source = self.source or (side, side)
        if source[0] * source[1] != positions:
            return embedding
        batched = embedding.reshape(1, *embedding.shape[-2:])  # (1, N, D), as timm expects
        resized = resample_abs_pos_embed(batched, list(self.size), list(source), num_prefix_tokens=self.prefix)
        return resized.reshape(*embedding.shape[:-2], *resized.shape[-2:])


class Resizable(Protocol):
    """The layout of a tensor of positions, which knows how to resize that of the weights to fit the module."""

    def resize(self, positions: Tensor) -> Tensor: ...


def load(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    new: Collection[str] = (),
    ignored: Collection[str] = (),
    grids: Mapping[str, Resizable] | None = None,
) -> LoadReport:
    """Copy ``state`` into ``module`` in place. Every name on either side must be loaded or declared.

    Args:
        module: The module.
        state: Tensors by name.
        new: Dotted prefixes that the weights may lack: parameters that start at random on purpose.
        ignored: Dotted prefixes that the module may lack: heads, buffers of other versions.
        grids: Positions by name, which are resized if their number differs.

    Returns:
        The account of all names.

    Raises:
        UserError: naming the first undeclared names, or a tensor with both its shapes. ``module`` is then unchanged.
    """
    # everything is checked before anything is copied
    own, grids = module.state_dict(), grids or {}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    if unexplained := [key for key in missing if not _under(key, new)]:
        raise UserError(f"the weights lack {_first(unexplained)}; they are of another model, choose one that fits")
    if unexplained := [key for key in unexpected if not _under(key, ignored)]:
        raise UserError(f"the weights have {_first(unexplained)}, which the model lacks; choose a model that fits")
    fitting, resized = {}, []
    for key in own.keys() & state.keys():
        fitting[key] = state[key]
        if key in grids and state[key].shape != own[key].shape:
            fitting[key] = grids[key].resize(state[key])
            resized.append(key)
        if fitting[key].shape != own[key].shape:
            shapes = f"{tuple(state[key].shape)} in the weights, {tuple(own[key].shape)} in the model"
            raise UserError(f"{key} is {shapes}; choose a model of the same size")
    module.load_state_dict(fitting, strict=False)
    loaded = tuple(key for key in own if key in fitting)
    return LoadReport(loaded, tuple(resized), new=tuple(missing), unexpected=tuple(unexpected))


def _under(key: str, prefixes: Iterable[str]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _first(names: Collection[str], count: int = 4) -> str:
    return ", ".join(list(names)[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def from_efficientnet_pytorch(state: Mapping[str, Tensor], stages: Iterable[int]) -> dict[str, Tensor]:
    """Rename the tensors of the ``efficientnet_pytorch`` layout (``_conv_stem``, ``_blocks.N``) to timm's names.

    That layout counts blocks through all stages. In a block without expansion, timm calls the projection ``conv_pw``, which
    is ``conv_pwl`` elsewhere, and numbers the norms accordingly. `load` checks the shapes.

    Args:
        state: Weights in the ``efficientnet_pytorch`` layout.
        stages: Number of blocks in each stage, e.g. ``[len(stage) for stage in model.blocks]``.
    """
    # names outside the blocks, of squeeze-and-excitation, and of blocks without and with expansion
    layers = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    squeeze = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    expanding = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    expanding |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    blocks = [f"blocks.{stage}.{block}" for stage, count in enumerate(stages) for block in range(count)]
    for number, block in enumerate(blocks):
        names = expanding if f"_blocks.{number}._expand_conv.weight" in state else plain
        layers |= {f"_blocks.{number}.{old}": f"{block}.{name}" for old, name in (names | squeeze).items()}
    renamed = {}
    for key, value in state.items():
        layer, _, leaf = key.rpartition(".")
        renamed[f"{layers.get(layer, layer)}.{leaf}"] = value
    return renamed
