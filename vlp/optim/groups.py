"""Group parameters by learning rate and weight decay."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import Tensor, nn

from vlp.errors import UserError
from vlp.optim.optimizers import UNDECAYED


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
    lr_scales: Mapping[str, float] | None = None,
) -> list[dict]:
    """Sort the trainable parameters into groups of one weight decay and one learning-rate scale.

    No decay for parameters of at most one dimension (norms, biases, temperature), for the names in `UNDECAYED`, and for
    what any submodule lists in ``no_weight_decay()`` (timm's convention: names or glob patterns relative to it).

    Args:
        weight_decay: of the decayed groups.
        layer_decay: the learning rate of layer ``i`` of ``model.layer_ids()`` (a mapping of every trainable parameter's
            name to 0 ... L) is scaled by ``layer_decay ** (L - i)``.
        lr_scales: name prefix (whole dotted components) to a further factor; the longest prefix of a name counts.

    Returns:
        Groups for a torch optimizer, each with ``params``, ``names`` (in the order of params), ``weight_decay``,
        ``lr_scale`` and ``decayed`` (False in the groups that have no decay whatever ``weight_decay`` is).

    Raises:
        UserError: if nothing is trainable, a prefix matches nothing, or layer decay is asked of a model without ids.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise UserError("no parameter is trainable; unfreeze a part of the model")
    layer_scales = _layer_scales(model, trainable, layer_decay)
    prefix_scales = _prefix_scales(trainable, lr_scales or {})
    listed = {
        f"{path}.{pattern}" if path else pattern
        for path, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for pattern in module.no_weight_decay()
    }
    groups: dict[tuple[bool, float], dict] = {}
    for name, parameter in trainable.items():
        named = not UNDECAYED.isdisjoint(name.split(".")) or any(fnmatchcase(name, pattern) for pattern in listed)
        decayed = parameter.ndim > 1 and not named
        scale = layer_scales[name] * prefix_scales[name]
        empty = {"params": [], "names": [], "weight_decay": weight_decay if decayed else 0.0}
        group = groups.setdefault((decayed, scale), {**empty, "lr_scale": scale, "decayed": decayed})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def starts_with(name: str, prefix: str) -> bool:
    """Whether a dotted name does; a ``*`` in the prefix stands for anything up to the next dot."""
    return re.match(re.escape(prefix).replace(r"\*", r"[^.]*"), name) is not None


def describe_groups(groups: list[dict], num_names: int = 3) -> str:
    """The audit as a table: one line a group, with its first ``num_names`` parameter names and how many more."""
    lines = [f"{'tensors':>7} {'parameters':>12} {'weight_decay':>12} {'lr_scale':>9}  names"]
    for group in groups:
        names, size = group["names"], sum(parameter.numel() for parameter in group["params"])
        more = f", and {len(names) - num_names} more" if len(names) > num_names else ""
        lines.append(
            f"{len(names):>7} {size:>12,} {group['weight_decay']:>12g} {group['lr_scale']:>9.4g}  "
            + ", ".join(names[:num_names])
            + more
        )
    return "\n".join(lines)


def _layer_scales(model: nn.Module, trainable: Mapping[str, Tensor], layer_decay: float) -> dict[str, float]:
    if layer_decay == 1.0:
        return dict.fromkeys(trainable, 1.0)
    if not hasattr(model, "layer_ids"):
        raise UserError(f"layer_decay={layer_decay} needs layer_ids() of {type(model).__name__}; set layer_decay=1.0")
    ids = model.layer_ids()
    if missing := sorted(trainable.keys() - ids.keys()):
        raise ValueError(f"{type(model).__name__}.layer_ids() has no layer for {', '.join(missing)}")
    last = max(ids.values())
    return {name: layer_decay ** (last - ids[name]) for name in trainable}


def _prefix_scales(trainable: Mapping[str, Tensor], lr_scales: Mapping[str, float]) -> dict[str, float]:
    scales, used = dict.fromkeys(trainable, 1.0), set()
    for prefix in sorted(lr_scales, key=len):  # a longer prefix overwrites a shorter one
        for name in trainable:
            if name == prefix or name.startswith(prefix + "."):
                scales[name] = lr_scales[prefix]
                used.add(prefix)
    for prefix in lr_scales.keys() - used:
        known = {name.rsplit(".", depth)[0] for name in trainable for depth in range(name.count(".") + 1)}
        close = get_close_matches(prefix, sorted(known), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "name a module or parameter of the model"
        raise UserError(f"lr_scales prefix {prefix!r} matches no trainable parameter; {hint}")
    return scales
