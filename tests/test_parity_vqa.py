"""VQA's loss over weighted answers, every gradient, and the ranking of a list are the published ones.

The numbers were printed by the published code (../shared/parity/albef_vqa). Its 0.9 million random weights do not fit into a
small fixture: where the folder is not there, tests/encoders/test_decoder.py still compares the decoder with transformers'.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from tests.conftest import ROOT
from vlp.data.preprocess import Preprocess
from vlp.encoders.decoder import Decoder
from vlp.encoders.fusion import Fusion
from vlp.encoders.generate import rank
from vlp.encoders.image import TimmImage, TimmTower
from vlp.encoders.text import BertText
from vlp.forward import Forward
from vlp.models.albef import Albef, AlbefModel
from vlp.objectives.answer import AnswerGeneration
from vlp.types import Answers, Batch
from vlp.weights.albef import AlbefCheckpoint, export_albef, load_albef

FOLDER = ROOT.parent / "shared" / "parity" / "albef_vqa"


class Published:
    def __init__(self):
        if not FOLDER.is_dir():
            pytest.skip(f"{FOLDER} is not there: the numbers of the published code are not part of the repository")
        names = ("weights", "inputs", "outputs", "grads")
        weights, self.given, self.expected, self.gradients = (load_file(FOLDER / f"{n}.safetensors") for n in names)
        self.meta = json.loads((FOLDER / "meta.json").read_text())["inputs"]
        self.weights, self.model = weights, self.build(weights)
        self.answers = self.given["answer_ids"], self.given["answer_mask"].bool()
        counts = torch.tensor(self.meta["answer_counts"])
        first = [part[: counts.sum()] for part in self.answers]
        answers = Answers(*first, self.given["answer_weights"], torch.arange(8).repeat_interleave(counts))
        mask = self.given["attention_mask"].bool()
        batch = Batch(torch.arange(8), self.given["image"], self.given["input_ids"], mask, answers=answers)
        self.f = Forward(self.model, batch)

    def build(self, weights) -> AlbefModel:
        bert, size = self.meta["bert"], self.meta["config"]["image_res"]
        kept = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
        sizes = {key: bert[key] for key in kept} | {"model_type": "bert", "num_hidden_layers": bert["fusion_layer"]}
        text = BertText(config=sizes, dropout=0.0, length_groups=3)
        layers = bert["num_hidden_layers"] - bert["fusion_layer"]
        heads = {"itc": False, "itm": False, "mlm": False}
        spec = Albef(TimmImage("unused"), text, Fusion(layers), decoder=Decoder(layers=6), **heads)
        vit = VisionTransformer(img_size=size, patch_size=16, num_classes=0, **self.meta["vit"])
        image = TimmTower(vit, Preprocess((size, size), (0.5,) * 3, (0.5,) * 3, "bicubic"))
        model = AlbefModel(spec, image, text.build())
        model.load(load_albef(weights).student)
        assert not model.report.new and not model.report.unexpected
        return model


@pytest.fixture
def published():
    return Published()


def test_loss_and_every_gradient_are_the_published_ones(published):
    loss = AnswerGeneration()(published.f)
    assert loss.item() == pytest.approx(published.expected["train_loss"].item(), abs=1e-5)
    loss.backward()
    found = export_albef(AlbefCheckpoint({name: p.grad for name, p in published.model.named_parameters()}))
    compared = 0
    for name, gradient in published.gradients.items():
        if name.endswith("key.bias"):
            continue  # zero in truth: noise on either side
        assert gradient.norm() > 1e-6
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
        compared += 1
    assert compared > 250


@torch.no_grad()
def test_ranking_is_the_published_one_with_its_double_count(published):
    f, model = published.f, published.model
    asked = model.ask(model.project(f.image), f.text)
    found = rank(model.decoder, asked, *published.answers, published.meta["k"], double_first=True)
    assert torch.equal(found.answers, published.expected["topk_ids"])
    torch.testing.assert_close(found.scores.softmax(1), published.expected["topk_probs"], rtol=0, atol=1e-4)


def test_official_checkpoint_comes_back_as_it_was(published):
    official = export_albef(load_albef(published.weights))
    assert official.keys() == published.weights.keys()
    assert all(torch.equal(official[name], tensor) for name, tensor in published.weights.items())
