"""Initial weights of a VLMo: each expert starts from the weights, as a copy of another expert, or at random.

The weights of one stage lack the experts that the next stage adds: text experts after images, vision-language experts after
texts. An expert that is missing without being declared is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from vlp.encoders.relative_position import TableGrid
from vlp.errors import UserError
from vlp.weights import reading
from vlp.weights.reading import Grid, LoadReport

# parts that weights may lack, because they depend on the objectives
HEADS = ("itc", "vl", "itm", "pooler", "classifier", "mlm", "words", "mim", "heads")
PARTS = (*HEADS, "encoder.image", "encoder.text", "encoder.positions")
EXPERT = re.compile(r"(encoder\.layers\.\d+\.experts)\.(\w+)\.")

# ``train.frozen`` of the text stage (Bao et al. 2022, sec. 3.3). The published code trains the parts of the texts and the last
# norm, which images pass too, so that the image branch drifts. It also trains the token type of images and their rows of the
# position table. They get no gradient: there only weight decay changes them, here nothing does.
FROZEN_IN_TEXT_STAGE_PUBLISHED = (
    "encoder.image",
    "encoder.positions.image",
    "encoder.layers.*.norm",
    "encoder.layers.*.attention",
    "encoder.layers.*.gamma",
    "encoder.layers.*.experts.image",
)
# Everything that images pass keeps the weights of the image stage, bit by bit.
FROZEN_IN_TEXT_STAGE = (*FROZEN_IN_TEXT_STAGE_PUBLISHED, "encoder.norm")


def initialize(
    model: nn.Module, state: Mapping[str, Tensor], name: str, starts: Mapping[str, str], grid: tuple[int, int] | None
) -> LoadReport:
    """Load ``state`` into a VLMo.

    Args:
        model: The `VlmoModel`.
        state: State dict of the weights.
        name: Name of the weights, for messages.
        starts: Expert -> its start: "weights", "random", or the expert of the same layer that it copies.
        grid: (h, w) patches of the images that the weights were trained with. None takes it as square.

    Raises:
        UserError: if the weights lack an expert, or anything else that is not declared new, or if sizes differ.
    """
    own, state = model.state_dict(), dict(state)
    new, copied, replaced = list(HEADS), [], []
    for expert, start in starts.items():
        if start == "weights":
            continue
        for key in [key for key in own if (found := EXPERT.match(key)) and found[2] == expert]:
            prefix = EXPERT.match(key)[0]
            if state.pop(key, None) is not None:
                replaced.append(key)
            if start == "random":
                new.append(prefix.removesuffix("."))
            elif (other := key.replace(f".experts.{expert}.", f".experts.{start}.")) in state:
                state[key] = state[other]
                copied.append(key)
    if starts["text"] != "weights":
        new += ["encoder.text", "encoder.positions.text"]
    if starts["vl"] != "weights":
        new.append("encoder.positions.cross")
    for key in own:
        found = EXPERT.match(key)
        if found and key not in state and found[0].removesuffix(".") not in new:
            raise UserError(
                f"{name} lacks the {found[2]} expert of {found[1].removesuffix('.experts')}; {CURES[found[2]]}"
            )
    kinds = "encoder.image.kind.weight"
    if kinds in state and kinds in own and len(state[kinds]) < len(own[kinds]):  # as published: copies of the last one
        last = state[kinds][-1:].expand(len(own[kinds]) - len(state[kinds]), -1)
        state[kinds] = nn.functional.pad(state[kinds], (0, 0, 0, len(last)))
        state[kinds][-len(last) :] = last
    grids = {}
    if model.image is not None:
        size = model.encoder.grid
        grids = {"encoder.image.positions": Grid(size, 1, grid), "encoder.positions.image": TableGrid(size, grid)}
    report = reading.load(model, state, new=new, ignored=_absent(own, state), grids=grids)
    return replace(report, copied=tuple(copied), replaced=tuple(replaced))


CURES = {
    "image": "choose weights that have image experts",
    "text": "choose weights that have text experts, or set model.text_start=image",
    "vl": "choose weights that have them, or set model.vl_start to random, text or image",
}


def _absent(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> set[str]:
    """Return the parts and experts that the model is built without."""
    experts = {found[0].removesuffix(".") for key in state if (found := EXPERT.match(key))}
    tables = {f"encoder.positions.{part}" for part in ("image", "text", "cross")}
    return {part for part in {*PARTS, *tables, *experts} if not any(f"{key}.".startswith(f"{part}.") for key in own)}
