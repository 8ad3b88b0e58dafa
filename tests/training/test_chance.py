"""Losses that stay at chance: the levels of the objectives, and when a line in the log names a loss."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.conftest import make_world, toy_overrides
from tests.fixtures import toy
from tests.objectives.fusing import bundle, pairs, queue_of
from tests.objectives.toys import Net, views
from vlp.forward import Forward
from vlp.objectives.itc import ImageTextContrast, MomentumContrast
from vlp.objectives.itm import ImageTextMatching, matching_loss
from vlp.objectives.masking import TextMasking
from vlp.objectives.mlm import MaskedText
from vlp.specs.overrides import override
from vlp.train import Trainer
from vlp.training.chance import ChanceWatch, History, entropy
from vlp.training.interrupts import TrainingInterrupt
from vlp.training.run_lock import RunLock
from vlp.training.setup import set_up
from vlp.types import keep_host_copy


class Scaled(Net):
    scale = torch.tensor([3.0], dtype=torch.float64)


class Constant(Scaled):
    """A model that gives every input the same embedding."""

    def _encoded(self, pooled):
        return super()._encoded(0 * pooled)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_contrast_of_equal_embeddings_is_at_its_level(smoothing, reduction):
    objective = ImageTextContrast(smoothing, reduction)
    f = Forward(Constant(), views())
    assert objective(f).item() == pytest.approx(objective.chance(f)) and objective.chance(f) >= math.log(8)


@pytest.mark.parametrize("duplicates", ["positive", "negative"])
def test_contrast_of_a_queue_is_at_its_level_if_similarities_are_equal(duplicates):
    objective = MomentumContrast(queue_size=9, duplicates=duplicates, distill=0.4)
    f = bundle(pairs(), {"itc": objective})
    f.context.queues[objective] = queue_of(9, 5)
    flat = [torch.zeros(8, 13, dtype=torch.float64)] * 2
    object.__setattr__(objective, "similarity", lambda *_: flat)
    assert objective(f).item() == pytest.approx(objective.chance(f)) == pytest.approx(math.log(8 + 5))


def test_matching_that_knows_only_the_share_of_pairs_is_at_its_level():
    rows = 8
    logits = torch.tensor([2 / 3, 1 / 3]).log().expand(3 * rows, 2)
    labels, counted = torch.arange(3 * rows) < rows, torch.ones(3 * rows, dtype=torch.bool)
    loss = matching_loss(logits, labels.long(), counted, torch.tensor(3.0 * rows))
    assert loss.item() == pytest.approx(ImageTextMatching().chance(None))


def test_words_that_are_predicted_by_their_frequency_are_at_their_level():
    objective = MaskedText()
    labels = torch.tensor([5] * 700 + [6] * 200 + [7] * 100 + [-100] * 50)
    masked = SimpleNamespace(labels=keep_host_copy(labels, labels.numpy()))
    f = SimpleNamespace(masked=lambda masking: masked if isinstance(masking, TextMasking) else None)
    history = History(50)
    for _ in range(3):
        level = history.level_of(objective.target_classes(f))
    shares = torch.zeros(9).index_fill(0, torch.tensor([5, 6, 7]), 1) * torch.tensor([0, 0, 0, 0, 0, 0.7, 0.2, 0.1, 0])
    logits = shares.log().clamp(min=-50).expand(len(labels), -1)
    assert level == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-3)


def test_entropy_of_few_counts_is_corrected():
    rng = np.random.default_rng(0)
    found = [entropy(np.bincount(rng.integers(50, size=200), minlength=60)) for _ in range(300)]
    assert np.mean(found) == pytest.approx(math.log(50), rel=0.01)
    assert entropy(np.zeros(4, np.int64)) == 0 and entropy(np.array([0, 9])) == 0


def reports(losses, steps=100) -> list[int]:
    """Return the steps, from 1, at which a loss of ITM is reported."""
    watch = ChanceWatch({"itm": ImageTextMatching()}, steps)
    return [n for n, loss in enumerate(losses, 1) if watch.update({"itm": loss}, None)]


def test_loss_is_reported_once_after_the_given_number_of_steps_in_a_row():
    level, rng = ImageTextMatching().chance(None), np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 1000)
    assert reports([level] * 1000) == [100] and reports([2 * level] * 150) == [100]
    assert len(reports(level + noise * level)) == 1
    assert reports(level * (0.9 + noise)) == []
    assert reports([level] * 99 + [0.5 * level] * 200) == []
    assert reports([level] * 1000, steps=0) == []
    assert len(reports([level] * 90 + [level / 2] * 90 + [level] * 400)) == 1


@pytest.mark.parametrize("lr, is_reported", [(1e-12, True), (1e-2, False)])
def test_model_that_does_not_learn_is_reported_and_one_that_learns_is_not(lr, is_reported):
    objective, model, batch = ImageTextContrast(), Scaled(), views()
    optimizer, watch, found = torch.optim.Adam(model.parameters(), lr), ChanceWatch({"itc": objective}, 300), []
    for _ in range(400):
        f = Forward(model, batch)
        loss = objective(f)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found += watch.update({"itc": loss.item()}, f)
    assert bool(found) == is_reported and len(found) < 2
    if found:
        assert found[0].startswith(
            "objectives.itc: the loss has been at 2.079, that of a model that has learned nothing, for 300"
        )


def test_run_logs_a_loss_that_stays_at_chance(tmp_path, capsys):
    world = make_world(tmp_path)
    spec = replace(toy.config(), evaluate={}, save=replace(toy.config().save, best=None))
    spec = override(spec, [*toy_overrides(world, tmp_path / "runs"), "log.chance_steps=2", "optim.lr=1e-12"])
    run = set_up(spec, False, RunLock(spec.folder))
    trainer = Trainer(run)
    with closing(trainer.micro_batches()) as micro_batches:
        lines = [trainer.step(micro_batches, TrainingInterrupt()).get("at_chance") for _ in range(3)]
    run.close(together=True)
    assert lines[0] is lines[2] is None and "objectives.itc: the loss has been at 2.079" in lines[1][0]
    assert "step 2: objectives.itc: the loss has been at 2.079" in capsys.readouterr().err
