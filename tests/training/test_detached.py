"""Split graphs: gradient caching over micro-batches, and a backward pass per loss, give the losses and gradients of one graph."""

import weakref
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from tests.conftest import ROOT, toy_overrides
from tests.models.test_vlmo import ENCODER, OBJECTIVES, SPEC, apart, randomised
from tests.objectives.fusing import (
    CACHED,
    CACHED_PER_LOSS,
    PER_LOSS,
    ROWS,
    assert_same,
    bundle,
    context_of,
    drawn_by_row,
    networks,
    pairs,
    shortened,
    step,
)
from tests.processes import losses, records, run, tensors, train
from vlp.config import Data, Experiment, Training, load_config
from vlp.distributed import world_size
from vlp.errors import NonFiniteLoss, UserError
from vlp.forward import Graph, MicroBatches, StepContext
from vlp.objectives.itc import ImageTextContrast, MomentumContrast, SigmoidContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.mlm import MaskedText
from vlp.objectives.simclr import SimClr
from vlp.specs.json import dump
from vlp.testing import part_of
from vlp.train import Pretrainer, single_graph
from vlp.training import detached
from vlp.training.detached import DetachedGraph, seeded
from vlp.training.validation import validate

ALBEF = {
    "itc": MomentumContrast(queue_size=7, ramp_epochs=1.0),
    "itm": ImageTextMatching(candidates="global"),
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

# --- gradient caching ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", SETS)
def test_cached_micro_batches_are_the_whole_batch(name, parts):
    expected = step(0, 1, SETS[name])
    assert_same(step(0, 1, SETS[name], graph=CACHED, parts=parts), expected)


@pytest.mark.parametrize("name", SETS)
def test_micro_batches_in_one_graph_are_the_whole_batch(name):
    assert_same(step(0, 1, SETS[name], parts=2), step(0, 1, SETS[name]))


def test_micro_batches_with_a_backward_pass_per_loss_are_the_whole_batch():
    assert_same(step(0, 1, ALBEF, graph=CACHED_PER_LOSS, parts=2), step(0, 1, ALBEF))
    assert_same(step(0, 1, OBJECTIVES, SPEC, CACHED_PER_LOSS, parts=2), step(0, 1, OBJECTIVES, SPEC))


def test_two_processes_are_the_whole_batch(pair):
    expected = step(0, 1, ALBEF)
    for found in pair(step, 2, ALBEF):
        assert_same(found, expected)


def test_two_processes_with_two_micro_batches_each_are_the_whole_batch(pair):
    expected = step(0, 1, ALBEF)
    assert expected[1].keys() >= {"temperature", "itm.weight", "mlm.bias"}
    for found in pair(step, 2, ALBEF, None, CACHED, 2):
        assert_same(found, expected)


class Seeded(Graph):
    """Draws like the cached graph, and keeps the graph."""

    def encode(self, model, encode, *inputs):
        with seeded(int(torch.randint(2**62, ())), inputs[0].device):
            return encode(*inputs)


def test_dropout_is_the_same_in_both_encodings():
    gradients, after = [], []
    for graph in (CACHED, lambda model: Seeded()):
        model, momentum = networks(dropout=0.3)
        momentum.eval()
        batches = [shortened(part_of(pairs(), part)) for part in (slice(0, 4), slice(4, 8))]
        torch.manual_seed(5)
        with drawn_by_row():
            _, total, _ = Pretrainer(model, ALBEF, graph)(batches, momentum, context_of(ALBEF))
        after.append(torch.rand(()))
        total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert after[0] == after[1]  # the second encoding draws nothing from the common generator
    for name, gradient in gradients[1].items():
        assert (gradients[0][name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12, name


def test_towers_get_their_gradient_from_the_second_encoding():
    model, momentum = networks()
    graph = DetachedGraph(model, recompute=True)
    batches = [part_of(pairs(), slice(0, 4))] * 2
    micro_batches = MicroBatches(model, batches, momentum, context_of(ALBEF), graph)
    f = micro_batches[0]
    assert f.image.tokens.is_leaf and f.image.tokens.grad_fn is None and f.text.embed.requires_grad
    with drawn_by_row():
        loss = sum(objective(f) for objective in ALBEF.values())
    assert "projected" in vars(f)
    f.free_activations()
    assert "projected" not in vars(f)
    gradients = detached.Gradients(model.parameters())
    gradients.add([loss], graph.leaves)
    assert all(id(p) not in gradients.at for p in model.image.parameters())
    gradients.propagate(graph.segments)
    assert all(id(p) in gradients.at for p in model.image.parameters())


def test_frozen_tower_has_no_second_encoding():
    """And the gradients of the other parameters stay the same."""
    found = []
    for graph in (CACHED, single_graph):
        model, momentum = networks()
        model.image.requires_grad_(False)
        with drawn_by_row():
            Pretrainer(model, ALBEF, graph)([pairs()], momentum, context_of(ALBEF))[1].backward()
        assert all(p.grad is None for p in model.image.parameters())
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    for name, gradient in found[1].items():
        assert (found[0][name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12, name


class LocalSimClr(SimClr):
    supports_grad_cache: ClassVar[bool] = False


def test_objective_that_does_not_support_grad_cache_is_refused():
    experiment = Experiment("x", None, {"itc": SigmoidContrast()}, Data(train=()), train=Training(grad_cache=True))
    detached.validate(experiment)
    wrong = replace(experiment, objectives={"views": LocalSimClr()})
    with pytest.raises(UserError, match=r"objectives.views \(LocalSimClr\) is not the loss of the whole batch"):
        detached.validate(wrong)
    detached.validate(replace(wrong, train=Training()))


def test_bundle_of_one_has_no_reference_to_itself():
    f = bundle(pairs(), {})
    assert f.micro_batches == (f,) and f not in vars(f).values() and (f,) not in vars(f).values()
    assert f.all.rows.tolist() == list(range(ROWS))


@pytest.mark.parametrize("graph", [single_graph, CACHED])
def test_bundles_are_freed_with_their_step(graph):
    model, momentum = networks()
    batches = [part_of(pairs(), slice(0, 4)), part_of(pairs(), slice(4, 8))]
    with drawn_by_row():
        _, total, micro_batches = Pretrainer(model, ALBEF, graph)(batches, momentum, context_of(ALBEF))
    assert ALBEF["itc"].enqueue(micro_batches[0])["image"].shape[0] == ROWS
    bundles = [weakref.ref(f) for f in micro_batches]
    total.backward()
    del total, micro_batches
    assert [f() for f in bundles] == [None, None]  # without the garbage collector


def test_bundle_without_its_micro_batches_says_so():
    model, _ = networks()
    f = MicroBatches(model, [pairs(), pairs()])[0]
    with pytest.raises(RuntimeError, match="the micro-batches of this step are gone"):
        f.all.image_id  # noqa: B018


PLAIN = ("model.text.dropout=0", "train.steps=3", "objectives.itc.label_smoothing=0.1", "evaluate_every=0")
ACCUMULATED = (*PLAIN, "train.accumulation=2", "train.grad_cache=true")


@pytest.mark.parametrize("processes", [1, 2])
def test_cached_micro_batches_train_like_the_whole_batch(world, tmp_path, processes):
    data = toy_overrides(world, tmp_path)
    train(*data, "name=whole", *PLAIN)
    train(*data, "name=cached", *ACCUMULATED, world=processes)
    train(*data, "name=parts", *PLAIN, "train.accumulation=2")
    whole, cached, parts = (losses(tmp_path / name) for name in ("whole", "cached", "parts"))
    assert cached == pytest.approx(whole, rel=1e-5) and parts != pytest.approx(whole, rel=1e-2)
    expected, found = (tensors(tmp_path / name, "optimizer") for name in ("whole", "cached"))
    for name, value in expected.items():
        if name.startswith("exp_avg/"):
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


# --- a backward pass per loss --------------------------------------------------------------------------------------

QUEUED = {
    "itc": MomentumContrast(queue_size=7, ramp_epochs=1.0),
    "itc_vl": MomentumContrast(queue_size=7, ramp_epochs=1.0, head="vl"),
    "itm": ImageTextMatching(candidates="global"),
    "mlm": MaskedText(weight=0.25, distill=0.4, ramp_epochs=1.0),
}
CASES = {
    "albef": (ALBEF | {"itm": ImageTextMatching()}, None),
    "vlmo": (OBJECTIVES, SPEC),
    "vlmo, words tied": (OBJECTIVES, replace(SPEC, tie_words=True)),
    "vlmo, queues": (QUEUED, SPEC),
}


@pytest.mark.parametrize("case", CASES)
def test_backward_pass_per_loss_gives_the_losses_gradients_and_queues_of_one_graph(case):
    objectives, spec = CASES[case]
    assert_same(step(0, 1, objectives, spec, PER_LOSS), step(0, 1, objectives, spec))


@pytest.mark.parametrize("case", ["albef", "vlmo"])
def test_two_processes_with_a_backward_pass_per_loss_are_one(pair, case):
    objectives, spec = CASES[case]
    objectives = {**objectives, "itm": replace(objectives["itm"], candidates="global")}
    expected = step(0, 1, objectives, spec)
    for found in pair(step, 2, objectives, spec, PER_LOSS):
        assert_same(found, expected)


@pytest.mark.parametrize("mode", ["none", "cheap", "full"])
def test_dropout_and_activation_checkpointing_draw_the_same(mode):
    spec = replace(SPEC, encoder=replace(ENCODER, drop_path=0.4, text_dropout=0.2))
    gradients = []
    for graph in (single_graph, PER_LOSS):
        model = randomised(spec).train()
        model.set_activation_checkpointing(mode)
        torch.manual_seed(3)
        with drawn_by_row():
            Pretrainer(model, OBJECTIVES, graph)([apart()], None, StepContext())[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


def test_gradients_accumulate_over_scaled_totals():
    model, other = randomised(), randomised()
    with drawn_by_row():
        for scale in (0.25, 0.75):
            (scale * Pretrainer(model, OBJECTIVES, PER_LOSS)([apart()], None, StepContext())[1]).backward()
        Pretrainer(other, OBJECTIVES)([apart()], None, StepContext())[1].backward()
    for found, wanted in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-12)


def most_saved_bytes(graph) -> int:
    """Return the most bytes that autograd saves at a time, of tensors that are not parameters."""
    model = randomised().train()
    own = {p.data_ptr() for p in model.parameters()}
    alive = {"now": 0, "most": 0}

    def free(size: int) -> None:
        alive["now"] -= size

    class Saved:
        def __init__(self, tensor):
            self.tensor, size = tensor, 0 if tensor.data_ptr() in own else tensor.nbytes
            alive["now"] += size
            alive["most"] = max(alive["most"], alive["now"])
            weakref.finalize(self, free, size)

    with drawn_by_row(), torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        Pretrainer(model, OBJECTIVES, graph)([apart()], None, StepContext())[1].backward()
    return alive["most"]


def test_backward_pass_per_loss_saves_a_quarter_of_the_activations():
    assert most_saved_bytes(PER_LOSS) < 0.75 * most_saved_bytes(single_graph)


def broken_step(rank, graph):
    model, batch = randomised().float(), apart()
    batch.image = batch.image.float()
    if rank:
        with torch.no_grad():
            model.itm.weight.fill_(torch.nan)
    try:
        with drawn_by_row():
            Pretrainer(model, OBJECTIVES, graph)([batch], None, StepContext())
    except NonFiniteLoss as error:
        return world_size(), str(error)


@pytest.mark.parametrize("graph", [PER_LOSS, CACHED])
def test_loss_that_is_not_finite_on_one_process_ends_the_step_on_all(pair, graph):
    (world, first), (_, second) = pair(broken_step, graph)
    assert world == 2
    assert "another process" in first and "row 0 of logits" in second


def test_split_without_effect_is_refused():
    experiment = load_config(f"{ROOT}/configs/vlmo/pretrain.py")
    with pytest.raises(UserError, match="no objective fuses"):
        alone = {"itc": ImageTextContrast()}
        validate(replace(experiment, objectives=alone, train=replace(experiment.train, backward="per_loss")))
    validate(replace(experiment, train=replace(experiment.train, backward="per_loss", grad_cache=True)))


@contextmanager
def autocast():
    with torch.autocast("cpu", torch.bfloat16):
        yield


@pytest.mark.parametrize("graph", [CACHED, PER_LOSS, CACHED_PER_LOSS])
def test_every_parameter_gets_its_gradient_under_autocast(graph):
    """Autocast keeps bfloat16 copies of weights: one made without a graph must not be used with one."""
    found = []
    for each in (graph, single_graph):
        model, batch = randomised().float(), apart()
        batch.image = batch.image.float()
        with drawn_by_row(), autocast():
            total = Pretrainer(model, OBJECTIVES, each)([batch], None, StepContext())[1]
        total.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[1].items():
        assert (found[0][name] - gradient).norm() <= 0.1 * gradient.norm() + 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_engines_take_the_gradients_of_a_backward_pass_per_loss(world, tmp_path, engine):
    """Three steps under each engine. The second and third depend on the gradients before."""
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


@pytest.mark.slow
def test_deepspeed_takes_the_gradients_of_gradient_caching(world, tmp_path):
    data = toy_overrides(world, tmp_path)
    for name, overrides in {"whole": PLAIN, "cached": ACCUMULATED}.items():
        train(*data, f"name={name}", *overrides, world=2, engine="deepspeed")
    whole, cached = (records(tmp_path / name) for name in ("whole", "cached"))
    for name in ("loss", "gradient_norm"):
        assert [r[name] for r in cached] == pytest.approx([r[name] for r in whole], rel=1e-4)
