"""VLMo's stages: experts that start as copies, and an image branch that the text stage does not change."""

from dataclasses import replace

import pytest
import torch

from vlp.encoders.mome import SMALL
from vlp.encoders.patch_targets import Pixels
from vlp.encoders.ragged import RaggedBatch
from vlp.errors import UserError
from vlp.forward import StepContext
from vlp.models.vlmo import Vlmo, VlmoModel
from vlp.models.vlmo_start import FROZEN_IN_TEXT_STAGE, FROZEN_IN_TEXT_STAGE_PUBLISHED, initialize
from vlp.objectives.mlm import MaskedText
from vlp.optim.groups import parameter_groups, starts_with
from vlp.optim.optimizers import AdamW, Lamb, Sgd
from vlp.train import Pretrainer
from vlp.types import Batch, Vocabulary
from vlp.weights.reading import LoadReport

SIZES = replace(SMALL, width=32, layers=3, heads=2, vl_from=2, vocab_size=60, image_size=32, max_text_length=12)
BARE = Vlmo(itc=False, itc_vl=False, itm=False, mlm=False)
IMAGES = replace(BARE, encoder=replace(SIZES, experts=("image",)), mim=Pixels())
TEXTS = replace(BARE, encoder=replace(SIZES, experts=("image", "text")), mlm=True)
PAIRS = Vlmo(encoder=SIZES)


def randomised(spec: Vlmo) -> VlmoModel:
    """Build a model in which no two tensors are equal, including biases and norms."""
    torch.manual_seed(0)
    model = spec.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def started(spec: Vlmo, before: VlmoModel, **starts: str) -> VlmoModel:
    torch.manual_seed(1)
    model = spec.build()
    take(model, before, **starts)
    return model


def take(model: VlmoModel, before: VlmoModel, **starts: str) -> LoadReport:
    return initialize(model, before.state_dict(), "the weights", {"text": "weights", "vl": "weights"} | starts, None)


def expert(model: VlmoModel, name: str, layer: int) -> dict:
    return model.encoder.layers[layer].experts[name].state_dict()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def image_states(model: VlmoModel) -> torch.Tensor:
    """Return the (4 * P, D) states of four images after the image experts of all layers."""
    encoder = model.eval().encoder
    image = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        inputs = encoder.image(image)
        return encoder(RaggedBatch.of_images(4, inputs.shape[1], inputs.device), image=inputs)


# --- initial experts ----------------------------------------------------------------------------------------------


def test_text_experts_start_as_image_experts_and_other_parts_are_loaded():
    first = randomised(IMAGES)
    second = started(TEXTS, first, text="image")
    for layer in range(3):
        assert same(expert(second, "text", layer), expert(first, "image", layer))
    own, before = second.state_dict(), first.state_dict()
    assert all(torch.equal(own[name], x) for name, x in before.items() if not name.startswith("mim."))
    assert torch.equal(image_states(second), image_states(first))
    report = take(second, first, text="image")
    assert sorted(report.copied) == [n for n in sorted(own) if ".experts.text." in n]
    assert "18 copied" in str(report)


@pytest.mark.parametrize("source", ["random", "image", "text"])
def test_vl_start_selects_the_initial_vision_language_experts(source):
    second = randomised(TEXTS)
    third = started(PAIRS, second, vl=source)
    torch.manual_seed(1)
    fresh = PAIRS.build()
    expected = expert(fresh, "vl", 2) if source == "random" else expert(second, source, 2)
    assert same(expert(third, "vl", 2), expected)
    for name in ("image", "text"):
        assert all(same(expert(third, name, n), expert(second, name, n)) for n in range(3))
    assert torch.equal(image_states(third), image_states(second))
    assert torch.equal(third.encoder.positions.text, second.encoder.positions.text)


def test_report_names_trained_experts_that_are_discarded():
    """A stage that starts from another run of the same stage."""
    report = take(TEXTS.build(), randomised(TEXTS), text="image")
    assert sorted(report.replaced) == [n for n in sorted(TEXTS.build().state_dict()) if ".experts.text." in n]
    assert "18 replaced (" in str(report)
    assert take(TEXTS.build(), randomised(IMAGES), text="image").replaced == ()


def test_stage_of_pairs_can_follow_the_stage_of_images():
    first = randomised(IMAGES)
    third = started(PAIRS, first, text="image", vl="text")
    assert same(expert(third, "vl", 2), expert(first, "image", 2))


def test_heads_that_the_model_lacks_are_skipped():
    third = randomised(PAIRS)
    report = take(replace(PAIRS, itc=False, itc_vl=False, mlm=False).build(), third)
    assert "encoder.layers.2.experts.image.expand.weight" in report.unexpected and not report.new
    alone = started(IMAGES, third)
    assert torch.equal(image_states(alone), image_states(third))


REFUSED = {
    "no text expert": (IMAGES, TEXTS, {}, "the weights lacks the text expert of encoder.layers.0; .* set model.text_start=image"),
    "no image expert": (replace(TEXTS, encoder=replace(SIZES, experts=("text",))), PAIRS, {"vl": "text"}, "lacks the image expert of encoder.layers.0"),
    "nothing to copy": (replace(TEXTS, encoder=replace(SIZES, experts=("text",))), TEXTS, {"text": "image"}, "lacks the image expert of encoder.layers.0"),
    "no vl expert": (TEXTS, PAIRS, {}, "lacks the vl expert of encoder.layers.2; .* set model.vl_start"),
    "other width": (replace(IMAGES, encoder=replace(IMAGES.encoder, width=48)), TEXTS, {"text": "image"}, "choose a model of the same size"),
    "more layers": (replace(IMAGES, encoder=replace(IMAGES.encoder, layers=4)), TEXTS, {"text": "image"}, "which the model lacks"),
    "fewer layers": (replace(IMAGES, encoder=replace(IMAGES.encoder, layers=2)), TEXTS, {"text": "image"}, "lacks the image expert of encoder.layers.2"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_start_leaves_the_model_unchanged(case):
    before, spec, starts, message = REFUSED[case]
    torch.manual_seed(1)
    model = spec.build()
    own = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        take(model, before.build(), **starts)
    assert same(own, model.state_dict())


# --- the text stage ---------------------------------------------------------------------------------


DECAYING = AdamW(lr=1e-2, weight_decay=0.5)


def text_stage(first: VlmoModel, plan: tuple[str, ...], optim=DECAYING) -> VlmoModel:
    """Take three steps of masked language modelling with the frozen parameters of a run."""
    model = started(TEXTS, first, text="image").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(starts_with(name, prefix) for prefix in plan))
    optimizer = optim.build(parameter_groups(model, optim.weight_decay))
    special = torch.arange(60) < 5
    context = StepContext({}, Vocabulary(60, 4, special, torch.zeros_like(special)))
    step = Pretrainer(model, {"mlm": MaskedText()})
    for _ in range(3):
        ids = torch.randint(5, 60, (8, 10))
        batch = Batch(torch.arange(8), None, ids, torch.ones_like(ids).bool())
        _, total, _ = step([batch], None, context)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("optim", [DECAYING, Lamb(lr=1e-2), Sgd(lr=1e-2)], ids=["AdamW", "Lamb", "Sgd"])  # fmt: skip
def test_recommended_freezing_keeps_the_image_branch_bitwise_equal(optim):
    first = randomised(IMAGES)
    second = text_stage(first, FROZEN_IN_TEXT_STAGE, optim)
    own, before = second.state_dict(), first.state_dict()
    kept = [name for name in before if not name.startswith("mim.")]
    assert "encoder.positions.image" in kept and "encoder.norm.weight" in kept
    assert all(torch.equal(own[name], before[name]) for name in kept)
    assert torch.equal(image_states(second), image_states(first))
    # all other parameters have changed
    moved = started(TEXTS, first, text="image").state_dict()
    assert [n for n, p in second.named_parameters() if p.requires_grad and torch.equal(own[n], moved[n])] == []


def test_published_freezing_lets_the_image_branch_drift():
    first = randomised(IMAGES)
    second = text_stage(first, FROZEN_IN_TEXT_STAGE_PUBLISHED)
    own, before = second.state_dict(), first.state_dict()
    drifted = {name for name in before if not name.startswith("mim.") and not torch.equal(own[name], before[name])}
    assert drifted == {"encoder.norm.weight", "encoder.norm.bias"}
    assert (image_states(second) - image_states(first)).abs().max() > 1e-3


def test_freezing_plans_name_existing_parameters_for_both_kinds_of_positions():
    for encoder in (SIZES, replace(SIZES, positions="absolute", layer_scale=None)):
        names = [
            n for n, _ in replace(TEXTS, encoder=replace(encoder, experts=("image", "text"))).build().named_parameters()
        ]
        trained = {n for n in names if not any(starts_with(n, prefix) for prefix in FROZEN_IN_TEXT_STAGE)}
        assert all(
            ".experts.text." in n or n.startswith(("encoder.text.", "encoder.positions.text", "mlm.", "words."))
            for n in trained
        )


def test_star_in_a_prefix_matches_one_part_of_the_name():
    assert starts_with("layers.3.norm.weight", "layers.*.norm")
    assert not starts_with("layers.3.experts.text.norm.weight", "layers.*.norm")
    assert starts_with("encoder.norm", "encoder") and not starts_with("encoder.norm", "norm")
