"""Losses of answers and captions equal those of each text computed separately."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.objectives.fusing import pairs, tiny
from vlp.config import Data, Experiment
from vlp.data.reading.annotated import Annotated
from vlp.data.reading.shards import Source
from vlp.encoders.decoder import Decoder
from vlp.errors import UserError
from vlp.forward import Forward, StepContext
from vlp.losses.masked import masked_cross_entropy
from vlp.objectives.answer import AnswerGeneration, Captioning
from vlp.objectives.classification import Classification
from vlp.optim.ema import EMA, MomentumConfig
from vlp.train import geometry
from vlp.types import Answers

CLS, SEP = 1, 2


def asked(rows=4):
    """Return 4 questions with 6 answers of different lengths. The third question has none."""
    lengths, row = torch.tensor([3, 2, 5, 3, 4, 3]), torch.tensor([0, 0, 1, 1, 3, 0])
    mask = torch.arange(6) < lengths[:, None]
    torch.manual_seed(3)
    ids = torch.randint(5, 99, mask.shape)
    ids[:, 0] = CLS
    ids[torch.arange(6), lengths - 1] = SEP
    answers = Answers(ids.masked_fill(~mask, 0), mask, torch.tensor([0.5, 0.25, 1.0, 0.1, 0.7, 0.0]), row)
    return replace(pairs(rows), answers=answers)


def networks(source="fusion", **parts):
    made = []
    for seed in (0, 9):
        torch.manual_seed(seed)
        heads = {"itc": False, "itm": False, "mlm": False}
        made.append(tiny(decoder=Decoder(layers=2, source=source), **heads, **parts).build().double())
    return made[0], EMA(made[1], 0.9).network.double()


def each_alone(model, teacher, batch, distill):
    """Compute the loss one answer at a time, without padding."""
    total, answers = 0.0, batch.answers
    for ids, real, weight, row in zip(answers.input_ids, answers.attention_mask, answers.weight, answers.row):
        ids, length = ids[real][None], batch.attention_mask[row].sum()
        logits = []
        for network in (model, teacher):
            image = network.encode_image(batch.image[row][None])
            question = batch.input_ids[row, :length][None]
            text = network.encode_text(question, torch.ones_like(question, dtype=torch.bool))
            source = network.ask(network.project(image), text)
            states = network.decoder.read(ids[:, :-1], torch.ones_like(ids[:, :-1], dtype=torch.bool), source).states
            logits.append(network.decoder.words(states))
        hard = F.cross_entropy(logits[0], ids[0, 1:], reduction="sum")
        soft = F.cross_entropy(logits[0], logits[1].detach().softmax(1), reduction="sum")
        total = total + weight.double() * ((1 - distill) * hard + distill * soft)
    return total / len(batch)


@pytest.mark.parametrize("distill, progress", [(0.0, 0.0), (0.4, 1.0), (0.4, 0.25)])
def test_loss_is_the_weighted_sum_over_separate_answers(distill, progress):
    model, teacher = networks()
    batch = asked()
    f = Forward(model, batch, Forward(teacher, batch), StepContext(progress=progress))
    loss = AnswerGeneration(distill=distill, ramp_epochs=1.0)(f)
    slow = each_alone(model, teacher, batch, distill * progress)
    torch.testing.assert_close(loss.double(), slow, rtol=1e-5, atol=1e-6)
    for found, expected in zip(
        *(torch.autograd.grad(x, list(model.parameters()), retain_graph=True) for x in (loss, slow))
    ):
        assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-7


def test_classifier_and_decoder_share_one_fusion_pass():
    model, _ = networks(classes=5)
    batch = replace(asked(), labels=torch.tensor([0, 1, 2, 3]))
    alone = Classification()(Forward(model, batch))
    f, passes = Forward(model, batch), []
    with model.fusion.register_forward_hook(lambda *_: passes.append(1)):
        answer, beside = AnswerGeneration()(f), Classification()(f)
    assert len(passes) == 1
    torch.testing.assert_close(beside, alone)
    torch.testing.assert_close(answer, AnswerGeneration()(Forward(model, batch)))
    f.free_activations()
    assert "fused" not in vars(f)


def test_geometry_accepts_image_and_text_of_different_widths():
    model, _ = networks()
    f = Forward(model, asked())
    AnswerGeneration()(f)
    assert f.image.embed.shape != f.text.embed.shape
    assert set(geometry(f)) == {"geometry/uniformity_image", "geometry/uniformity_text"}


def test_mean_over_micro_batches_equals_the_batch():
    model, _ = networks()
    batch = asked()
    whole = AnswerGeneration()(Forward(model, batch))
    parts = []
    for rows in (slice(0, 2), slice(2, 4)):
        begin, end = rows.start, rows.stop
        kept = (batch.answers.row >= begin) & (batch.answers.row < end)
        answers = batch.answers
        answers = Answers(
            answers.input_ids[kept], answers.attention_mask[kept], answers.weight[kept], answers.row[kept] - begin
        )
        part = replace(
            batch, image_id=batch.image_id[rows], image=batch.image[rows], input_ids=batch.input_ids[rows],
            attention_mask=batch.attention_mask[rows], answers=answers,
        )  # fmt: skip
        parts.append(AnswerGeneration()(Forward(model, part)))
    torch.testing.assert_close(sum(parts) / 2, whole)


@pytest.mark.parametrize("distill", [0.0, 0.4])
def test_captioning_loss_is_the_mean_over_tokens(distill):
    model, teacher = networks("image")
    assert model.fusion is None
    batch = pairs(4)
    f = Forward(model, batch, Forward(teacher, batch))
    loss = Captioning(distill=distill)(f)
    logits, labels, taught = [], [], []
    for row, real in zip(range(4), batch.attention_mask):
        ids = batch.input_ids[row][real][None]
        for network, to in ((model, logits), (teacher, taught)):
            source = network.describe(network.encode_image(batch.image[row][None]))
            states = network.decoder.read(ids[:, :-1], torch.ones_like(ids[:, :-1], dtype=torch.bool), source).states
            to.append(network.decoder.words(states))
        labels.append(ids[0, 1:])
    given = (torch.cat(x) for x in (logits, labels, taught))
    torch.testing.assert_close(loss, masked_cross_entropy(*given, distill))


def experiment(objective, **fields) -> Experiment:
    heads = {"itc": False, "itm": False, "mlm": False}
    data = Data(train=(Annotated("x.jsonl", answers="answers"),))
    return replace(Experiment("x", tiny(decoder=Decoder(), **heads), {"a": objective}, data), **fields)


def test_validate_names_the_missing_setting():
    AnswerGeneration().validate(experiment(AnswerGeneration()))
    for fields, message in (
        ({"model": tiny()}, "model.decoder=Decoder"),
        ({"model": tiny(decoder=Decoder(source="image"))}, "source='fusion'"),
        ({"data": Data(train=(Source("x"),))}, "answers=FIELD"),
        ({"data": Data(train=(Annotated("x"),))}, "answers=FIELD"),
    ):
        with pytest.raises(UserError, match=message):
            AnswerGeneration().validate(experiment(AnswerGeneration(), **fields))
    with pytest.raises(UserError, match="momentum"):
        AnswerGeneration(distill=0.4).validate(experiment(AnswerGeneration()))
    AnswerGeneration(distill=0.4).validate(experiment(AnswerGeneration(), momentum=MomentumConfig()))
    with pytest.raises(UserError, match="source='image'"):
        Captioning().validate(experiment(Captioning()))
    with pytest.raises(UserError, match="data.add_sep=true"):
        model, data = tiny(decoder=Decoder(source="image")), Data(train=(Source("x"),), add_sep=False)
        Captioning().validate(experiment(Captioning(), model=model, data=data))
