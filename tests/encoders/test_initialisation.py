"""Random weights suit the width, and the tokens of a CNN have positions."""

from dataclasses import replace

import pytest
import torch

from vlp.encoders.fusion import Fusion, ImageTokens
from vlp.encoders.image import TimmImage
from vlp.encoders.initialisation import init_std
from vlp.encoders.text import BertText
from vlp.models.albef import Albef
from vlp.specs.json import from_plain, to_plain


def change_by_image(width: int, init: str) -> float:
    """Return how much another image changes the fused first states, relative to their size."""
    torch.manual_seed(0)
    spec = Fusion(layers=2, heads=4, hidden_size=4 * width, dropout=0.0, eps=1e-12, init=init)
    fusion = spec.build(width, width, load_weights=False).eval()
    texts, mask = torch.randn(32, 8, width), torch.ones(32, 8, dtype=torch.bool)
    with torch.no_grad():
        one, other = (fusion(texts, mask, ImageTokens(torch.randn(32, 16, width)), at="first") for _ in range(2))
    return ((one - other).norm(dim=1) / one.norm(dim=1)).mean().item()


@pytest.mark.parametrize("width", [64, 128, 384])
def test_another_image_changes_fused_states_as_much_as_at_width_768(width):
    reference = change_by_image(768, "width")
    assert reference / 2 < change_by_image(width, "width") < reference * 2
    if width < 384:
        assert change_by_image(width, "published") < reference / 2


def test_both_rules_agree_at_the_published_width():
    assert init_std("width", 768) == init_std("published", 768) == 0.02


def test_random_text_tower_follows_the_rule():
    sizes = {"model_type": "bert", "vocab_size": 200, "hidden_size": 64, "num_attention_heads": 4}
    text = BertText(config={**sizes, "num_hidden_layers": 1, "intermediate_size": 256}, init="width")
    std = text.build().get_input_embeddings().weight.std().item()
    assert std == pytest.approx(init_std("width", 64), rel=0.1)


def small(**fields) -> Albef:
    sizes = {"model_type": "bert", "vocab_size": 200, "hidden_size": 64, "num_attention_heads": 4}
    text = BertText(config={**sizes, "num_hidden_layers": 1, "intermediate_size": 256}, dropout=0.0)
    return Albef(TimmImage("test_resnet", image_size=96), text, Fusion(layers=1, init="width"), mlm=False, **fields)


@pytest.mark.parametrize("positions", ["none", "sine", "learned"])
def test_permuted_grid_changes_logits_unless_it_has_no_positions(positions):
    torch.manual_seed(0)
    model = small(grid_positions=positions).build().eval()
    ids, mask = torch.randint(5, 200, (4, 6)), torch.ones(4, 6, dtype=torch.bool)
    grid = model.image(torch.randn(4, 3, 96, 96))[:, 1:]
    cells = torch.randperm(grid.shape[1])

    def logits(cells: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat([grid.mean(1, keepdim=True), grid[:, cells]], 1)
        model.image.forward = lambda image: tokens
        return model.match(model.project(model.encode_image(torch.zeros(4))), model.encode_text(ids, mask))

    with torch.no_grad():
        difference = (logits(cells) - logits(torch.arange(len(cells)))).abs().max()
    assert difference < 1e-5 if positions == "none" else difference > 1e-5


def test_a_vit_gets_no_second_positions():
    spec = small()
    model = replace(spec, image=TimmImage("test_vit", image_size=96)).build()
    assert model.grid_positions is None and small().build().grid_positions is not None


def test_an_experiment_from_before_the_field_has_no_positions():
    plain = to_plain(small())
    assert from_plain(plain).grid_positions == "sine"
    del plain["grid_positions"]
    assert from_plain(plain).grid_positions == "none"
