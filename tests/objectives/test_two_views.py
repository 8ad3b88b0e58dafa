"""VICReg, Barlow Twins, BYOL and DCL equal another implementation, and the loss of one process on two."""

from __future__ import annotations

import shutil

import pytest
import torch
from lightly.loss import BarlowTwinsLoss, DCLLoss, NegativeCosineSimilarity, VICRegLoss
from torch.nn.functional import normalize

from tests.conftest import ROOT, toy_overrides
from tests.objectives.toys import Net, assert_two_are_one, views
from tests.processes import losses, resume, run, tensors
from vlp.errors import UserError
from vlp.forward import Bundle, Forward
from vlp.loading.run import load_run
from vlp.objectives.barlow_twins import BarlowTwins, barlow_twins_loss
from vlp.objectives.byol import Byol, Predictor, byol_loss
from vlp.objectives.dcl import Dcl, dcl_loss
from vlp.objectives.pairwise import Tuplet
from vlp.objectives.vicreg import VicReg, vicreg_loss

OBJECTIVES = (VicReg(), BarlowTwins(), Dcl(temperature=0.3), Tuplet(num_negatives=3))


def two_views(rows: int = 12, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(rows, width) * 2 + 1
    return x, x + torch.randn(rows, width)


def test_vicreg_equals_lightly_with_the_published_half_of_the_variance_term():
    x, y = two_views()
    torch.testing.assert_close(vicreg_loss(x, y, 25.0, 12.5, 1.0), VICRegLoss()(x, y), rtol=1e-5, atol=1e-5)


def test_barlow_twins_equals_lightly():
    x, y = two_views()
    torch.testing.assert_close(barlow_twins_loss(x, y, 5e-3), BarlowTwinsLoss(5e-3)(x, y), rtol=1e-5, atol=1e-5)


def test_barlow_twins_is_zero_for_equal_views_without_redundancy():
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert barlow_twins_loss(signs, signs, 5e-3, eps=0.0).item() == pytest.approx(0, abs=1e-6)


def test_byol_is_two_plus_two_negative_cosines():
    predicted, targets = two_views()
    targets = normalize(targets)
    expected = 4 + 4 * NegativeCosineSimilarity()(predicted, targets)
    torch.testing.assert_close(byol_loss(predicted, targets), expected)


def test_byol_has_no_gradient_to_its_targets():
    predicted, targets = (x.requires_grad_() for x in two_views())
    byol_loss(predicted, targets).backward()
    assert targets.grad is None and predicted.grad.norm() > 0


def test_dcl_equals_lightly():
    x, y = (normalize(z) for z in two_views())
    number = torch.arange(len(x))
    is_other = number.repeat(2)[:, None] != number.repeat(2)
    loss = dcl_loss(torch.cat([x, y]), torch.cat([y, x]), torch.cat([x, y]), is_other, 0.1)
    torch.testing.assert_close(loss, DCLLoss(temperature=0.1)(x, y), rtol=1e-5, atol=1e-5)


def test_byol_trains_its_predictor_and_reads_the_momentum_encoder():
    objective = Byol(Predictor(hidden_size=7))
    model, momentum = Net(), Net(seed=9).requires_grad_(False)
    model.add_heads(objective.heads())
    model.double()
    batch = views()
    loss = objective(Forward(model, batch, Bundle(momentum, batch)))
    loss.backward()
    assert 0 < loss.item() < 8
    assert all(p.grad is not None for p in model.heads.parameters())
    assert all(p.grad is None for p in momentum.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_two_processes_equal_one(pair, objective):
    assert_two_are_one(pair, objective, objective)


def test_head_of_an_objective_is_trained_stored_resumed_and_opened(world, tmp_path):
    overrides = [o for o in toy_overrides(world, tmp_path) if "tokenizer" not in o and "data.val" not in o]
    done = run("train", ROOT / "tests" / "fixtures" / "toy_byol.py", *overrides)
    assert not any(done.codes), done.errors
    folder, name = tmp_path / "toy-byol", "heads.byol_predictor.0.weight"
    first, last = (tensors(folder, "model", step)[name] for step in (3, 6))
    assert first.shape == (12, 16) and not torch.equal(first, last)
    assert f"exp_avg/{name}" in tensors(folder, "optimizer") or f"momentum_buffer/{name}" in tensors(
        folder, "optimizer"
    )
    loaded = load_run(folder)
    assert loaded.step == 6 and torch.equal(loaded.eval_model.model.heads["byol_predictor"][0].weight.cpu(), last)
    whole = losses(folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    resume(folder)
    assert losses(folder) == whole and torch.equal(tensors(folder, "model", 6)[name], last)


def test_two_objectives_cannot_have_heads_of_one_name():
    model = Net()
    model.add_heads(Byol().heads())
    with pytest.raises(UserError, match="two objectives ask for a head named 'byol_predictor'"):
        model.add_heads(Byol(Predictor(hidden_size=3)).heads())


def test_weight_of_an_objective_is_given_by_keyword():
    predictor = Predictor(hidden_size=3)
    assert Byol(predictor) == Byol(predictor=predictor, weight=1.0)
    with pytest.raises(TypeError):
        VicReg(1.0, 2.0, 3.0, 4.0)
