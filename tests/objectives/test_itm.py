import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.objectives.fusing import ROWS, assert_same, bundle, drawn_by_row, pairs, step, tiny
from vlp.config import Data, Experiment
from vlp.errors import UserError
from vlp.models.dual import Dual
from vlp.objectives.hard_negatives import sample_hard_negatives
from vlp.objectives.itm import ImageTextMatching, matching_loss
from vlp.optim.ema import MomentumConfig
from vlp.testing import part_of

ITM = ImageTextMatching()


# --- sampling ------------------------------------------------------------------------------------------------------


def frequencies(similarity, candidates, epsilon=0.0, draws=20_000):
    torch.manual_seed(0)
    drawn = sample_hard_negatives(similarity.expand(draws, -1), candidates.expand(draws, -1), epsilon)
    return F.one_hot(drawn, similarity.shape[-1]).double().mean(0)


@pytest.mark.parametrize("epsilon", [0.0, 0.05])
def test_negatives_are_sampled_with_probability_softmax_plus_epsilon(epsilon):
    similarity, candidates = torch.tensor([3.0, 1.0, 0.0, 2.0, -1.0]), torch.tensor([False, True, True, True, False])
    weights = (torch.tensor([1.0, 0.0, 2.0]).softmax(0) + epsilon).double()
    expected = weights / weights.sum()
    found = frequencies(similarity, candidates, epsilon)
    assert found[[0, 4]].sum() == 0
    assert ((found[1:4] - expected).abs() < 4 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_rows_sample_independently_and_a_seed_repeats_the_samples():
    similarity, candidates = torch.zeros(200, 6), torch.ones(200, 6, dtype=torch.bool)
    first, again = (
        sample_hard_negatives(similarity, candidates, generator=torch.Generator().manual_seed(1)) for _ in "ab"
    )
    assert torch.equal(first, again) and set(first.tolist()) == set(range(6))


def test_sampling_keeps_the_order_of_probabilities_that_underflow():
    # the published code has a row of zeros here, and stops
    similarity = torch.tensor([[900.0, -400.0, -398.0, -401.0]])
    assert similarity.softmax(1)[0, 1:].sum() == 0
    candidates = torch.tensor([[False, True, True, True]])
    expected = torch.tensor([-2.0, 0.0, -3.0]).softmax(0).double()
    found = frequencies(similarity[0], candidates[0])[1:]
    assert ((found - expected).abs() < 4 * (expected / 20_000).sqrt()).all()


def test_only_candidates_are_sampled():
    torch.manual_seed(3)
    similarity = torch.randn(500, 12) * 300
    candidates = torch.rand(500, 12) < 0.2
    for epsilon in (0.0, 1e-4):
        drawn = sample_hard_negatives(similarity, candidates, epsilon)
        some = candidates.any(1)
        assert 0 < (~some).sum() < 100
        assert candidates.gather(1, drawn[:, None])[some].all() and ((drawn >= 0) & (drawn < 12)).all()


# --- the loss ------------------------------------------------------------------------------------------------------


def pair_by_pair(f, texts, images, found):
    """Compute the loss by fusing every pair separately."""
    model, total, count = f.model, 0.0, 0
    for i in range(len(f.batch)):
        jobs = [(i, i, 1)] + ([(i, int(texts[i]), 0), (int(images[i]), i, 0)] if found[i] else [])
        for image, text, label in jobs:
            seen = model.encode_image(f.batch.image[image : image + 1])
            read = model.encode_text(f.batch.input_ids[text : text + 1], f.batch.attention_mask[text : text + 1])
            logits = model.match(model.project(seen), read)
            total, count = total + F.cross_entropy(logits, torch.tensor([label])), count + 1
    return total / count


def gradients_of(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("keys", ["momentum", "student"])
@pytest.mark.parametrize("duplicates", ["mask", "negative"])
def test_loss_equals_pairs_fused_one_by_one(keys, duplicates):
    itm = replace(ITM, keys=keys, duplicates=duplicates)
    f = bundle(pairs(), {"itm": itm})
    of = f.momentum if keys == "momentum" else f
    i2t, t2i = f.image.embed @ of.text.embed.T, f.text.embed @ of.image.embed.T
    same = torch.eye(ROWS, dtype=torch.bool)
    if duplicates == "mask":
        same[[1, 6], [6, 1]] = True
    hardest = [similarity.masked_fill(same, -torch.inf).argmax(1) for similarity in (i2t, t2i)]
    with drawn_by_row():
        loss = itm(f)
    expected = pair_by_pair(f, *hardest, [True] * ROWS)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    wanted, found = gradients_of(expected, f.model), gradients_of(loss, f.model)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12, name


@pytest.mark.parametrize("rows", [1, 2])
def test_batch_of_one_image_has_only_the_loss_of_its_pairs(rows):
    batch = part_of(pairs(), slice(0, rows))
    batch = replace(batch, image_id=torch.full((rows,), 7))
    for duplicates in ("mask", "negative")[: 1 if rows == 2 else 2]:
        f = bundle(batch, {"itm": ITM})
        loss = replace(ITM, duplicates=duplicates)(f)
        expected = pair_by_pair(f, [0] * rows, [0] * rows, [False] * rows)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
        wanted, found = gradients_of(expected, f.model), gradients_of(loss, f.model)
        for name, gradient in wanted.items():
            assert (found[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12, name


def test_row_without_a_candidate_has_no_negative_and_other_rows_have():
    batch = replace(part_of(pairs(), slice(0, 4)), image_id=torch.tensor([5, 5, 5, 6]))
    f = bundle(batch, {"itm": ITM})
    with drawn_by_row():
        loss = ITM(f)  # rows 0 to 2 have row 3 alone, and row 3 has all of them
    candidates = f.scope("local")
    texts, images, _ = ITM.sample(f, candidates, ITM.allowed(f, candidates))
    assert texts[:3].tolist() == images[:3].tolist() == [3, 3, 3]
    assert loss.isfinite()


def test_uniform_negatives_read_no_embeddings_and_are_equally_frequent():
    itm = replace(ITM, negatives="uniform")
    f = bundle(pairs(), {"itm": itm})
    torch.manual_seed(0)
    candidates = f.scope("local")
    allowed = itm.allowed(f, candidates)
    drawn = torch.stack([torch.stack(itm.sample(f, candidates, allowed)[:2]) for _ in range(2000)])  # (draws, 2, B)
    shares = F.one_hot(drawn, ROWS).double().mean((0, 1))
    expected = allowed.double() / allowed.sum(1, keepdim=True)
    assert ((shares - expected).abs() <= 4 * (expected / 4000).sqrt()).all()
    assert not f.cached_embeddings()


@pytest.mark.parametrize("progress, share", [(0.0, 0.0), (0.5, 0.2), (1.5, 0.6), (9.0, 0.6)])
def test_share_of_hard_negatives_grows_to_its_value(progress, share):
    itm = replace(ITM, hard_share=0.6, hard_ramp_epochs=1.5)
    f = bundle(pairs(), {"itm": itm}, progress=progress)
    candidates = f.scope("local")
    allowed = itm.allowed(f, candidates)
    i2t, t2i = f.image.embed @ f.momentum.text.embed.T, f.text.embed @ f.momentum.image.embed.T
    hard = (f.scale * torch.stack([i2t, t2i])).masked_fill(~allowed, -torch.inf).softmax(2).detach()  # (2, B, B)
    expected = share * hard + (1 - share) * allowed / allowed.sum(1, keepdim=True)
    torch.manual_seed(0)
    drawn = torch.stack([torch.stack(itm.sample(f, candidates, allowed)[:2]) for _ in range(4000)])  # (draws, 2, B)
    found = F.one_hot(drawn, ROWS).double().mean(0)
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_share_of_one_draws_the_published_negatives():
    f = bundle(pairs(), {"itm": ITM})
    candidates = f.scope("local")
    allowed = ITM.allowed(f, candidates)
    torch.manual_seed(5)
    found = torch.stack(ITM.sample(f, candidates, allowed)[:2])
    i2t, t2i = f.image.embed @ f.momentum.text.embed.T, f.text.embed @ f.momentum.image.embed.T
    torch.manual_seed(5)
    expected = sample_hard_negatives((f.scale * torch.cat([i2t, t2i])).detach(), allowed.repeat(2, 1))
    assert torch.equal(found.flatten(), expected)


def test_every_network_runs_once():
    f = bundle(pairs(), {"itm": ITM})
    passes = []
    for name, module in {"image": f.model.image, "text": f.model.text, "fusion": f.model.fusion}.items():
        module.register_forward_hook(lambda *_, name=name: passes.append(name))
    ITM(f)
    assert sorted(passes) == ["fusion", "image", "text"]


def test_all_padding_caption_has_a_loss():
    batch = pairs()
    mask = batch.attention_mask.clone()
    mask[3] = False
    f = bundle(replace(batch, attention_mask=mask), {"itm": ITM})
    loss = ITM(f)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in f.model.parameters() if p.grad is not None)


def test_equal_logits_have_loss_log_2_for_any_count():
    counted = torch.tensor([True, True, False])
    loss = matching_loss(torch.zeros(3, 2), torch.tensor([1, 0, 0]), counted, torch.tensor(2.0))
    assert loss.item() == pytest.approx(math.log(2))


def test_two_processes_equal_one_with_global_candidates(pair):
    objectives = {"itm": replace(ITM, candidates="global")}
    expected = step(0, 1, objectives)
    for found in pair(step, 2, objectives):
        assert_same(found, expected)


def test_two_processes_with_local_candidates_are_the_mean_of_two_batches(pair):
    objectives, halves = {"itm": ITM}, []
    for part in (slice(0, 4), slice(4, 8)):
        with drawn_by_row():
            halves.append(ITM(bundle(part_of(pairs(), part), objectives)).item())
    for losses, _, _ in pair(step, 2, objectives):
        assert losses["itm"] == pytest.approx(sum(halves) / 2, rel=1e-9)


def test_validate_names_the_missing_setting():
    experiment = Experiment("x", tiny(), {}, Data(train=()), momentum=MomentumConfig())
    ITM.validate(experiment)
    replace(ITM, negatives="uniform").validate(replace(experiment, momentum=None, model=tiny(itc=False)))
    replace(ITM, keys="student").validate(replace(experiment, momentum=None))
    for wrong, message in (
        (replace(experiment, momentum=None), "needs the momentum encoder"),
        (replace(experiment, model=tiny(itm=False)), "model.itm=true"),
        (replace(experiment, model=tiny(itc=False)), "negatives=uniform"),
        (replace(experiment, model=Dual(image=tiny().image, text=tiny().text)), "a model that fuses"),
    ):
        with pytest.raises(UserError, match=message):
            ITM.validate(wrong)
    with pytest.raises(UserError, match="hard_share and hard_ramp_epochs are of negatives=hard"):
        replace(ITM, negatives="uniform", hard_share=0.5).validate(experiment)
