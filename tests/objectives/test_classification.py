from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.objectives.fusing import SIZES, pairs, tiny
from vlp.config import Data, Experiment
from vlp.data.reading.annotated import Annotated
from vlp.data.reading.sentences import Sentences
from vlp.data.reading.shards import Source
from vlp.encoders.fusion import AlternatingImages, Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.forward import Forward, StepContext
from vlp.models.single import Single
from vlp.objectives.classification import Classification
from vlp.optim.ema import MomentumConfig

HEADLESS = {"itc": False, "itm": False, "mlm": False}
SPEC = tiny(classes=3, **HEADLESS)
ANSWERS = Annotated("a.jsonl", answers="answers", classes=("yes", "no", "other"))
NLI = Sentences("x.tsv", columns=("a", "b"), label="gold", classes=("e", "n", "c"))
LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0])


def labelled():
    return replace(pairs(), labels=LABELS)


def build(seed=0, spec=SPEC):
    torch.manual_seed(seed)
    return spec.build().double()


def bundle(batch, model=None, progress=0.0):
    context = StepContext(progress=progress)
    momentum = Forward(build(9).requires_grad_(False), batch, context=context)
    return Forward(model or build(), batch, momentum, context)


def straightforward(model, batch):
    """Compute (B, 3) logits by fusing every pair separately, at all positions."""
    rows = []
    for row, length in enumerate(batch.attention_mask.sum(1)):
        image = model.encode_image(batch.image[row : row + 1])
        text = model.encode_text(batch.input_ids[row : row + 1, :length], batch.attention_mask[row : row + 1, :length])
        first = model.fuse(model.project(image), text)[:, 0]
        hidden = F.relu(F.linear(first, model.classifier[0].weight, model.classifier[0].bias))
        rows.append(F.linear(hidden, model.classifier[2].weight, model.classifier[2].bias))
    return torch.cat(rows)


def test_classifier_reads_the_first_fused_token_and_every_parameter_has_a_gradient():
    model, batch = build(), labelled()
    f = bundle(batch, model)
    torch.testing.assert_close(model.classify(f), straightforward(model, batch))
    loss = Classification()(f)
    torch.testing.assert_close(loss, F.cross_entropy(straightforward(model, batch), LABELS), rtol=1e-6, atol=1e-7)
    loss.backward()
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == {"image", "text", "fusion", "classifier"}
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_every_trained_parameter_has_a_gradient_when_the_image_tower_is_frozen():
    model, batch = build(), labelled()
    model.image.requires_grad_(False)
    Classification()(bundle(batch, model)).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(("ramp", "progress", "share"), [(0.0, 0.0, 0.4), (1.0, 0.0, 0.0), (1.0, 0.5, 0.2)])
def test_distillation_mixes_the_teachers_prediction_with_and_without_a_ramp(ramp, progress, share):
    f = bundle(labelled(), progress=progress)
    with torch.no_grad():
        logits, soft = f.model.classify(f), f.momentum.model.classify(f.momentum).softmax(1)
    expected = (1 - share) * F.cross_entropy(logits, LABELS) + share * F.cross_entropy(logits, soft)
    found = Classification(distill=0.4, ramp_epochs=ramp)(f)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_soft_targets_take_precedence_over_labels():
    targets = torch.rand(8, 3)
    f = bundle(replace(pairs(), targets=targets))
    logits = f.model.classify(f).detach()
    expected = F.binary_cross_entropy_with_logits(logits, targets.double(), reduction="sum") / 8
    torch.testing.assert_close(Classification(loss="bce")(f), expected)
    torch.testing.assert_close(
        Classification()(f), F.cross_entropy(logits, targets.double(), reduction="none").mean(), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("of", ["image", "text"])
def test_single_tower_classifies_its_pooled_state(of):
    text = BertText(config=SIZES, dropout=0.0, length_groups=2)
    spec = (
        Single(image=TimmImage("test_vit", image_size=32), classes=3) if of == "image" else Single(text=text, classes=3)
    )
    model, batch = build(spec=spec), labelled()
    f = Forward(model, batch)
    first = (f.image if of == "image" else f.text).tokens[:, 0]
    expected = F.cross_entropy(first @ model.classifier.weight.T + model.classifier.bias, LABELS)
    torch.testing.assert_close(Classification()(f), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"model": tiny()}, "set model.classes"),
        ({"data": Data(train=(Source("s"),))}, "needs labels of 3 classes; set label of the source s"),
        ({"data": Data(train=(Annotated("a.jsonl"),))}, "needs labels of 3 classes; set label of the source a.jsonl"),
        ({"data": Data(train=(ANSWERS, Annotated("b.jsonl", answers="x")))}, "set label of the source b.jsonl"),
        ({"data": Data(train=(replace(NLI, classes=("a", "b")),))}, "x.tsv has 2; set its classes, or model.classes"),
        ({"objectives": {"c": Classification(distill=0.4)}, "momentum": None}, "needs the momentum encoder"),
        ({"objectives": {"c": Classification(loss="bce", label_smoothing=0.1)}}, "label_smoothing is of loss"),
    ],
)
def test_validate_names_the_missing_setting(changed, complaint):
    whole = Experiment("x", SPEC, {"c": Classification()}, Data(train=()), momentum=MomentumConfig())
    whole.objectives["c"].validate(whole)
    for source in (Source("s", label="class"), ANSWERS, NLI, Annotated("a.jsonl", label="class")):
        whole.objectives["c"].validate(replace(whole, data=Data(train=(source,))))
    experiment = replace(whole, **changed)
    with pytest.raises(UserError, match=complaint):
        experiment.objectives["c"].validate(experiment)


def test_twin_layers_alternate_between_two_images():
    spec = replace(SPEC, fusion=Fusion(layers=2, images=2), classes=2)
    model, batch = build(spec=spec), labelled()
    second = replace(batch, image=batch.image.flip(0), labels=None)
    f = Forward(model, replace(batch, labels=LABELS % 2, views=(second,)))
    images = [model.project(model.encode_image(image)) for image in (batch.image, second.image)]
    text = model.encode_text(batch.input_ids, batch.attention_mask)
    expected = model.classifier(model.fuse(AlternatingImages(tuple(images)), text)[:, 0])
    torch.testing.assert_close(model.classify(f), expected)
    Classification()(f).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    with pytest.raises(ValueError, match="attends to 2 images, and the batch has 1"):
        model.classify(Forward(model, batch))
    with pytest.raises(UserError, match="itm and mlm read one image"):
        replace(spec, itm=True).build()
