"""Weights in: where a path points, what a file holds, and a strict account of what went into a module."""

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
    """The tensors in a weights file, on the CPU; nothing in it is ever executed.

    Takes safetensors, and torch files that load with ``weights_only=True``. A dictionary under ``state_dict`` or
    ``model`` is unwrapped, and the ``module.`` that DistributedDataParallel puts before each name is removed.

    Raises:
        UserError: if the file is missing, damaged, would have to be unpickled, or holds anything but tensors.
    """
    path = resolve(str(path))
    if path.is_dir():
        raise UserError(f"{path} is a folder and no run: it has no experiment.json; train it first, or name a file")
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
        raise UserError(f"{path} is damaged or no safetensors file; fetch it again ({error})") from error


def _read_torch(path: Path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch raises half a dozen types here; which of the two cases it is, only the text tells
        refused = isinstance(error, pickle.UnpicklingError) and "nsupported" in str(error)
        if refused or "TorchScript" in str(error):
            raise UserError(
                f"{path} holds more than tensors and would run code on loading; if you trust it, convert it once: "
                "safetensors.torch.save_file(torch.load(..., weights_only=False), 'x.safetensors')"
            ) from error
        raise UserError(f"{path} is damaged or no weights file; fetch it again") from error


@dataclass(frozen=True)
class LoadReport:
    """What became of every key of a module and of the weights that were read for it."""

    loaded: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()  # also counted in loaded
    copied: tuple[str, ...] = ()  # likewise, from the weights of another part
    new: tuple[str, ...] = ()  # in the module only: start fresh, as declared
    unexpected: tuple[str, ...] = ()  # in the weights only: left out, as declared
    replaced: tuple[str, ...] = ()  # in both, and yet new or copied, as declared

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} loaded"]
        for word in ("resized", "copied", "replaced", "new", "unexpected"):
            names = getattr(self, word)
            if names or word not in ("copied", "replaced"):
                parts.append(f"{len(names)} {word}" + (f" ({_first(names)})" if names else ""))
        return ", ".join(parts)


class Grid(NamedTuple):
    """Where the positions of an absolute position embedding lie.

    Args:
        size: (rows, columns) of the module's grid of patches.
        prefix: tokens in front of the grid that have a position of their own (class token, registers).
        source: (rows, columns) in the weights; None = square.
    """

    size: tuple[int, int]
    prefix: int
    source: tuple[int, int] | None = None

    def resize(self, embedding: Tensor) -> Tensor:
        """(N, D) or (1, N, D) resampled to ``size``; returned as it is where its positions are no such grid."""
        from timm.layers import resample_abs_pos_embed

        positions = embedding.shape[-2] - self.prefix
        side = math.isqrt(max(positions, 0))
        source = self.source or (side, side)
        if source[0] * source[1] != positions:
            return embedding
        batched = embedding.reshape(1, *embedding.shape[-2:])
        resized = resample_abs_pos_embed(batched, list(self.size), list(source), num_prefix_tokens=self.prefix)
        return resized.reshape(*embedding.shape[:-2], *resized.shape[-2:])


class Resizable(Protocol):
    """What positions a tensor of the module holds, and so how those of the weights become as many."""

    def resize(self, positions: Tensor) -> Tensor: ...


def load(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    new: Collection[str] = (),
    ignored: Collection[str] = (),
    grids: Mapping[str, Resizable] | None = None,
) -> LoadReport:
    """Copy ``state`` into ``module`` in place; every key on either side is loaded or declared, or this raises.

    Args:
        new: dotted prefixes that the weights need not have: parameters that start fresh on purpose.
        ignored: dotted prefixes in the weights that the module need not have: heads, buffers of other versions.
        grids: positions by name, resized where their number differs: `Grid` does so with embeddings.

    Raises:
        UserError: naming the first keys that nothing explains, or a key with both its shapes; ``module`` is untouched.
    """
    own, grids = module.state_dict(), grids or {}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    if unexplained := [key for key in missing if not _under(key, new)]:
        raise UserError(f"the weights lack {_first(unexplained)}; they are of another model, choose one that fits")
    if unexplained := [key for key in unexpected if not _under(key, ignored)]:
        raise UserError(f"the weights hold {_first(unexplained)}, which the model has not; choose a model that fits")
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
    """Rename the keys of the ``efficientnet_pytorch`` layout (``_conv_stem``, ``_blocks.N``) to timm's.

    That layout counts blocks through all stages. In a block that does not expand, timm numbers the norms from 1 and has
    ``conv_pw`` for the projection, which is ``conv_pwl`` elsewhere. Shapes are for `load` to check.

    Args:
        state: weights in the ``efficientnet_pytorch`` layout.
        stages: the number of blocks in each stage, e.g. ``[len(stage) for stage in model.blocks]``.
    """
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
