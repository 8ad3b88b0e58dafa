"""Which weights FSDP2 gathers for the passes of their block only, and ZeRO-3, which is refused."""

from types import SimpleNamespace

import pytest
from torch import nn

from vlp.config import Training
from vlp.errors import UserError
from vlp.models.dual import Dual
from vlp.models.vlmo import Vlmo
from vlp.testing import ALBEF, IMAGE, MOME, TEXT
from vlp.training.engines import Zero, repeated_blocks


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


def test_zero_stage_3_is_refused_with_the_engine_that_shards_the_same():
    plugin = SimpleNamespace(zero_stage=3)
    engine = Zero(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))
    with pytest.raises(UserError, match="ZeRO stage 3 is not supported.*fsdp2"):
        engine.configure(Training(), 8)
