import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn import functional as F

from vlp.encoders.image import TimmImage
from vlp.encoders.open_clip import OpenClip
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.models.dual import Dual

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = BertText(config=SIZES | {"model_type": "bert", "vocab_size": 99, "max_position_embeddings": 40}, length_groups=2)
ALIGN = Dual(image=TimmImage("tf_efficientnet_lite0", image_size=32), text=TEXT)
CLIP = Dual(
    image=TimmImage("test_vit", image_size=32),
    text=TEXT,
    projection="both",
    embed_size=24,
    temperature=0.07,
    temperature_form="logit_scale",
)


def inputs(batch=4):
    torch.manual_seed(1)
    mask = torch.arange(9) < torch.tensor([9, 4, 2, 4])[:batch, None]
    return torch.randn(batch, 3, 32, 32), torch.randint(5, 99, mask.shape).masked_fill(~mask, 0), mask


def test_align_projects_text_linearly_to_the_image_width_and_leaves_the_image():
    model = ALIGN.build().eval()
    image, ids, mask = inputs()
    seen, read = model.encode_image(image), model.encode_text(ids, mask)
    torch.testing.assert_close(seen.embed, F.normalize(model.image(image)[:, 0], dim=-1))
    projected = model.text(ids, mask)[:, 0] @ model.text_projection.weight.T + model.text_projection.bias
    torch.testing.assert_close(read.embed, F.normalize(projected, dim=-1))
    assert seen.tokens.shape == (4, 2, 320) and seen.mask.shape == (4, 2) and seen.mask.all()
    assert read.tokens.shape == (4, 9, 48) and torch.equal(read.mask, mask)
    assert model.embed_size == 320 and list(model.image_projection.parameters()) == []


def test_clip_projects_both_without_bias():
    model = CLIP.build().eval()
    image, ids, mask = inputs()
    for encoded, tower, projection in (
        (model.encode_image(image), model.image(image), model.image_projection),
        (model.encode_text(ids, mask), model.text(ids, mask), model.text_projection),
    ):
        assert projection.bias is None
        torch.testing.assert_close(encoded.embed, F.normalize(tower[:, 0] @ projection.weight.T, dim=-1))
        assert encoded.embed.shape == (4, 24)


@pytest.mark.parametrize("spec", [ALIGN, CLIP])
def test_all_parameters_learn_from_the_similarities(spec):
    model = replace(spec, bias=-10.0).build()
    image, ids, mask = inputs()
    logits = model.encode_image(image).embed @ model.encode_text(ids, mask).embed.T * model.scale + model.bias
    F.cross_entropy(logits, torch.arange(4)).backward()
    # the softmax is blind to a common bias, so that its gradient is zero, but there
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_embeddings_are_unit_float32_under_autocast():
    model = CLIP.build()
    image, ids, mask = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        for encoded in (model.encode_image(image), model.encode_text(ids, mask)):
            assert encoded.embed.dtype == torch.float32
            torch.testing.assert_close(encoded.embed.norm(dim=1), torch.ones(4))


def test_scale_is_the_inverse_of_either_form_and_scalars_are_not_0_dimensional():
    divided = replace(ALIGN, temperature=0.25).build()
    logged = replace(ALIGN, temperature=0.25, temperature_form="logit_scale", bias=-10.0).build()
    assert divided.scale.tolist() == [4.0] and divided.bias is None
    assert logged.scale.tolist() == pytest.approx([4.0]) and logged.bias.tolist() == [-10.0]
    assert logged.logit_scale.tolist() == pytest.approx([math.log(4)])
    assert {p.ndim for model in (divided, logged) for p in model.parameters()}.isdisjoint({0})
    assert not hasattr(divided, "logit_scale") and not hasattr(logged, "temperature")


@pytest.mark.parametrize("form", ["temperature", "logit_scale"])
def test_scale_is_clamped_to_its_bounds_and_can_come_back(form):
    model = replace(ALIGN, temperature_form=form, temperature_min=0.01, temperature_max=0.5).build()
    learned = model.get_parameter(form)
    for temperature, scale in ((0.001, 100.0), (0.01, 100.0), (0.02, 50.0), (0.5, 2.0), (3.0, 2.0)):
        with torch.no_grad():
            learned.fill_(temperature if form == "temperature" else -math.log(temperature))
        before = learned.clone()
        assert model.scale.item() == pytest.approx(scale, rel=1e-5)
        (gradient,) = torch.autograd.grad(model.scale.sum(), learned)
        expected = -(scale**2) if form == "temperature" else scale
        assert gradient.item() == pytest.approx(expected, rel=1e-4)  # of the value at the bound, never 0
        assert torch.equal(learned, before)  # reading changes nothing
    model.clamp_scalars()
    assert model.scale.item() == pytest.approx(2.0)
    assert learned.item() == pytest.approx(0.5 if form == "temperature" else math.log(2))


def test_default_bound_is_a_scale_of_100_and_none_is_unbounded():
    cold = replace(CLIP, temperature=0.001)
    assert cold.build().scale.item() == pytest.approx(100, rel=1e-5)
    assert replace(cold, temperature_min=None).build().scale.item() == pytest.approx(1000, rel=1e-5)


@pytest.mark.parametrize(
    "spec, message",
    [
        (replace(ALIGN, projection="none"), "320 wide, the text tower 48"),
        (replace(ALIGN, embed_size=99), "embed_size 99"),
        (Dual(image=ALIGN.image), "not image"),
        (Dual(), "not none"),
        (replace(ALIGN, towers=OpenClip("ViT-B-32")), "only towers"),
        (Dual(towers=OpenClip("ViT-B-32")), "projection='none'"),
        (replace(ALIGN, temperature=0.0), "above 0"),
        (replace(ALIGN, temperature=None), "set a number"),
        (replace(ALIGN, text=replace(TEXT, pool="max")), "cls or mean"),
    ],
)
def test_incompatible_settings_are_refused_in_one_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        spec.build()
    assert "\n" not in str(error.value)


def test_resolved_spec_survives_json_and_rebuilds_the_model():
    read = json.loads(json.dumps(asdict(ALIGN.resolved())))
    read |= {"image": TimmImage(**read["image"]), "text": BertText(**read["text"])}
    model, again = ALIGN.build(), Dual(**read).build(load_weights=False)
    again.load_state_dict(model.state_dict())
    image, ids, mask = inputs()
    assert again.preprocess == model.preprocess
    torch.testing.assert_close(again.eval().encode_image(image).embed, model.eval().encode_image(image).embed)
    torch.testing.assert_close(again.encode_text(ids, mask).embed, model.encode_text(ids, mask).embed)


def test_layer_ids_of_the_towers_end_together_below_the_projections():
    model = CLIP.build()  # 6 blocks in the image tower, 3 in the text tower
    ids = model.layer_ids()
    assert set(ids) == {name for name, _ in model.named_parameters()}
    assert ids["image.model.pos_embed"] == 0 and ids["text.model.embeddings.word_embeddings.weight"] == 3
    assert [ids[f"text.model.encoder.layer.{i}.output.dense.weight"] for i in range(3)] == [4, 5, 6]
    assert ids["image.model.blocks.5.norm1.weight"] == 6
    heads = {ids[name] for name in ("image_projection.weight", "text_projection.weight", "logit_scale")}
    assert heads == {7}


def test_scalars_and_positions_have_no_weight_decay():
    model = replace(CLIP, bias=-10.0).build()
    assert model.no_weight_decay() == {
        *("logit_scale", "logit_bias", "image.model.cls_token", "image.model.pos_embed"),
        *("text.model.embeddings.position_embeddings.weight", "text.model.embeddings.token_type_embeddings.weight"),
    }


def test_activation_checkpointing_covers_both_towers():
    model = CLIP.build()
    calls = []
    model.image.model.blocks[0].norm1.register_forward_pre_hook(lambda *_: calls.append("image"))
    model.text.model.encoder.layer[0].attention.register_forward_pre_hook(lambda *_: calls.append("text"))
    image, ids, mask = inputs()
    model.set_activation_checkpointing("full")
    (model.encode_image(image).embed * model.encode_text(ids, mask).embed).sum().backward()
    assert sorted(calls) == ["image"] * 2 + ["text"] * 4  # text: two groups


def test_rows_do_not_depend_on_the_other_rows_of_the_batch():
    model = ALIGN.build().eval()
    _, ids, mask = inputs()
    together = model.encode_text(ids, mask).embed
    alone = torch.cat([model.encode_text(ids[i : i + 1], mask[i : i + 1]).embed for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
