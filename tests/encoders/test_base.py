"""A tower that defines only the required members works in every model, and raises UserError for the rest."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from vlp.config import Data, Experiment
from vlp.data.preprocess import Preprocess
from vlp.data.reading.shards import Source
from vlp.encoders.base import ImageTower, ImageTowerSpec, TextTower, TextTowerSpec
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.models.albef import Albef
from vlp.models.dual import Dual
from vlp.models.single import Single
from vlp.specs.types import check_types

BERT = BertText(config={"model_type": "bert", "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1,
                        "num_attention_heads": 2, "intermediate_size": 16})  # fmt: skip
VIT = TimmImage("test_vit", image_size=32)


class MeanColour(ImageTower):
    """The mean colour of the image, and that of its two halves."""

    def __init__(self, width):
        super().__init__()
        self.width, self.preprocess = width, Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3, "bilinear")
        self.linear = nn.Linear(3, width)

    def forward(self, image):
        halves = self.linear(image.unflatten(3, (2, 4)).mean((2, 4)).mT)  # (B, 2, D)
        return torch.cat([halves.mean(1, keepdim=True), halves], 1)


@dataclass(frozen=True)
class Colour(ImageTowerSpec):
    width: int = 6

    def build(self, load_weights=True):
        return MeanColour(self.width)


class FirstWord(TextTower):
    def __init__(self, width):
        super().__init__()
        self.width, self.vocab_size, self.max_length = width, 50, 9
        self.words = nn.Linear(50, width)

    def forward(self, input_ids, attention_mask):
        return self.words(nn.functional.one_hot(input_ids, 50).float())


@dataclass(frozen=True)
class Words(TextTowerSpec):
    width: int = 6

    def build(self, load_weights=True):
        return FirstWord(self.width)


def experiment(model):
    return Experiment("x", model, {}, Data(train=(Source("x"),)))


@pytest.mark.parametrize(
    "spec",
    [
        Dual(image=Colour(), text=Words(), projection="none"),
        Dual(image=VIT, text=Words(), projection="both", embed_size=8),
        Albef(image=Colour(), text=BERT, fusion=Fusion(layers=1), embed_size=8),
        Albef(image=VIT, text=Words(), fusion=Fusion(layers=1, heads=2, hidden_size=8), mlm=False, embed_size=8),
    ],
)
def test_models_take_towers_that_define_only_the_required_members(spec):
    check_types(experiment(spec))
    model = spec.resolved().build()
    size = model.preprocess.size
    image = model.encode_image(torch.randn(2, 3, *size))
    text = model.encode_text(torch.randint(5, 50, (2, 4)), torch.ones(2, 4, dtype=torch.bool))
    assert image.embed.shape == text.embed.shape
    if isinstance(spec, Albef):
        assert model.match(model.project(image), text).shape == (2, 2)
    names = {name for name, _ in model.named_parameters()}
    assert model.layer_ids().keys() == names and model.no_weight_decay() <= names


@pytest.mark.parametrize("spec", [Single(image=Colour(), head="mlp"), Single(text=Words(), classes=2)])
def test_single_tower_takes_them_too(spec):
    check_types(experiment(spec))
    model = spec.resolved().build()
    assert set(model.layer_ids()) == {name for name, _ in model.named_parameters()}
    assert model.reports == {"image" if spec.image else "text": None}


def test_default_depth_is_one_layer_and_nothing_is_exempt_from_weight_decay():
    tower = MeanColour(4)
    assert tower.layer_ids() == {"linear.weight": 0, "linear.bias": 0}
    assert tower.no_weight_decay() == set() and tower.position_grids() == {} and tower.report is None


def test_unsupported_member_of_a_tower_is_a_user_error():
    image, text = MeanColour(4), FirstWord(4)
    ids, mask = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool)
    image.set_activation_checkpointing("none")
    for call, message in (
        (lambda: image.set_activation_checkpointing("full"), "MeanColour cannot checkpoint activations"),
        (lambda: image.forward_masked(torch.randn(1, 3, 8, 8), None, None), "choose a ViT"),
        (lambda: text.forward_cutoff(ids, mask, mask[..., None]), "choose BertText"),
        (lambda: Single(text=Words(), mlm=True).build(), "FirstWord has no word embeddings"),
        (lambda: Albef(image=VIT, text=Words()).resolved(), r"text tower \(Words\) has no heads and hidden_size"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_spec_of_the_other_modality_is_refused():
    with pytest.raises(UserError, match="model.text is Colour.*it takes TextTowerSpec"):
        check_types(experiment(Dual(image=VIT, text=Colour())))
