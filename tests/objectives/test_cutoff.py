"""Cutoff removes the right parts, and its loss equals the terms of its equation."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from vlp.config import Data, Experiment
from vlp.data.reading.sentences import Sentences
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.losses.divergence import jensen_shannon
from vlp.models.single import Single
from vlp.objectives.cutoff import Cutoff, keep_outside_span, keep_tokens
from vlp.training.validation import validate
from vlp.types import Batch

SIZES = {"model_type": "bert", "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 40}
LENGTHS = torch.tensor([30, 20, 19, 10, 9, 2])
MASK = torch.arange(30) < LENGTHS[:, None]


def cut_places(kept: torch.Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in ~kept]


@pytest.mark.parametrize("keep", [keep_tokens, keep_outside_span])
def test_cutoff_removes_a_share_of_real_tokens_but_never_the_first(keep):
    torch.manual_seed(0)
    for ratio in (0.0, 0.1, 0.29, 0.5, 0.99):
        for _ in range(50):
            places = cut_places(keep(MASK, ratio))
            assert [len(row) for row in places] == [int(ratio * length) for length in LENGTHS.tolist()]
            assert all(0 < place < length for row, length in zip(places, LENGTHS) for place in row)
            if keep is keep_outside_span:
                assert all(row == list(range(row[0], row[0] + len(row))) for row in places if row)


def test_tokens_and_spans_are_cut_uniformly():
    torch.manual_seed(0)
    mask = torch.ones(20_000, 10).bool()
    share = (~keep_tokens(mask, 0.3)).float().mean(0)
    torch.testing.assert_close(share, torch.tensor([0.0] + 9 * [3 / 9]), rtol=0, atol=0.015)
    begins = (~keep_outside_span(mask, 0.3)).int().argmax(1).bincount(minlength=10) / 20_000
    torch.testing.assert_close(begins, torch.tensor([0.0] + 7 * [1 / 7] + 2 * [0.0]), rtol=0, atol=0.015)


def test_feature_cutoff_is_shared_by_tokens_and_only_spans_are_masked_in_attention():
    torch.manual_seed(0)
    keep, mask = Cutoff(cut="feature", ratio=0.29).restrict(MASK, 100)
    assert keep.shape == (6, 1, 100) and (~keep).sum(2).flatten().tolist() == 6 * [int(0.29 * 100)] and mask is MASK
    assert len({tuple(row) for row in cut_places(keep[:, 0])}) == 6
    keep, mask = Cutoff(cut="token", ratio=0.3).restrict(MASK, 100)
    assert keep.shape == (6, 30, 1) and mask is MASK
    keep, mask = Cutoff(cut="span", ratio=0.3).restrict(MASK, 100)
    assert torch.equal(mask, MASK & keep[:, :, 0]) and not torch.equal(mask, MASK)


def forward_of(sharp=1.0, dropout=0.0) -> Forward:
    torch.manual_seed(0)
    model = Single(text=BertText(config=SIZES, dropout=dropout), classes=3).build()
    model.classifier.weight.data.mul_(sharp)
    ids = torch.randint(5, 99, MASK.shape)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    return Forward(model, Batch(torch.arange(6), input_ids=ids, attention_mask=MASK, labels=labels))


@pytest.mark.parametrize("cut", ["token", "feature", "span"])
def test_loss_is_the_sum_of_its_terms(cut):
    objective, f = Cutoff(cut=cut, ratio=0.3, copies=2, augmented=0.7, consistency=1.3), forward_of()
    torch.manual_seed(5)
    loss = objective(f)
    torch.manual_seed(5)
    logits = [f.model.classifier(f.text.tokens[:, 0])]
    for _ in range(2):
        keep, mask = objective.restrict(MASK, 32)
        logits.append(f.model.classifier(f.model.text(f.batch.input_ids, mask, keep)[:, 0]))
    whole, one, two = (F.cross_entropy(each, f.batch.labels) for each in logits)
    torch.testing.assert_close(loss, whole + 0.7 * (one + two) + 1.3 * jensen_shannon(*logits))
    assert len({round(each.item(), 6) for each in (whole, one, two)}) == 3
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in f.model.parameters())


def test_jensen_shannon_is_bounded_by_log_2_unlike_the_published_divergence():
    """For confident predictions that differ, the published KL(mean || p) is far above log 2."""
    objective, f = Cutoff(cut="feature", ratio=0.8, augmented=0.0), forward_of(sharp=1e4)

    def two_logits():
        torch.manual_seed(5)
        keep, mask = objective.restrict(MASK, 32)
        cut = f.model.text(f.batch.input_ids, mask, keep)
        return torch.stack([f.model.classifier(f.text.tokens[:, 0]), f.model.classifier(cut[:, 0])])

    f.model.classifier.bias.data -= two_logits().mean((0, 1)).detach()
    torch.manual_seed(5)
    alone = (objective(f) - Cutoff(copies=0)(f)).item()
    assert 0.1 < alone <= math.log(2)
    p = two_logits().softmax(2).clamp(min=1e-30)
    published = (p.mean(0) * (p.mean(0).log() - p.log())).sum(2).mean()
    assert published > math.log(2)


def test_zero_copies_is_cross_entropy_in_one_pass():
    f, passes = forward_of(), []
    f.model.text.register_forward_pre_hook(lambda *_: passes.append(1))
    loss = Cutoff(copies=0)(f)
    torch.testing.assert_close(loss, F.cross_entropy(f.model.classifier(f.text.tokens[:, 0]), f.batch.labels))
    assert passes == [1]
    Cutoff(copies=2)(f)
    assert len(passes) == 3


def test_validate_names_the_missing_setting():
    table = Sentences("x.tsv", columns=("a",), label="l", classes=("yes", "no"))
    model = Single(text=BertText(weights="x"), classes=2)
    experiment = Experiment("x", model, {"o": Cutoff()}, Data(train=(table,), tokenizer="t", batch_size=8))
    validate(experiment)
    wrong = {
        "a classifier": replace(experiment, model=Single(text=BertText(weights="x"))),
        "a text tower": replace(experiment, model=Single(image=TimmImage("resnet18"), classes=2)),
        "labels of 2 classes": replace(experiment, data=Data(train=(replace(table, label=None),), tokenizer="t")),
        "labels of 3 classes": replace(experiment, model=replace(model, classes=3)),
        "below 1": replace(experiment, objectives={"o": Cutoff(ratio=1.0)}),
    }
    for message, each in wrong.items():
        with pytest.raises(UserError, match=message):
            validate(each)
