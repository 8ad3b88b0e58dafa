"""Read weights files without running code, and load them into a module with an account of every tensor."""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vlp.errors import UserError
from vlp.files import local_path, open_regular, relative_to, resolve

# Modules that training scripts put around a model: DistributedDataParallel, torch.compile, Lightning, MoCo, MoCo v3.
WRAPPERS = ("module", "_orig_mod", "model", "backbone", "network", "net", "encoder_q", "base_encoder", "encoder")
# Wrappers that torch also puts around parts of a model.
INNER_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a transformers folder. In several files: with .index.json
HUB_NAME = re.compile(r"(?!.*\.(?:pth?|bin|ckpt|tar|safetensors)$)[\w-][\w.-]*(/[\w.-]+)?")
# Settings and counters that training scripts save next to the tensors. numpy 1 and 2 have different names for theirs.
NUMPY = [value.__reduce__()[0] for value in (np.int64(0), np.zeros(1))]  # functions that rebuild a scalar and an array
SAFE = [argparse.Namespace, np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd")]
SAFE += [(call, f"numpy.{core}.multiarray.{call.__name__}") for core in ("core", "_core") for call in NUMPY]


def resolve_weights(path: str) -> Path:
    """Return the existing file or folder of weights that ``path`` names, as `vlp.files.resolve` does.

    Raises:
        UserError: if nothing exists there. For the name of a model on a hub, it says what to download.
    """
    if HUB_NAME.fullmatch(path) and not local_path(path).exists():
        raise UserError(
            f"no such file or folder: {path}{relative_to(path)}; check the path. If it is a name on the Hugging Face hub, "
            f"download it first and name the folder: hf download {path} --local-dir FOLDER"
        )
    return resolve(path)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights in a transformers folder: one, or those that an index lists.

    Raises:
        UserError: if there are none, or the index cannot be read or lists missing files.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                names = list(dict.fromkeys(json.loads(index.read_text())["weight_map"].values()))
                if not names:
                    raise ValueError
                if strange := [name for name in names if Path(name).name != name]:
                    raise UserError(f"{index} names {strange[0]!r}, which is not a file in the folder; fetch it again")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is damaged: it lists no files of weights; fetch it again") from error
            shards = [folder / name for name in names]
            if missing := [shard.name for shard in shards if not shard.is_file()]:
                raise UserError(f"{folder} lacks {_first(missing)}, which {index.name} lists; fetch the weights too")
            return shards
    raise UserError(f"{folder} has neither {' nor '.join(WEIGHTS)}, in one file or several; fetch the weights too")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file, on the CPU. Nothing in the file is executed.

    Reads safetensors, and torch files that load with ``weights_only=True``, also with the settings of argparse and the
    numbers of numpy next to the tensors. A dictionary under ``state_dict`` or ``model`` is unwrapped, and prefixes of
    `WRAPPERS` that all names have are removed.

    Args:
        path: A file, or ``pip:PACKAGE/sub/path``.

    Raises:
        UserError: if the file is missing, damaged, would have to be unpickled, or contains anything but tensors.
    """
    path = resolve_weights(str(path))
    if path.is_dir():
        raise UserError(f"{path} is a folder without experiment.json, so not a run; train it first, or name a file")
    return _without_wrappers(_read_file(path))


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a transformers folder, in one file or several. See `weight_files` and `read_weights`."""
    files = [_read_file(file) for file in weight_files(folder)]
    # of all files together: the names of one of several may share the prefix that is the encoder's own
    return _without_wrappers({name: tensor for state in files for name, tensor in state.items()})


def _read_file(path: Path) -> dict[str, Tensor]:
    _check_content(path)
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} is not a dictionary of tensors; save the model's state_dict()")
    return dict(state)


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {INNER_WRAPPERS.sub("", key): value for key, value in state.items()}
    while (prefix := next(iter(state)).partition(".")[0]) in WRAPPERS and all(
        k.startswith(f"{prefix}.") for k in state
    ):
        state = {key.removeprefix(f"{prefix}."): value for key, value in state.items()}
    return state


def _check_content(path: Path) -> None:
    """Raise UserError for files that are often found in the place of weights, since no reader would name them."""
    try:
        with open_regular(path) as file:
            start = file.read(512)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
    text = start.lstrip().lower()
    if not start:
        raise UserError(f"{path} is damaged: it is empty; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a git-lfs pointer, not the weights; run git lfs pull in its repository, or download the file itself"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path} is a web page, not weights (a login or error page); download the file itself")
    if text.startswith((b'{"', b"{\n")) and path.suffix != ".safetensors":
        raise UserError(f"{path} is JSON text, not weights; name the file of weights")
    if start.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} is a gzip archive; unpack it and name the file of weights in it")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if not any(name.endswith("/data.pkl") for name in names):
            raise UserError(
                f"{path} is a zip archive of {_first(names)}, not a file of torch; unpack it and name the file of weights"
            )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file; fetch it again ({error})") from error


def _read_torch(path: Path):
    try:
        with torch.serialization.safe_globals(SAFE):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types here, and only the message tells the cases apart
        if "TorchScript" in str(error):
            raise UserError(
                f"{path} is a TorchScript program and would run code on loading; if you trust it, convert it once: "
                "torch.save(torch.jit.load(FILE).state_dict(), 'x.pth')"
            ) from error
        if isinstance(error, pickle.UnpicklingError) and "nsupported" in str(error):
            raise UserError(
                f"{path} contains more than tensors and would run code on loading; if you trust it, convert it once: "
                "torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'x.pth'), with the key of its tensors"
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

    Weights of a whole training script are recognised: if all names of ``module`` are in ``state`` behind a prefix of
    `WRAPPERS`, such as ``encoder_q.``, the prefix is removed, and names without it are reported as unexpected. Counters of
    BatchNorm (``num_batches_tracked``) may be missing, as in torch itself.

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
    needed = [key for key in own if not _under(key, new) and not key.endswith(".num_batches_tracked")]
    prefix = _wrapper(needed, state)
    outside = [key for key in state if not key.startswith(prefix)]
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    if unexplained := [key for key in needed if key not in state]:
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
    return LoadReport(loaded, tuple(resized), new=tuple(missing), unexpected=(*unexpected, *outside))


def _wrapper(needed: list[str], state: Mapping[str, Tensor]) -> str:
    """Return the prefix of `WRAPPERS` behind which ``state`` has all needed names, or "" if there is none."""
    if not needed or needed[0] in state:
        return ""
    prefixes = [key.removesuffix(needed[0]) for key in state if key.endswith(f".{needed[0]}")]
    wrappers = [prefix for prefix in prefixes if set(prefix.rstrip(".").split(".")) <= set(WRAPPERS)]
    return next((prefix for prefix in wrappers if all(prefix + key in state for key in needed)), "")


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
