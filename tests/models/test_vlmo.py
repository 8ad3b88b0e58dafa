"""VLMo equals its passes computed one by one. tests/objectives/test_vlmo_processes.py compares two processes with one."""

from dataclasses import replace

import pytest
import torch

from tests.objectives.fusing import (
    CACHED,
    ROWS,
    WIDTH,
    assert_same,
    context_of,
    drawn_by_row,
    networks,
    pairs,
    step,
)
from tests.vlmo_reference import reference_step
from vlp.encoders.mome import SMALL
from vlp.encoders.patch_targets import Pixels
from vlp.errors import UserError
from vlp.forward import Forward, StepContext
from vlp.losses.masked import IGNORED
from vlp.models.vlmo import Vlmo
from vlp.objectives.itc import ImageTextContrast, MomentumContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.mim import MaskedImage
from vlp.objectives.mlm import MaskedText
from vlp.optim.groups import parameter_groups
from vlp.train import Pretrainer
from vlp.types import Batch

ENCODER = replace(
    SMALL, width=32, layers=3, heads=2, vl_from=2, vocab_size=99, image_size=32, max_text_length=12, layer_scale=0.5
)
SPEC = Vlmo(ENCODER, embed_size=WIDTH)
OBJECTIVES = {
    "itc": ImageTextContrast(weight=0.5),
    "itc_vl": ImageTextContrast(weight=0.5, head="vl"),
    "itm": ImageTextMatching(keys="student", candidates="global"),
    "mlm": MaskedText(weight=0.25),
}


def randomised(spec=SPEC, seed=0):
    """Build a model without tensors of zeros or ones, so that every position and scale has an effect."""
    torch.manual_seed(seed)
    model = spec.build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def apart():
    batch = pairs()
    batch.image_id = torch.arange(ROWS)
    return batch


# --- losses of a step -----------------------------------------------------------------------------------------


def test_losses_and_gradients_equal_the_published_passes_one_by_one():
    batch, model, slow = apart(), randomised(), randomised()
    with drawn_by_row():
        losses, total, (f,) = Pretrainer(model, OBJECTIVES)([batch], None, StepContext())
        masked = f.masked(OBJECTIVES["mlm"].masking)
    total.backward()
    labels = torch.full_like(batch.input_ids, IGNORED)
    labels.view(-1)[masked.positions] = masked.labels
    expected = reference_step(slow, batch, masked.input_ids, labels, pick=lambda weights: weights.argmax())
    sum(OBJECTIVES[name].weight * loss for name, loss in expected.items()).backward()
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name].double(), loss.double(), rtol=1e-6, atol=0)
    for (name, found), wanted in zip(model.named_parameters(), slow.parameters()):
        assert (found.grad - wanted.grad).norm() <= 1e-5 * wanted.grad.norm(), (
            name
        )  # the reference's scores are float32


@pytest.mark.parametrize("how", ["cheap", "full"])
def test_activation_checkpointing_changes_no_result(how):
    spec = replace(SPEC, encoder=replace(ENCODER, drop_path=0.4, text_dropout=0.2))
    gradients = []
    for each in ("none", how):
        model = randomised(spec).train()
        model.set_activation_checkpointing(each)
        torch.manual_seed(3)
        with drawn_by_row():
            Pretrainer(model, OBJECTIVES)([apart()], None, StepContext())[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_rows_do_not_depend_on_padding_or_other_rows(positions):
    model = randomised(replace(SPEC, encoder=replace(ENCODER, positions=positions))).eval()
    batch = apart()
    text, image = model.encode_text(batch.input_ids, batch.attention_mask), model.encode_image(batch.image)
    logits = model.match(model.project(image), text)
    for row in range(ROWS):
        length = int(batch.attention_mask[row].sum())
        alone = model.encode_text(batch.input_ids[row : row + 1, :length], torch.ones(1, length, dtype=torch.bool))
        seen = model.encode_image(batch.image[row : row + 1])
        torch.testing.assert_close(alone.embed[0], text.embed[row])
        torch.testing.assert_close(alone.vl.embed[0], text.vl.embed[row])
        torch.testing.assert_close(model.match(model.project(seen), alone)[0], logits[row])


def test_pairs_take_images_in_order_and_then_the_given_ones():
    model, batch = randomised().eval(), apart()
    text, image = model.encode_text(batch.input_ids, batch.attention_mask), model.encode_image(batch.image)
    projected = model.project(image)
    texts, images = torch.cat([torch.arange(ROWS), torch.tensor([5, 2])]), torch.tensor([7, 0])
    found = model.match(projected, text, texts, images)
    torch.testing.assert_close(found[:ROWS], model.match(projected, text))
    torch.testing.assert_close(found[ROWS:], model.match(projected[images], text[torch.tensor([5, 2])]))
    with pytest.raises(ValueError, match="give a multiple"):
        model.match(projected, text, torch.arange(3))


# --- the gradient over micro-batches ------------------------------------------------------


def test_gradient_caching_equals_one_batch():
    assert_same(step(0, 1, OBJECTIVES, SPEC, CACHED, 4), step(0, 1, OBJECTIVES, SPEC))


# --- unused parts are not built ---------------------------------------------------------------------------------------------

CONTRAST = {name: OBJECTIVES[name] for name in ("itc", "itc_vl")}
NOTHING = {"itc": False, "itc_vl": False, "itm": False, "mlm": False}
USES = {
    "all": (SPEC, OBJECTIVES),
    "contrast": (replace(SPEC, itm=False, mlm=False), CONTRAST),
    "first head": (replace(SPEC, itc_vl=False, itm=False, mlm=False, encoder=replace(ENCODER, experts=("image", "text"))),
                   {"itc": OBJECTIVES["itc"]}),
    "matching": (replace(SPEC, **NOTHING | {"itm": True}), {"itm": ImageTextMatching(negatives="uniform")}),
    "words": (replace(SPEC, **NOTHING | {"mlm": True}), {"mlm": MaskedText()}),
    "words, tied": (replace(SPEC, **NOTHING | {"mlm": True}, tie_words=True), {"mlm": MaskedText()}),
    "words and patches": (replace(SPEC, **NOTHING | {"mlm": True}, mim=Pixels()),
                          {"mlm": MaskedText(), "mim": MaskedImage(min_patches=1)}),
    "patches": (replace(SPEC, **NOTHING, mim=Pixels(), encoder=replace(ENCODER, experts=("image",))),
                {"mim": MaskedImage(min_patches=1)}),
    "texts": (replace(SPEC, **NOTHING | {"mlm": True}, encoder=replace(ENCODER, experts=("text",))), {"mlm": MaskedText()}),
    "absolute positions": (replace(SPEC, encoder=replace(ENCODER, positions="absolute", layer_scale=None)), OBJECTIVES),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_every_parameter_has_a_gradient(use):
    spec, objectives = USES[use]
    model, batch = randomised(spec), apart()
    if use == "texts":
        batch.image = None
    with drawn_by_row():
        Pretrainer(model, objectives)([batch], None, StepContext())[1].backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []


def test_model_that_only_fuses_does_not_encode_single_modalities():
    spec, objectives = USES["matching"]
    model, ran = randomised(spec), []
    for layer in model.encoder.layers:
        layer.register_forward_pre_hook(lambda module, given: ran.append(given[1]))
    with drawn_by_row():
        Pretrainer(model, objectives)([apart()], None, StepContext())
    assert len(ran) == 3 and all(rows.width and rows.patches for rows in ran)


# --- heads --------------------------------------------------------------------------------------------------------


def test_classifier_fuses_the_text_with_each_image():
    encoder = replace(ENCODER, image_kinds=2)
    model = randomised(replace(SPEC, **NOTHING, classes=5, images=2, encoder=encoder)).eval()
    batch = apart()
    second = Batch(batch.image_id, batch.image.flip(0))
    both = replace(batch, views=(second,))
    logits = model.classify(Forward(model, both))
    assert logits.shape == (ROWS, 5)
    text = model.encode_text(batch.input_ids, batch.attention_mask)
    pooled = [
        model.pooler(model.fuse(model.encoder.image(b.image, kind), text)) for kind, b in enumerate((batch, second))
    ]
    torch.testing.assert_close(logits, model.classifier(torch.cat(pooled, 1)))
    assert not torch.allclose(model.encoder.image(batch.image, 0), model.encoder.image(batch.image, 1))
    with pytest.raises(UserError, match="reads 2 images of each sample; the data has 1"):
        model.classify(Forward(model, batch))


def test_temperatures_stay_within_their_bounds():
    model = replace(SPEC, temperature=0.02, temperature_min=0.01).build()
    with torch.no_grad():
        model.itc.logit_scale.fill_(9.0)
        model.vl.logit_scale.fill_(9.0)
    assert model.scalars() == pytest.approx({"temperature": 0.01, "temperature_vl": 0.01})
    model.clamp_scalars()
    assert float(model.vl.logit_scale.exp()) == pytest.approx(100, rel=1e-5)


def test_only_weights_have_weight_decay():
    model = SPEC.build()
    groups = parameter_groups(model, 0.01)
    decayed = {name for group in groups if group["decayed"] for name in group["names"]}
    named = ("norm", "bias", "gamma", "kind", "cls_token", "positions", "token_types", "logit_scale")
    assert decayed and not [name for name in decayed if any(part in name for part in named)]
    rest = {name for group in groups if not group["decayed"] for name in group["names"]}
    assert all(any(part in name for part in named) for name in rest)


def test_layer_ids_grow_from_the_embeddings_to_the_heads():
    ids = SPEC.build().layer_ids()
    assert ids.keys() == dict(SPEC.build().named_parameters()).keys()
    names = ("encoder.text.words.weight", "encoder.layers.0.norm.weight", "encoder.layers.2.gamma_1", "encoder.norm.bias", "itm.weight")  # fmt: skip
    assert [ids[name] for name in names] == [0, 1, 3, 4, 5]
    assert ids["encoder.positions.image"] == 0


# --- refused settings -----------------------------------------------------------------------------------------------

REFUSED = {
    "image_size 40 x 40 is not a multiple of patch_size 16": {"encoder": replace(ENCODER, image_size=40)},
    "heads do not divide the width": {"encoder": replace(ENCODER, heads=5)},
    "vl_from is 3; with 3 layers it is 0 to 2": {"encoder": replace(ENCODER, vl_from=3)},
    "the vl expert needs image and text": {
        "encoder": replace(ENCODER, experts=("text", "vl")),
        "itc": False,
        "itc_vl": False,
    },
    "model.itc with the experts image needs other experts; set model.itc to false": {
        "encoder": replace(ENCODER, experts=("image",))
    },
    "needs model.itc": {"itc": False},
    "set encoder.image_kinds to as many": {"images": 2},
    "temperature is 0.0; set it above 0": {"temperature": 0.0},
    "text_start=image copies experts of model.weights, and there are none": {"text_start": "image"},
    "vl_start=text copies experts of model.weights, and there are none": {"vl_start": "text"},
    "heads is 0; set it to at least 1": {"encoder": replace(ENCODER, heads=0)},
    "patch_size is -16; set it to at least 1": {"encoder": replace(ENCODER, patch_size=-16)},
    "drop_path is 2; set it below 1": {"encoder": replace(ENCODER, drop_path=2)},
    "text_dropout is -1; set it to at least 0": {"encoder": replace(ENCODER, text_dropout=-1)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_incompatible_settings_are_refused_in_one_line(message):
    with pytest.raises(UserError, match=message):
        replace(SPEC, **REFUSED[message]).build()


def test_inputs_beyond_the_positions_are_refused():
    model = SPEC.build()
    with pytest.raises(ValueError, match="texts of 13 tokens; this encoder has positions for 12"):
        model.encode_text(torch.zeros(1, 13, dtype=torch.long), torch.ones(1, 13, dtype=torch.bool))
    with pytest.raises(ValueError, match="images of"):
        model.encode_image(torch.zeros(1, 3, 48, 48))
    texts = replace(SPEC, **NOTHING | {"mlm": True}).build()
    batch = Batch(torch.arange(2), None, torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(UserError, match="texts without images need text experts in all layers"):
        texts.masked_text(Forward(texts, batch), batch.input_ids, torch.tensor([1]))


def test_momentum_encoder_teaches_the_second_head_too():
    objectives = {"itc_vl": MomentumContrast(queue_size=7, ramp_epochs=0.0, distill=1.0, head="vl")}
    model, momentum = networks(SPEC)
    f = Forward(model, apart(), Forward(momentum, apart()), context_of(objectives))
    itc = objectives["itc_vl"]
    i2t, _ = itc.similarity(f.with_head("vl"), f.with_head("vl").momentum)
    keys = momentum.encode_text(apart().input_ids, apart().attention_mask).vl.embed
    own = momentum.encode_image(apart().image).vl.embed
    torch.testing.assert_close(i2t[:, :ROWS], model.vl.scale * own @ keys.T)
