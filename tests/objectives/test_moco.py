import math
from dataclasses import replace

import pytest
import torch

from tests.objectives.toys import CPU, ROWS, SAMPLES, WIDTH, assert_two_are_one, forward_of, queues_of, views
from vlp.config import Data, Experiment
from vlp.data.augment import simclr
from vlp.encoders.image import TimmImage
from vlp.errors import UserError
from vlp.models.single import Single
from vlp.objectives.moco import Moco, encode_in_groups, encode_shuffled, has_batch_norm
from vlp.optim.ema import MomentumConfig
from vlp.testing import part_of

GROWING = Moco(queue_size=11, random_start=False, temperature=0.3)


def by_the_equation(f, memory, temperature: float, left_out: bool) -> float:
    """Compute He et al. 2020, eq. 1, row by row."""
    queries = f.model.encode_image(f.batch.image).embed
    keys = f.momentum.model.encode_image(f.batch.views[0].image).embed
    total = 0.0
    for i, query in enumerate(queries.detach()):
        positive = math.exp(float(query @ keys[i]) / temperature)
        negatives = [
            math.exp(float(query @ row.double()) / temperature)
            for row, index in zip(memory["key"], memory.image_id.tolist())
            if not (left_out and index == f.batch.image_id[i])
        ]
        total -= math.log(positive / (positive + sum(negatives)))
    return total / len(queries)


@pytest.mark.parametrize("duplicates", ["negative", "mask"])
@pytest.mark.parametrize("random_start", [False, True])
def test_loss_equals_equation_1(duplicates, random_start):
    objective = replace(GROWING, duplicates=duplicates, random_start=random_start)
    f = forward_of(objective, views())
    memory = f.context.queues[objective]
    assert len(memory) == (11 if random_start else 3)
    assert random_start or f.batch.image_id[1] == memory.image_id[0]  # one row of the queue shows an image of the batch
    expected = by_the_equation(f, memory, 0.3, duplicates == "mask")
    assert objective(f).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("duplicates", ["negative", "mask"])
def test_empty_queue_gives_zero_loss_and_a_finite_gradient(duplicates):
    objective = replace(GROWING, duplicates=duplicates)
    f = forward_of(objective, views())
    f.context.queues[objective]._filled = 0
    loss = objective(f)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert f.model.head.weight.grad.norm().item() == pytest.approx(0, abs=1e-6)


def test_equal_embeddings_give_log_of_one_plus_queue_size():
    objective = replace(GROWING, random_start=True)
    f = forward_of(objective, views())
    with torch.no_grad():
        for model in (f.model, f.momentum.model):
            model.head.weight.zero_()
            model.head.bias.fill_(1.0)
    f.context.queues[objective]["key"].fill_(WIDTH**-0.5)
    assert objective(f).item() == pytest.approx(math.log(1 + 11), rel=1e-6)


@pytest.mark.parametrize("size", [1, 3, 8, 11])
def test_queue_gets_the_keys_of_the_momentum_encoder_for_any_length(size):
    objective = replace(GROWING, queue_size=size)
    f = forward_of(objective, views())
    objective(f)
    with torch.no_grad():
        kept = objective.enqueue(f)
    expected = f.momentum.model.encode_image(f.batch.views[0].image).embed
    assert torch.equal(kept["key"], expected) and torch.equal(kept["image_id"], f.batch.image_id)
    queue = objective.init_queue(f.model, SAMPLES, CPU, torch.Generator())
    queue.push(**kept)
    newest = torch.cat([queue["key"], queue["key"]])[queue._pointer : queue._pointer + len(queue)]
    torch.testing.assert_close(newest[-min(size, ROWS) :], expected[-min(size, ROWS) :].float())


def test_each_network_runs_once_and_only_the_model_has_a_gradient():
    f = forward_of(GROWING, views())
    GROWING(f).backward()
    with torch.no_grad():
        GROWING.enqueue(f)
    assert f.cached_embeddings().keys() == {"image", "key"} and not f.views[0].cached_embeddings()
    assert not f.momentum.cached_embeddings() and f.momentum.views[0].cached_embeddings().keys() == {"image"}
    assert f.model.head.weight.grad.norm() > 0 and f.momentum.model.head.weight.grad is None


def test_shuffled_keys_without_batch_norm_are_the_keys():
    f = forward_of(GROWING, views())
    plain = f.momentum.model.encode_image(f.batch.views[0].image)
    encoded = encode_shuffled(f.momentum.model.encode_image, f.batch.views[0].image, 3)
    torch.testing.assert_close(encoded.embed, plain.embed)
    torch.testing.assert_close(encoded.tokens, plain.tokens[:, :1])


def test_towers_without_batch_norm_are_not_grouped():
    objective = replace(GROWING, groups=4)
    f = forward_of(objective, views())
    objective(f)
    assert not has_batch_norm(f.model) and not has_batch_norm(Single(image=TimmImage("test_vit")).build())
    assert has_batch_norm(Single(image=TimmImage("test_resnet")).build())
    assert torch.equal(f.image.embed, f.model.encode_image(f.batch.image).embed)


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return Single(image=TimmImage("test_resnet", image_size=32), head="mlp", embed_size=32).build().train()


GROUPS = 4


def told_apart_by_statistics(tower, encode) -> float:
    """Return the share of queries that are most similar to the key of their own group.

    The same image is in every group, so that only BatchNorm's statistics of a group distinguish the keys.
    """
    torch.manual_seed(1)
    right, rows, trials = 0, 32, 8
    twins = torch.arange(0, rows, rows // GROUPS)
    for _ in range(trials):
        base = torch.randn(rows, 3, 32, 32) * torch.rand(rows, 1, 1, 1) + torch.randn(rows, 3, 1, 1)
        query, key = (base + 0.3 * torch.randn_like(base) for _ in range(2))
        query[twins] = key[twins] = base[0].clone()
        with torch.no_grad():
            queries = encode_in_groups(tower.encode_image, query, GROUPS).embed[twins]
            keys = encode(tower.encode_image, key, GROUPS).embed[twins]
        right += int(((queries @ keys.T).argmax(1) == torch.arange(GROUPS)).sum())
    return right / (GROUPS * trials)


def test_shuffling_removes_the_leak_through_batch_norm_statistics(tower):
    assert told_apart_by_statistics(tower, encode_in_groups) > 0.9
    assert told_apart_by_statistics(tower, encode_shuffled) < 0.45  # chance 0.25


def test_groups_are_normalised_separately_and_shuffling_permutes_the_keys():
    objective = replace(GROWING, groups=2)
    f = forward_of(objective, views(), norm=True)
    torch.manual_seed(7)
    objective(f)
    torch.manual_seed(7)
    order = torch.randperm(ROWS)
    halves = [f.model.encode_image(part).embed for part in f.batch.image.chunk(2)]
    torch.testing.assert_close(objective.query(f).embed, torch.cat(halves))
    image = f.batch.views[0].image
    dealt = torch.cat([f.momentum.model.encode_image(part).embed for part in image[order].chunk(2)])
    keys = objective.key(f.momentum.views[0]).embed
    torch.testing.assert_close(keys[order], dealt)
    assert not torch.allclose(
        keys,
        torch.cat([f.momentum.model.encode_image(part).embed for part in image.chunk(2)]),
    )


@pytest.mark.parametrize("duplicates", ["negative", "mask"])
def test_two_processes_equal_one(pair, duplicates):
    objective = replace(GROWING, duplicates=duplicates)
    assert_two_are_one(pair, objective, objective)


@pytest.mark.parametrize("shuffle", [False, True])
def test_two_processes_with_batch_norm_equal_one_with_two_groups(pair, shuffle):
    objective = replace(GROWING, shuffle=shuffle)
    assert_two_are_one(pair, objective, replace(objective, groups=2), norm=True)


def test_mean_over_parts_of_a_batch_equals_the_batch():
    batch, queues = views(), queues_of(GROWING, forward_of(GROWING, views()).model)
    losses = [GROWING(forward_of(GROWING, part_of(batch, slice(i, i + 1)), queues=queues)) for i in range(ROWS)]
    whole = GROWING(forward_of(GROWING, batch, queues=queues))
    assert sum(losses).item() / ROWS == pytest.approx(whole.item(), rel=1e-6)


def test_validate_names_the_missing_setting():
    experiment = Experiment(
        "x",
        Single(image=TimmImage("test_vit")),
        {},
        Data(train=(), views=(simclr(),), batch_size=8),
        momentum=MomentumConfig(),
    )
    Moco().validate(experiment)
    with pytest.raises(UserError, match="Moco needs the momentum encoder"):
        Moco().validate(replace(experiment, momentum=None))
    with pytest.raises(UserError, match="Moco needs 1 further view of each image, not 0"):
        Moco().validate(replace(experiment, data=Data(train=())))
    with pytest.raises(UserError, match="1 to 4 groups"):
        Moco(groups=5).validate(experiment)
