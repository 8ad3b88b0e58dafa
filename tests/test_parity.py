"""Our objectives equal the published implementations on the same weights and inputs: value, and gradient of every weight."""

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import nn
from torch.nn import functional as F
from transformers import AlignConfig, AlignModel

from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.forward import Forward
from vlp.models.dual import Dual
from vlp.objectives.itc import ImageTextContrast, SigmoidContrast
from vlp.types import Batch, Encoded

ROWS, VOCABULARY = 6, 60
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SIZES |= {"vocab_size": VOCABULARY, "max_position_embeddings": 16}


def batch(image_size: int) -> Batch:
    torch.manual_seed(3)
    mask = torch.arange(9) < torch.tensor([9, 4, 2, 4, 7, 5])[:, None]
    ids = torch.randint(1, VOCABULARY, mask.shape).masked_fill(~mask, 0)
    return Batch(torch.arange(ROWS), torch.randn(ROWS, 3, image_size, image_size), ids, mask)


class OfTransformers(nn.Module):
    """transformers' AlignModel behind the two methods that our objectives call."""

    def __init__(self, align: AlignModel):
        super().__init__()
        self.align = align

    @property
    def scale(self):
        return 1 / self.align.temperature

    def _encoded(self, tokens: torch.Tensor, pooled: torch.Tensor) -> Encoded:
        return Encoded(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), F.normalize(pooled, dim=-1))

    def encode_image(self, image: torch.Tensor) -> Encoded:
        pooled = self.align.vision_model(pixel_values=image).pooler_output
        return self._encoded(pooled[:, None], pooled)

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Encoded:
        tokens = self.align.text_model(input_ids=input_ids, attention_mask=attention_mask.long()).last_hidden_state
        return self._encoded(tokens, self.align.text_projection(tokens[:, 0]))


@pytest.fixture(scope="module")
def align() -> AlignModel:
    vision = {"image_size": 64, "width_coefficient": 0.2, "depth_coefficient": 0.3, "hidden_dim": 64}
    config = AlignConfig(text_config=SIZES, vision_config=vision, projection_dim=64, temperature_init_value=0.2)
    torch.manual_seed(0)
    model = AlignModel(config).eval()
    for parameter in model.parameters():  # its initialisation leaves the projection near zero
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def gradients(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {n: g for (n, _), g in zip(model.named_parameters(), found) if g is not None}


def assert_gradients_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("reduction, factor", [("mean", 1), ("sum", 2)])
def test_align_is_transformers_align(align, reduction, factor):
    """Theirs is the mean of both directions; the paper's eq. 1 and 2 are summed."""
    given = batch(64)
    theirs = align(
        input_ids=given.input_ids,
        attention_mask=given.attention_mask.long(),
        pixel_values=given.image,
        return_loss=True,
    )
    assert theirs.loss > 0.5 and theirs.logits_per_text.std() > 0.1  # not a comparison of zeros
    ours = ImageTextContrast(label_smoothing=0.1, reduction=reduction)(Forward(OfTransformers(align), given))
    torch.testing.assert_close(ours, factor * theirs.loss, rtol=0, atol=1e-6)
    expected = {f"align.{n}": factor * g for n, g in gradients(theirs.loss, align).items()}
    model = OfTransformers(align)
    ours = ImageTextContrast(label_smoothing=0.1, reduction=reduction)(Forward(model, given))
    assert "align.temperature" in expected
    assert_gradients_equal(gradients(ours, model), expected)


def test_our_text_side_with_their_weights_gives_their_embeddings(align):
    spec = Dual(
        image=TimmImage("test_vit", image_size=32),
        text=BertText(config=SIZES | {"model_type": "bert"}),
        temperature=align.temperature.item(),
    )
    model, given = spec.build().eval(), batch(32)
    model.text.model.load_state_dict(
        {k: v for k, v in align.text_model.state_dict().items() if not k.startswith("pooler")}, strict=True
    )
    model.text_projection = align.text_projection
    ours = model.encode_text(given.input_ids, given.attention_mask).embed
    theirs = OfTransformers(align).encode_text(given.input_ids, given.attention_mask).embed
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def dual(**more) -> nn.Module:
    torch.manual_seed(0)
    text = BertText(config=SIZES | {"model_type": "bert"}, dropout=0.0)
    spec = Dual(image=TimmImage("test_vit", image_size=32), text=text, projection="both", embed_size=24, **more)
    return spec.build()


@pytest.mark.parametrize("tile_rows", [None, 4])
def test_clip_is_open_clips(tile_rows):
    model, given = dual(temperature=0.07, temperature_form="logit_scale"), batch(32)
    f = Forward(model, given)
    ours = ImageTextContrast(tile_rows=tile_rows)(f)
    again = Forward(model, given)
    theirs = ClipLoss()(again.image.embed, again.text.embed, model.scale)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert_gradients_equal(gradients(ours, model), gradients(theirs, model))


@pytest.mark.parametrize("tile_rows", [None, 4])
def test_siglip_is_open_clips(tile_rows):
    model, given = dual(temperature=0.1, temperature_form="logit_scale", bias=-3.0), batch(32)
    ours = SigmoidContrast(tile_rows=tile_rows)(Forward(model, given))
    f = Forward(model, given)
    theirs = SigLipLoss()(f.image.embed, f.text.embed, model.scale, model.bias)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert_gradients_equal(gradients(ours, model), gradients(theirs, model))
