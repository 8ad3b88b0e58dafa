"""Group parameters by learning rate and weight decay."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Protocol

from torch import Tensor, nn

from vlp.errors import UserError

# Parameters that are added to every token or take the place of one. Weight decay would only pull them towards 0, as it
# would a bias. The names are those of timm, transformers and open_clip, and each is a whole dotted component of a
# parameter's name. Word embeddings are not listed, because BERT decays them.
UNDECAYED = frozenset(
    ("pos_embed", "positional_embedding", "position_embeddings")
    + ("relative_position_bias_table", "relative_attention_bias", "token_type_embeddings")
    + ("cls_token", "dist_token", "reg_token", "mask_token", "class_embedding", "cls_emb")
)


class Trainable(Protocol):
    """The part of `vlp.models.base.Model` that parameter groups read."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def no_weight_decay(self) -> Collection[str]: ...

    def layer_ids(self) -> Mapping[str, int]: ...


def parameter_groups(
    model: Trainable,
    weight_decay: float,
    layer_decay: float = 1.0,
    lr_scales: Mapping[str, float] | None = None,
) -> list[dict]:
    """Sort the trainable parameters into groups with the same weight decay and learning-rate scale.

    Parameters of at most one dimension (norms, biases, temperature), the names in `UNDECAYED` and the names or glob patterns
    of ``model.no_weight_decay()`` have no weight decay.

    Args:
        model: Model whose parameters are grouped.
        weight_decay: Weight decay of all other parameters.
        layer_decay: Factor on the learning rate from a layer to the one before it. The rate of layer ``i`` of
            ``model.layer_ids()``, which maps the name of every trainable parameter to 0 ... L, is scaled by
            ``layer_decay ** (L - i)``.
        lr_scales: Name prefix, made of whole dotted components, -> further factor on the learning rate. The longest
            prefix of a name counts.

    Returns:
        Groups for a torch optimizer, each with ``params``, ``names`` (in the order of params), ``weight_decay``,
        ``lr_scale`` and ``decayed`` (False for the groups that have no decay at any value of ``weight_decay``).

    Raises:
        UserError: If no parameter is trainable, a prefix matches no parameter, or the model has no layer ids for
            ``layer_decay``.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise UserError("no parameter is trainable; unfreeze a part of the model")
    layer_scales = _layer_scales(model, trainable, layer_decay)
    prefix_scales = _prefix_scales(trainable, lr_scales or {})
    patterns = model.no_weight_decay()
    groups: dict[tuple[bool, float], dict] = {}
    for name, parameter in trainable.items():
        listed = not UNDECAYED.isdisjoint(name.split(".")) or any(fnmatchcase(name, pattern) for pattern in patterns)
        decayed = parameter.ndim > 1 and not listed
        scale = layer_scales[name] * prefix_scales[name]
        empty = {"params": [], "names": [], "weight_decay": weight_decay if decayed else 0.0}
        group = groups.setdefault((decayed, scale), {**empty, "lr_scale": scale, "decayed": decayed})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def starts_with(name: str, prefix: str) -> bool:
    """Return whether a dotted name starts with a prefix, in which ``*`` matches anything up to the next dot."""
    return re.match(re.escape(prefix).replace(r"\*", r"[^.]*"), name) is not None


def describe_groups(groups: list[dict], num_names: int = 3) -> str:
    """Return a table with one line for each group: its sizes, its settings and its first ``num_names`` parameters."""
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


def _layer_scales(model: Trainable, trainable: Mapping[str, Tensor], layer_decay: float) -> dict[str, float]:
    if layer_decay == 1.0:
        return dict.fromkeys(trainable, 1.0)
    try:
        ids = model.layer_ids()
    except NotImplementedError:
        raise UserError(
            f"layer_decay={layer_decay} needs layer_ids() of {type(model).__name__}; set layer_decay=1.0"
        ) from None
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
