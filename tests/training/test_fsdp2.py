"""Which weights FSDP2 and ZeRO-3 gather for the passes of their block only."""

from torch import nn

from vlp.models.dual import Dual
from vlp.models.vlmo import Vlmo
from vlp.testing import ALBEF, IMAGE, MOME, TEXT
from vlp.training.engines import repeated_blocks


def names(model: nn.Module) -> list[str]:
    of = {module: name for name, module in model.named_modules()}
    return [of[block] for block in repeated_blocks(model)]


def test_blocks_of_towers_are_found_and_lists_without_repetition_are_not():
    dual = Dual(IMAGE, TEXT, projection="both", embed_size=16).build(load_weights=False)
    # BERT has a single layer here
    assert names(dual) == [f"image.model.blocks.{n}" for n in range(len(dual.image.model.blocks))]
    vlmo = Vlmo(MOME, embed_size=16).build(load_weights=False)
    assert names(vlmo)[:2] == ["encoder.layers.0", "encoder.layers.1"]


def test_blocks_without_a_forward_pass_stay_with_the_rest():
    """The layers of fusion are run by other methods."""
    albef = ALBEF.build(load_weights=False)
    assert not any(name.startswith("fusion") for name in names(albef))


def test_blocks_that_share_a_parameter_stay_with_the_rest():
    first, second, third = (nn.Linear(3, 3) for _ in range(3))
    assert names(nn.Sequential(first, second, third)) == ["0", "1", "2"]
    third.weight = first.weight
    assert names(nn.Sequential(first, second, third)) == ["1"]
