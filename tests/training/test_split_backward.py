"""A backward pass for each loss: the same losses and gradients as one for all, and less that is kept for them."""

import weakref
from dataclasses import replace

import pytest
import torch

from tests.conftest import ROOT, toy_overrides
from tests.models.test_vlmo import ENCODER, OBJECTIVES, SPEC, apart, randomised
from tests.objectives.fusing import assert_same, drawn_by_row, step
from tests.processes import records, run
from vlp.config import load_config
from vlp.distributed import world_size
from vlp.errors import UserError
from vlp.forward import Forward, StepContext
from vlp.losses.inputs import NonFiniteLoss
from vlp.objectives.itc import ImageTextContrast, MomentumContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.mlm import MaskedText
from vlp.specs.json import dump
from vlp.train import Pretrainer
from vlp.training.split_backward import DetachedForward
from vlp.training.validation import validate

ALBEF = {
    "itc": MomentumContrast(queue_size=7, ramp_epochs=1.0),
    "itm": ImageTextMatching(),
    "mlm": MaskedText(distill=0.4, ramp_epochs=1.0),
}
QUEUED = {
    "itc": MomentumContrast(queue_size=7, ramp_epochs=1.0),
    "itc_vl": MomentumContrast(queue_size=7, ramp_epochs=1.0, head="vl"),
    "itm": ImageTextMatching(candidates="all"),
    "mlm": MaskedText(weight=0.25, distill=0.4, ramp_epochs=1.0),
}
CASES = {
    "albef": (ALBEF, None),
    "vlmo": (OBJECTIVES, SPEC),
    "vlmo, words tied": (OBJECTIVES, replace(SPEC, tie_words=True)),
    "vlmo, queues": (QUEUED, SPEC),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_memories_are_those_of_one_pass_for_all(case):
    objectives, spec = CASES[case]
    assert_same(step(0, 1, objectives, spec, DetachedForward), step(0, 1, objectives, spec))


@pytest.mark.parametrize("case", ["albef", "vlmo"])
def test_two_processes_are_one(pair, case):
    objectives, spec = CASES[case]
    objectives = {**objectives, "itm": replace(objectives["itm"], candidates="all")}
    expected = step(0, 1, objectives, spec)
    for found in pair(step, 2, objectives, spec, DetachedForward):
        assert_same(found, expected)


@pytest.mark.parametrize("how", ["none", "cheap", "full"])
def test_dropout_and_recomputation_draw_the_same(how):
    spec = replace(SPEC, encoder=replace(ENCODER, drop_path=0.4, text_dropout=0.2))
    gradients = []
    for bundle in (Forward, DetachedForward):
        model = randomised(spec).train()
        model.set_activation_checkpointing(how)
        torch.manual_seed(3)
        with drawn_by_row():
            Pretrainer(model, OBJECTIVES, bundle)(apart(), None, StepContext())[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


def test_gradients_add_up_over_micro_batches_as_each_is_scaled():
    model, other = randomised(), randomised()
    with drawn_by_row():
        for scale in (0.25, 0.75):
            (scale * Pretrainer(model, OBJECTIVES, DetachedForward)(apart(), None, StepContext())[1]).backward()
        Pretrainer(other, OBJECTIVES)(apart(), None, StepContext())[1].backward()
    for found, wanted in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-12)


def most_kept(bundle) -> int:
    """Bytes that autograd holds at its fullest, of tensors that are no parameters."""
    model = randomised().train()
    own = {p.data_ptr() for p in model.parameters()}
    alive = {"now": 0, "most": 0}

    def let_go(size: int) -> None:
        alive["now"] -= size

    class Kept:
        def __init__(self, tensor):
            self.tensor, size = tensor, 0 if tensor.data_ptr() in own else tensor.nbytes
            alive["now"] += size
            alive["most"] = max(alive["most"], alive["now"])
            weakref.finalize(self, let_go, size)

    with drawn_by_row(), torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        Pretrainer(model, OBJECTIVES, bundle)(apart(), None, StepContext())[1].backward()
    return alive["most"]


def test_no_more_is_kept_than_the_largest_pass_needs():
    assert most_kept(DetachedForward) < 0.75 * most_kept(Forward)


def broken_step(rank):
    model, batch = randomised().float(), apart()
    batch.image = batch.image.float()
    if rank:
        with torch.no_grad():
            model.itm.weight.fill_(torch.nan)
    try:
        with drawn_by_row():
            Pretrainer(model, OBJECTIVES, DetachedForward)(batch, None, StepContext())
    except NonFiniteLoss as error:
        return world_size(), str(error)


def test_a_loss_that_is_not_finite_on_one_process_ends_the_step_on_all(pair):
    (world, first), (_, second) = pair(broken_step)
    assert world == 2
    assert "another process" in first and "row 0 of logits" in second


def test_what_saves_nothing_or_cuts_twice_is_refused():
    experiment = load_config(f"{ROOT}/configs/vlmo/stages.py:pairs")
    with pytest.raises(UserError, match="no objective fuses"):
        alone = {"itc": ImageTextContrast()}
        validate(replace(experiment, objectives=alone, train=replace(experiment.train, backward="per_loss")))
    with pytest.raises(UserError, match="grad_cache both cut"):
        validate(replace(experiment, train=replace(experiment.train, backward="per_loss", grad_cache=True)))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_engines_take_the_gradients_as_they_take_others(world, tmp_path, engine):
    """Three steps under each, of which the second and third hang on the gradients before."""
    from tests.fixtures.toy_vlmo_stages import config as toy_stages

    experiment = toy_stages().stages["3-pairs"]
    (tmp_path / "pairs.json").write_text(dump(replace(experiment, evaluate={})))
    found = {}
    for backward in ("once", "per_loss"):
        overrides = [*toy_overrides(world, tmp_path), f"name={backward}", f"train.backward={backward}", "train.steps=3"]
        done = run("train", tmp_path / "pairs.json", *overrides, world=2, engine=engine)
        assert done.codes == [0, 0], done.errors
        found[backward] = [(r["loss"], r["gradient_norm"]) for r in records(tmp_path / backward)]
    assert len(found["once"]) == 3
    assert found["per_loss"] == [pytest.approx(pair, rel=1e-5) for pair in found["once"]]
