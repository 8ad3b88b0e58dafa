import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.objectives.fusing import ROWS, assert_same, bundle, networks, pairs, queue_of, step, tiny
from tests.objectives.toys import CPU
from vlp.config import Data, Experiment
from vlp.errors import UserError
from vlp.models.single import Single
from vlp.objectives.itc import MomentumContrast
from vlp.optim.ema import MomentumConfig
from vlp.testing import part_of

ITC = MomentumContrast(queue_size=7, distill=0.4, ramp_epochs=1.0)


def by_the_equations(f, queue, distill: float, duplicates: str) -> float:
    """Compute Li et al. 2021, eq. 1 and 6, pair by pair."""
    scale, total = f.model.scale.item(), 0.0
    index = [*f.batch.image_id.tolist(), *queue.image_id.tolist()]
    ways = (("image", "text"), ("text", "image"))
    for query, key in ways:
        keys = torch.cat([getattr(f.momentum, key).embed, queue[key]])
        for i in range(len(f.batch)):
            s = [scale * float(getattr(f, query).embed[i] @ k) for k in keys]
            taught = [scale * float(getattr(f.momentum, query).embed[i] @ k) for k in keys]
            if duplicates == "positive":
                true = [float(other == index[i]) for other in index]
            else:
                true = [float(i == j) for j in range(len(index))]
            for j in range(len(index)):
                p = math.exp(s[j]) / sum(map(math.exp, s))
                soft = math.exp(taught[j]) / sum(map(math.exp, taught))
                total -= ((1 - distill) * true[j] / sum(true) + distill * soft) * math.log(p)
    return total / (2 * len(f.batch))


@pytest.mark.parametrize("duplicates", ["positive", "negative"])
@pytest.mark.parametrize("filled", [0, 5])
def test_loss_equals_equations_1_and_6_half_way_through_the_ramp(duplicates, filled):
    itc = replace(ITC, duplicates=duplicates)
    f = bundle(pairs(), {"itc": itc}, filled=filled, progress=0.5)
    queue = f.context.queues[itc]
    assert len(queue) == filled and (not filled or queue.image_id[0] == f.batch.image_id[2])
    assert itc(f).item() == pytest.approx(by_the_equations(f, queue, 0.2, duplicates), rel=1e-9)


@pytest.mark.parametrize(
    "progress, ramp, share", [(0.0, 1.0, 0), (0.25, 1.0, 0.1), (3.0, 1.0, 0.4), (0.5, 2.0, 0.1), (0, 0, 0.4)]
)
def test_teacher_share_grows_linearly_over_the_ramp(progress, ramp, share):
    itc = replace(ITC, ramp_epochs=float(ramp))
    f = bundle(pairs(), {"itc": itc}, progress=progress)
    assert itc(f).item() == pytest.approx(by_the_equations(f, f.context.queues[itc], share, "positive"), rel=1e-9)


@pytest.mark.parametrize("size", [1, 7, 8, 15, 16, 17])
@pytest.mark.parametrize("rows", [1, 8])
def test_queue_length_and_batch_size_are_independent(size, rows):
    itc = replace(ITC, queue_size=size)
    batch = part_of(pairs(), slice(0, rows))
    f = bundle(batch, {"itc": itc}, filled=0)
    with torch.no_grad():
        for network in (f.model, f.momentum.model):  # all embeddings are equal
            for projection in (network.image_projection, network.text_projection):
                projection.weight.zero_()
                projection.bias.fill_(1.0)
    queue = f.context.queues[itc]
    for pushed in range(3):
        held = min(size, pushed * rows)
        assert len(queue) == held
        # each key is as likely as any other
        assert itc(f).item() == pytest.approx(math.log(rows + held), rel=1e-6, abs=1e-6)
        with torch.no_grad():
            queue.push(**itc.enqueue(f))


def test_gradient_flows_only_to_the_model_and_its_temperature():
    f = bundle(pairs(), {"itc": ITC})
    ITC(f).backward()
    assert f.model.temperature.grad.abs() > 0 and f.model.image_projection.weight.grad.norm() > 0
    assert all(p.grad is None for p in f.momentum.model.parameters())
    assert f.cached_embeddings().keys() == {"image", "text"} and "projected" not in vars(f)


def test_random_initial_queue_rows_are_never_positives():
    """Random initial rows have an image id that no image has."""
    itc = replace(ITC, random_start=True)
    model, _ = networks()
    queue = itc.init_queue(model, 100, CPU, torch.Generator().manual_seed(0))
    assert len(queue) == 7 and set(queue.image_id.tolist()) == {-1}
    assert len(replace(itc, random_start=False).init_queue(model, 100, CPU, torch.Generator())) == 0
    f = bundle(pairs(), {"itc": itc})
    f.context.queues[itc] = queue
    targets = itc.targets(f)
    assert targets[:, ROWS:].abs().max() == 0
    expected = torch.eye(ROWS, dtype=torch.float64)
    expected[[1, 1, 6, 6], [1, 6, 1, 6]] = 0.5
    assert torch.equal(targets[:, :ROWS], expected)


@pytest.mark.parametrize("temperature", [-1.0, 0.0, 1e-9, 50.0])
def test_temperature_beyond_a_bound_is_clamped(temperature):
    f = bundle(pairs(), {"itc": ITC})
    with torch.no_grad():
        f.model.temperature.fill_(temperature)
    loss = ITC(f)
    bound = min(max(temperature, f.model.bounds[0]), f.model.bounds[1])
    logits = ITC.similarity(f, f)[0]
    assert loss.isfinite()
    cosine = f.image.embed @ torch.cat([f.momentum.text.embed, f.context.queues[ITC]["text"]]).T
    torch.testing.assert_close(logits, cosine / bound)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in f.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("duplicates", ["positive", "negative"])
def test_two_processes_equal_one(pair, duplicates):
    objectives = {"itc": replace(ITC, duplicates=duplicates)}
    expected = step(0, 1, objectives)
    assert "temperature" in expected[1]
    for found in pair(step, 2, objectives):
        assert_same(found, expected)


def test_local_keys_are_those_of_the_process_and_the_queue_gets_all_rows(pair):
    objectives = {"itc": replace(ITC, keys="local")}
    halves = []
    for part in (slice(0, 4), slice(4, 8)):
        f = bundle(part_of(pairs(), part), objectives)
        halves.append(objectives["itc"](f).item())
    _, _, whole = step(0, 1, objectives)
    for losses, _, kept in pair(step, 2, objectives):
        assert losses["itc"] == pytest.approx(sum(halves) / 2, rel=1e-9)
        for column, rows in whole["itc"].items():
            torch.testing.assert_close(kept["itc"][column], rows)


def test_empty_queue_without_teacher_is_contrast_with_momentum_keys():
    itc = replace(ITC, distill=0.0, duplicates="negative")
    f = bundle(pairs(), {"itc": itc}, filled=0)
    own = torch.arange(ROWS)
    logits = [f.image.embed @ f.momentum.text.embed.T, f.text.embed @ f.momentum.image.embed.T]
    expected = sum(F.cross_entropy(each * f.model.scale, own) for each in logits) / 2
    assert itc(f).item() == pytest.approx(expected.item(), rel=1e-9)


def test_validate_names_the_missing_setting():
    experiment = Experiment("x", tiny(), {}, Data(train=()), momentum=MomentumConfig())
    ITC.validate(experiment)
    for wrong, message in (
        (replace(experiment, momentum=None), "needs the momentum encoder"),
        (replace(experiment, model=Single(image=tiny().image)), "needs a text tower"),
        (replace(experiment, model=tiny(itc=False)), "model.itc=true"),
    ):
        with pytest.raises(UserError, match=message):
            ITC.validate(wrong)


def test_queue_shorter_than_the_batch_keeps_its_newest_rows():
    queue = queue_of(3, 0)
    itc = replace(ITC, queue_size=3)
    f = bundle(pairs(), {"itc": itc}, filled=0)
    with torch.no_grad():
        queue.push(**itc.enqueue(f))
    held = sorted(queue.image_id.tolist())
    assert held == sorted(f.batch.image_id[-3:].tolist())
    f.context.queues[itc] = queue
    assert itc(f).isfinite() and itc.similarity(f, f)[0].shape == (ROWS, ROWS + 3)
