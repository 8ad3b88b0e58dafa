"""Accumulated micro-batches with cached gradients are one batch: losses, every gradient, memories, dropout."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import toy_overrides
from tests.objectives.fusing import (
    ROWS,
    assert_same,
    bundle,
    cached_step,
    context_of,
    drawn_by_row,
    networks,
    pairs,
    shortened,
    step,
)
from tests.objectives.toys import part_of
from tests.processes import losses, tensors, train
from vlp.config import Data, Experiment
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.objectives.itc import ImageTextContrast, MomentumContrast, SigmoidContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.mlm import MaskedText
from vlp.objectives.simclr import SimClr
from vlp.training import grad_cache

ALBEF = {
    "itc": MomentumContrast(queue_size=7),
    "itm": ImageTextMatching(candidates="all"),
    "mlm": MaskedText(distill=0.4, ramp_epochs=1.0),
}
SETS = {
    "albef": ALBEF,
    "albef without momentum": {
        "itc": ImageTextContrast(label_smoothing=0.1),
        "itm": ImageTextMatching(keys="student", epsilon=1e-4),
        "mlm": MaskedText(),
    },
    "contrast": {"itc": ImageTextContrast()},
}


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", SETS)
def test_micro_batches_are_the_whole_batch(name, parts):
    expected = step(0, 1, SETS[name])
    assert_same(cached_step(0, 1, SETS[name], parts), expected)


def test_two_processes_without_are_the_whole_batch_too(pair):
    expected = step(0, 1, ALBEF)
    for found in pair(step, 2, ALBEF):
        assert_same(found, expected)


def test_two_processes_with_two_micro_batches_each_are_the_whole_batch(pair):
    expected = step(0, 1, ALBEF)
    assert expected[1].keys() >= {"temperature", "itm.weight", "mlm.bias"}
    for found in pair(cached_step, 2, ALBEF, 2):
        assert_same(found, expected)


class Held(Forward):
    """Draws as the cached bundle does, and keeps the graph."""

    def encode(self, encode, *given):
        with grad_cache.seeded(int(torch.randint(2**62, ())), given[0].device):
            return encode(*given)


def test_dropout_is_the_same_in_both_passes():
    gradients = []
    for cached in (True, False):
        model, momentum = networks(dropout=0.3)
        momentum.eval()
        batches = [shortened(part_of(pairs(), part)) for part in (slice(0, 4), slice(4, 8))]
        context = context_of(ALBEF)
        found = grad_cache.bundles(model, batches, momentum, context)
        if not cached:
            found = [Held(model, f.batch, f.momentum, context) for f in found]
            grad_cache.join(found)
        torch.manual_seed(5)
        with drawn_by_row():
            totals = []
            for f in found:
                totals.append(sum(objective(f) for objective in ALBEF.values()) / 2)
                if cached:
                    totals[-1].backward()
        if cached:
            after = torch.rand(())
            for f in found:
                f.replay()
        else:
            assert torch.rand(()) == after  # the replay has drawn nothing from the common stream
            sum(totals).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[1].items():
        assert (gradients[0][name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12, name


def test_encodings_have_no_graph_before_the_replay():
    model, momentum = networks()
    f, _ = grad_cache.bundles(model, [part_of(pairs(), slice(0, 4))] * 2, momentum, context_of(ALBEF))
    assert f.image.tokens.is_leaf and f.image.tokens.grad_fn is None and f.text.embed.requires_grad
    with drawn_by_row():
        loss = sum(objective(f) for objective in ALBEF.values())
    assert "projected" in vars(f)
    f.free_activations()
    assert "projected" not in vars(f)
    loss.backward()
    assert all(p.grad is None for p in model.image.parameters())
    f.replay()
    assert all(p.grad is not None for p in model.image.parameters())


def test_objective_that_sees_its_own_micro_batch_only_is_refused():
    experiment = Experiment("x", None, {"itc": SigmoidContrast()}, Data(train=()))
    grad_cache.validate(experiment)
    with pytest.raises(UserError, match=r"objectives.views \(SimClr\) compares the rows of a micro-batch alone"):
        grad_cache.validate(replace(experiment, objectives={"views": SimClr()}))


def test_bundle_of_one_has_no_reference_to_itself():
    f = bundle(pairs(), {})
    assert f.micro_batches == (f,) and f not in vars(f).values() and (f,) not in vars(f).values()
    assert f.rows().tolist() == list(range(ROWS))


PLAIN = ("model.text.dropout=0", "train.steps=3", "objectives.itc.label_smoothing=0.1", "evaluate_every=0")
CACHED = (*PLAIN, "train.accumulation=2", "train.grad_cache=true")


@pytest.mark.parametrize("world_size", [1, 2])
def test_accumulated_micro_batches_train_as_the_whole_batch(world, tmp_path, world_size):
    data = toy_overrides(world, tmp_path)
    train(*data, "name=whole", *PLAIN)
    train(*data, "name=cached", *CACHED, world=world_size)
    train(*data, "name=parts", *PLAIN, "train.accumulation=2")
    whole, cached, parts = (losses(tmp_path / name) for name in ("whole", "cached", "parts"))
    assert cached == pytest.approx(whole, rel=1e-5) and parts != pytest.approx(whole, rel=1e-2)
    expected, found = (tensors(tmp_path / name, "optimizer") for name in ("whole", "cached"))
    for name, value in expected.items():
        if name.startswith("exp_avg/"):
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
