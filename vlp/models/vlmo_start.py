"""VLMo's stages: which parts start from which, and what the text stage leaves as it is (Bao et al. 2022, sec. 3.3).

The stages of a run of `vlp.stages` are (1) images alone, (2) texts alone, through the attention that the images have shaped,
(3) both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

from torch import Tensor

from vlp.encoders.mome_layer import Expert
from vlp.errors import UserError

ExpertStart = Literal["random", "image", "text"]

# What a stage has that the one before may lack, or the other way round
HEADS = ("itc", "vl", "pooler", "itm", "classifier", "mlm", "words", "mim")

# ``train.frozen`` of stage 2. The published code trains the text's parts and the last norm, which images go through too, so that
# they drift. It also names the images' token type and rows of the position table trainable: no text reaches them.
PAPER = (
    "encoder.image",
    "encoder.positions.image",
    "encoder.layers.*.norm",
    "encoder.layers.*.attention",
    "encoder.layers.*.gamma",
    "encoder.layers.*.experts.image",
)
# What images go through stays as stage 1 left it, to the bit.
RECOMMENDED = (*PAPER, "encoder.norm")


def with_experts(
    state: Mapping[str, Tensor], own: Collection[str], starts: Mapping[Expert, ExpertStart]
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The weights with the experts that they lack, where these start from others.

    Args:
        state: of another VLMo.
        own: names of the model's tensors.
        starts: of each expert that may be lacking: the one that it is a copy of, or "random".

    Returns:
        The tensors; prefixes of what starts at random; names that were copied.

    Raises:
        UserError: if an expert is lacking that ``starts`` does not name, or the one that it is to be copied from.
    """
    if not any(name.startswith("encoder.layers.") for name in state):
        some = ", ".join(list(state)[:2])
        raise UserError(f"the weights are not of a VLMo: they have {some}, ...; give model.weights those of one")
    state, new, copied = dict(state), [], []
    held = {name.split(".")[4] for name in state if ".experts." in name}
    for expert in ("image", "text", "vl"):
        layers = sorted({int(n.split(".")[2]) for n in own if f".experts.{expert}." in n})
        lacking = [n for n in layers if not _of(state, n, expert)]
        if not lacking:
            continue
        source = starts.get(expert)
        if source is None:
            raise UserError(
                f"the weights have no {expert} expert in layer {lacking[0]}; set model.experts_from.{expert} to random or to "
                f"the expert that it is to be a copy of, or give other weights"
            )
        for layer in lacking:
            if source == "random":
                new.append(f"encoder.layers.{layer}.experts.{expert}")
                continue
            found = _of(state, layer, source)
            if not found:
                raise UserError(
                    f"model.experts_from.{expert} is {source}, and the weights have no {source} expert in layer {layer}; "
                    f"name another one, or give other weights"
                )
            here = {name.replace(f".experts.{source}.", f".experts.{expert}."): x for name, x in found.items()}
            state |= here
            copied += here
    if "text" not in held:
        new += ["encoder.text", "encoder.positions.text"]
    if "image" not in held:
        new += ["encoder.image", "encoder.positions.image"]
    if "vl" not in held:
        new.append("encoder.positions.cross")
    return state, new, copied


def _of(state: Mapping[str, Tensor], layer: int, expert: str) -> dict[str, Tensor]:
    prefix = f"encoder.layers.{layer}.experts.{expert}."
    return {name: value for name, value in state.items() if name.startswith(prefix)}


def left_out(state: Collection[str], own: Collection[str]) -> list[str]:
    """Prefixes of what the weights have and a model of fewer objectives has not: heads, experts, a modality."""
    tops = {".".join(n.split(".")[:5]) for n in state if ".experts." in n}
    tops |= {"encoder.image", "encoder.text", "encoder.positions.image", "encoder.positions.text"}
    return [
        p
        for p in (*HEADS, *sorted(tops), "encoder.positions.cross")
        if not any(n.startswith(f"{p}.") or n == p for n in own)
    ]
