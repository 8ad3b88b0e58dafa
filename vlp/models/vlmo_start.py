"""Where the parts of a VLMo start: in weights, in another expert, or at random - and which of these was meant.

The stages of the paper hand weights on that lack what the next one adds: experts of texts after images, the vision-language
expert after texts. What is missing without having been declared is an error.
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
from vlp.weights.run import run_spec

# what weights may lack, since it is new for each purpose
HEADS = ("itc", "vl", "itm", "pooler", "classifier", "mlm", "words", "mim")
PARTS = (*HEADS, "encoder.image", "encoder.text", "encoder.positions")
EXPERT = re.compile(r"(encoder\.layers\.\d+\.experts)\.(\w+)\.")

# ``train.frozen`` of the stage of texts (Bao et al. 2022, sec. 3.3). The published code trains the texts' own parts and the last
# norm, which images go through too, so that their branch drifts. It also trains the images' token type and rows of the position
# table, where no gradient comes: weight decay alone moves them there, and here nothing does.
PAPER = (
    "encoder.image",
    "encoder.positions.image",
    "encoder.layers.*.norm",
    "encoder.layers.*.attention",
    "encoder.layers.*.gamma",
    "encoder.layers.*.experts.image",
)
# All that images go through stays as the stage of images left it, to the bit.
RECOMMENDED = (*PAPER, "encoder.norm")


def start(
    model: nn.Module, state: Mapping[str, Tensor], name: str, starts: Mapping[str, str], source: tuple[int, int] | None
) -> LoadReport:
    """Loads ``state`` into ``model``.

    Args:
        name: of the weights, for messages.
        starts: expert -> where it starts: in the "weights", at "random", or as a copy of another expert of the same layer.
        source: (h, w) patches that the weights are of; None = square.

    Raises:
        UserError: if the weights lack an expert, or anything else that is not declared new, or are of other sizes.
    """
    own, state, new, copied, replaced = model.state_dict(), dict(state), list(HEADS), [], []
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
    if (
        kinds in state and kinds in own and len(state[kinds]) < len(own[kinds])
    ):  # as published: further ones like the last
        last = state[kinds][-1:].expand(len(own[kinds]) - len(state[kinds]), -1)
        state[kinds] = nn.functional.pad(state[kinds], (0, 0, 0, len(last)))
        state[kinds][-len(last) :] = last
    grids = {}
    if model.image is not None:
        grid = model.encoder.grid
        grids = {"encoder.image.positions": Grid(grid, 1, source), "encoder.positions.image": TableGrid(grid, source)}
    report = reading.load(model, state, new=new, ignored=_absent(own, state), grids=grids)
    return replace(report, copied=tuple(copied), replaced=tuple(replaced))


def grid_of_run(folder: str) -> tuple[int, int]:
    """(h, w) patches of the images of a run.

    Raises:
        UserError: if it is not a run of a VLMo.
    """
    encoder = getattr(run_spec(folder), "encoder", None)
    if encoder is None:
        raise UserError(f"the run {folder} is of another model than VLMo; name one of a VLMo as model.weights")
    return encoder.grid


CURES = {
    "image": "choose weights that have image experts",
    "text": "choose weights that have text experts, or set model.text_start=image",
    "vl": "choose weights that have them, or set model.vl_start to random, text or image",
}


def _absent(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> set[str]:
    """Whole parts and experts that the model is built without."""
    experts = {found[0].removesuffix(".") for key in state if (found := EXPERT.match(key))}
    tables = {f"encoder.positions.{part}" for part in ("image", "text", "cross")}
    return {part for part in {*PARTS, *tables, *experts} if not any(f"{key}.".startswith(f"{part}.") for key in own)}
