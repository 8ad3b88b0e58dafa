"""Transformer layers on the grid of another tower: shapes, positions, freezing, layers, weights of a run."""

from dataclasses import replace

import pytest
import torch

from vlp.encoders.conv import ConvImage
from vlp.encoders.hybrid import HybridImage
from vlp.encoders.image import TimmImage
from vlp.errors import UserError
from vlp.specs.json import from_plain, to_plain

SMALL = ConvImage(channels=(8, 16), strides=(4, 2), image_size=32)
BASES = {
    "convolutions": SMALL,
    "timm CNN": TimmImage("test_resnet", image_size=96),
    "ViT": TimmImage("test_vit", image_size=160),
}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_tokens_are_the_grid_of_the_base_after_its_mean(base):
    tower = HybridImage(base, width=16, layers=2).build().eval()
    tokens = tower(torch.randn(2, 3, *tower.preprocess.size))
    height, width = tower.grid
    assert tokens.shape == (2, 1 + height * width, 16)
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1))


def test_pooled_token_depends_on_where_things_are():
    torch.manual_seed(0)
    tower = HybridImage(SMALL, width=16).build().eval()
    image = torch.randn(1, 3, 32, 32)
    cells = tower.base(image)
    tower.base = torch.nn.Identity()
    permuted = torch.cat([cells[:, :1], cells[:, 1:][:, torch.randperm(16)]], 1)
    change = (tower(permuted)[:, 0] - tower(cells)[:, 0]).norm() / tower(cells)[:, 0].norm()
    assert change > 1e-3
    with torch.no_grad():
        tower.positions.zero_()
    torch.testing.assert_close(tower(permuted)[:, 0], tower(cells)[:, 0])


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_layers_of_the_base_come_before_its_own(base):
    tower = HybridImage(base, width=16, layers=2).build()
    depths = tower.layer_ids()
    assert set(depths) == {name for name, _ in tower.named_parameters()}
    below = max(depth for name, depth in depths.items() if name.startswith("base."))
    first, last, norm = (
        depths[name] for name in ("blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight", "norm.weight")
    )
    assert (depths["positions"], first, last, norm) == (below + 1, below + 2, below + 3, below + 4)


def test_spec_survives_json():
    spec = HybridImage(SMALL, width=16).resolved()
    assert from_plain(to_plain(spec)) == spec
    assert spec.base.image_size == (32, 32)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="set heads to a divisor"):
        HybridImage(SMALL, width=18).build()


def test_a_base_without_a_grid_is_refused():
    class Pooled(ConvImage):
        def build(self, load_weights=True):
            tower = super().build(load_weights)
            tower.grid = None
            return tower

    with pytest.raises(UserError, match="no grid of tokens"):
        HybridImage(Pooled(**{**vars(SMALL)})).build()


def test_weights_that_are_not_a_run_are_one_line():
    for spec in (replace(SMALL, weights="nowhere"), HybridImage(SMALL, weights="nowhere")):
        with pytest.raises(UserError):
            spec.build()
