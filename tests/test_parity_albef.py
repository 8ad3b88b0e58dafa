"""ALBEF's pre-training step is the published one: losses, similarities, logits, gradients, queues and momentum encoder.

The numbers were printed by the published code (../shared/parity/albef_pretrain). tests/fixtures/albef_pretrain.xz holds what of
them is compared here, of large gradients every n-th value; where the originals are, all of them are compared.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tests.conftest import ROOT
from tests.parity import on_device, read_fixture, thin
from vlp.data.preprocess import Preprocess
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage, TimmTower
from vlp.encoders.text import BertText
from vlp.forward import StepContext
from vlp.models.albef import Albef, AlbefModel
from vlp.objectives import itm
from vlp.objectives.itc import MomentumContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.masking import TextMasking
from vlp.objectives.mlm import MaskedText
from vlp.objectives.queues import Queue
from vlp.optim.ema import EMA
from vlp.train import Pretrainer
from vlp.types import Batch, MaskedIds
from vlp.weights import reading
from vlp.weights.albef import AlbefCheckpoint, export_albef, load_albef

SHARED = ROOT.parent / "shared" / "parity" / "albef_pretrain"
PUBLISHED = {
    "itc": MomentumContrast(queue_size=64, random_start=True, keys="local", duplicates="negative"),
    "itm": ImageTextMatching(duplicates="negative"),
    "mlm": MaskedText(
        masking=TextMasking(exclude="first", random_from="all"), distill=0.4, ramp_epochs=1.0, mean_over="local"
    ),
}


def fixture() -> tuple[dict[str, dict[str, Tensor]], dict]:
    """weights, inputs, outputs and grads; the settings."""
    return read_fixture("albef_pretrain.xz")


def originals() -> tuple[dict[str, dict[str, Tensor]], dict]:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: the published numbers are not part of the repository, but the fixture is")
    files = {name: load_file(SHARED / f"{name}.safetensors") for name in ("weights", "inputs", "outputs", "grads")}
    outputs = files["outputs"]
    masked = outputs["mlm_labels"].flatten() != -100
    for name in ("mlm_logits", "mlm_logits_m"):
        outputs[name] = outputs[name].flatten(0, 1)[masked]
    return files, json.loads((SHARED / "meta.json").read_text())["inputs"]


class Published:
    """One step of ours from the published state, with the published draws, and what the published code printed."""

    def __init__(self, read, monkeypatch: pytest.MonkeyPatch, device: str = "cpu"):
        files, self.meta = on_device(read(), device)
        self.given, self.expected, self.gradients = files["inputs"], files["outputs"], files["grads"]
        self.checkpoint = load_albef(files["weights"])
        self.model, teacher = (
            self.build(state).to(device) for state in (self.checkpoint.student, self.checkpoint.teacher)
        )
        self.momentum = EMA(teacher, self.meta["config"]["momentum"], "train")
        self.momentum.update(self.model)  # theirs comes before the step, ours after it
        self.queue = Queue(64, {"image": 32, "text": 32}, torch.device(device))
        self.queue.load(self.checkpoint.queue)
        expected = self.expected
        positions = (expected["mlm_labels"].flatten() != -100).nonzero()[:, 0]
        masked = MaskedIds(expected["masked_ids"], positions, expected["mlm_labels"].flatten()[positions])
        negatives = torch.cat([expected["neg_text_for_image"], expected["neg_image_for_text"]])
        self.drawn_from: list[tuple] = []

        def draw(*arguments):
            self.drawn_from.append(arguments)
            return negatives

        monkeypatch.setattr(TextMasking, "__call__", lambda *_: masked)
        monkeypatch.setattr(itm, "sample_hard_negatives", draw)
        # the published pre-training takes every pair for another picture
        index, mask = torch.arange(8, device=device), self.given["attention_mask"].bool()
        batch = Batch(index, self.given["image"], self.given["input_ids"], mask)
        self.context = StepContext({PUBLISHED["itc"]: self.queue}, progress=1.0)
        given = [batch], self.momentum.network, self.context
        self.losses, self.total, (self.f,) = Pretrainer(self.model, PUBLISHED)(*given)

    def build(self, state: dict[str, Tensor]) -> AlbefModel:
        bert, config = self.meta["bert"], self.meta["config"]
        kept = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        sizes = {key: bert[key] for key in kept} | {"model_type": "bert", "num_hidden_layers": bert["fusion_layer"]}
        positions = len(state["text.model.embeddings.position_embeddings.weight"])
        text = BertText(config=sizes | {"max_position_embeddings": positions}, dropout=0.0, length_groups=3)
        layers = bert["num_hidden_layers"] - bert["fusion_layer"]
        spec = Albef(TimmImage("unused"), text, Fusion(layers), embed_size=config["embed_dim"])
        size = config["image_res"]
        vit = VisionTransformer(img_size=size, patch_size=16, num_classes=0, **self.meta["vit"])
        image = TimmTower(vit, Preprocess((size, size), (0.5,) * 3, (0.5,) * 3, "bicubic"))
        model = AlbefModel(spec, image, text.build())
        assert reading.load(model, state).new == ()
        return model

    def compared_losses(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name -> ours, theirs."""
        names = {"itc": "loss_ita", "itm": "loss_itm", "mlm": "loss_mlm"}
        return {name: (self.losses[name], self.expected[theirs]) for name, theirs in names.items()}

    def compared_gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Their name -> ours, theirs; of a fixture every n-th value. To be called after the backward pass."""
        found = export_albef(AlbefCheckpoint({name: p.grad for name, p in self.model.named_parameters()}))
        return {
            name: (found[name] if gradient.shape == found[name].shape else thin(found[name]), gradient)
            for name, gradient in self.gradients.items()
            # zero in truth: noise on either side
            if not re.search(r"(self|crossattention\.self)\.key\.bias$", name)
        }


@pytest.fixture(params=[fixture, originals])
def published(request, monkeypatch):
    return Published(request.param, monkeypatch)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_losses_are_the_published_ones(published):
    for ours, theirs in published.compared_losses().values():
        close(ours, theirs)
    close(published.total, sum(published.losses.values()))


def test_similarities_logits_and_weights_of_negatives_are_the_published_ones(published):
    f, expected, itc = published.f, published.expected, PUBLISHED["itc"]
    for name, similarity in zip(("sim_i2t", "sim_t2i"), itc.similarity(f, f)):
        close(similarity, expected[name])
    if "sim_i2t_m" in expected:
        for name, similarity in zip(("sim_i2t_m", "sim_t2i_m"), itc.similarity(f, f.momentum)):
            close(similarity, expected[name])
    ((similarity, candidates, epsilon),) = published.drawn_from
    assert torch.equal(candidates, ~torch.eye(8, dtype=torch.bool).repeat(2, 1)) and epsilon == 0
    weights = similarity.softmax(1).masked_fill(~candidates, 0)
    close(weights, torch.cat([expected["weights_i2t"], expected["weights_t2i"]]))
    pairs, other_texts, other_images = (
        PUBLISHED["itm"]
        .logits(f, f.scope("local"), expected["neg_text_for_image"], expected["neg_image_for_text"])
        .chunk(3)
    )
    close(torch.cat([pairs, other_images, other_texts]), expected["itm_logits"])  # their order
    masked = f.masked(PUBLISHED["mlm"].masking)
    for bundle, name in ((f, "mlm_logits"), (f.momentum, "mlm_logits_m")):
        close(bundle.model.masked_text(bundle, masked.input_ids, masked.positions), expected[name])


def test_every_gradient_is_the_published_one(published):
    published.total.backward()
    compared = published.compared_gradients()
    for name, (ours, gradient) in compared.items():
        assert gradient.norm() > 1e-6
        assert (ours - gradient).norm() <= 1e-4 * gradient.norm(), name
    # two layers of text, two of fusion, and what of the ViT has no key bias of its own
    assert len(compared) == len(list(published.model.parameters())) - 6


def test_queues_after_the_step_are_the_published_ones(published):
    with torch.no_grad():
        rows = PUBLISHED["itc"].enqueue(published.f)
    before = {name: published.queue[name].clone() for name in ("image", "text")}
    published.queue.push(**rows)
    for name, old in before.items():
        after = published.expected[f"{name}_queue_after"].T
        assert torch.equal(published.queue[name][8:], after[8:]) and torch.equal(after[8:], old[8:])
        close(published.queue[name][:8], after[:8], 1e-6)
    assert published.queue.tensors()["counters"][0] == published.expected["queue_ptr_after"][0]


def test_momentum_encoder_after_the_step_is_the_published_one(published):
    official = export_albef(AlbefCheckpoint(published.momentum.tensors(), published.momentum.tensors()))
    compared = 0
    for name, norm in published.expected.items():  # of each tensor, in float64
        if name.startswith("momentum_after/"):
            found = official[name.removeprefix("momentum_after/")].double().norm()
            torch.testing.assert_close(found, norm, rtol=1e-7, atol=0)
            compared += 1
    assert compared > 130
