from dataclasses import replace

import pytest
import torch

from tests.objectives.toys import ROWS, assert_two_are_one, forward_of, views
from vlp.config import Data, Experiment
from vlp.data.augment import simclr
from vlp.encoders.image import TimmImage
from vlp.errors import UserError
from vlp.models.single import Single
from vlp.objectives.geometry import sides_of
from vlp.objectives.pairwise import NPair, PairContrast, Triplet

SIDES = ("image_text", "images", "texts")


def both(f, sides):
    """Yield the queries and keys of both directions as detached rows."""
    x, y = (side.embed.detach() for side in sides_of(f, sides))
    return ((x, y), (y, x))


def mined(queries, keys, ids, margin, mining) -> list[float]:
    """Compute the hinges of FaceNet's triplets, one anchor at a time."""
    hinges = []
    for i, q in enumerate(queries):
        d = [float((q - k).square().sum()) for k in keys]
        positives = [d[j] for j in range(len(keys)) if ids[j] == ids[i]]
        negatives = [d[j] for j in range(len(keys)) if ids[j] != ids[i]]
        if mining == "hardest":
            hinges.append(max(positives) - min(negatives) + margin)
            continue
        for near in positives:
            semi_hard = [far for far in negatives if near < far < near + margin]
            hinges += [near - min(semi_hard) + margin] if semi_hard else []
    return [max(h, 0.0) for h in hinges]


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("mining", ["semi_hard", "hardest"])
def test_triplet_loss_is_the_mean_over_mined_triplets(sides, mining):
    objective = Triplet(margin=0.5, mining=mining, sides=sides)
    f = forward_of(objective, views())
    hinges = [mined(q, k, f.batch.image_id.tolist(), 0.5, mining) for q, k in both(f, sides)]
    assert all(hinges) and any(map(sum, hinges))
    assert objective(f).item() == pytest.approx(sum(sum(h) / len(h) for h in hinges) / 2)


def test_batch_without_triplets_has_zero_loss_and_gradient():
    f = forward_of(Triplet(), views(rows=1))
    loss = Triplet()(f)
    loss.backward()
    assert loss.item() == 0 and f.model.head.weight.grad.norm() == 0


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("others", [1, 3])
def test_pair_contrast_equals_equation_4_with_own_and_next_keys(sides, others):
    objective = PairContrast(margin=1.3, num_others=others, sides=sides)
    f = forward_of(objective, views())
    ids, values = f.batch.image_id.tolist(), []
    for queries, keys in both(f, sides):
        for i in range(ROWS):
            for step in range(others + 1):
                j = (i + step) % ROWS
                d = float((queries[i] - keys[j]).norm())
                values.append(d**2 / 2 if ids[i] == ids[j] else max(1.3 - d, 0) ** 2 / 2)
    assert objective(f).item() == pytest.approx(sum(values) / len(values))


def test_duplicate_image_elsewhere_in_the_batch_is_a_match():
    """Rows 1 and 6 show the same image and are 5 rows apart."""
    f = forward_of(PairContrast(), views())
    f.batch.image_id[:] = torch.arange(ROWS)
    apart = PairContrast(num_others=5)(f)
    f.batch.image_id[6] = 1
    assert PairContrast(num_others=5)(f) != apart


@pytest.mark.parametrize("sides", SIDES)
def test_n_pair_equals_the_softmax_of_pooled_states_plus_the_penalty(sides):
    objective = NPair(l2=0.3, sides=sides)
    f = forward_of(objective, views())
    x, y = (side.tokens[:, 0].detach() for side in sides_of(f, sides))
    assert not torch.allclose(x.norm(dim=1), torch.ones(ROWS, dtype=x.dtype))
    terms = [
        torch.log(1 + sum(torch.exp(x[i] @ y[j] - x[i] @ y[i]) for j in range(ROWS) if j != i)) for i in range(ROWS)
    ]
    penalty = 0.3 / 2 * torch.cat([x, y]).square().sum(1).mean()
    assert objective(f).item() == pytest.approx((sum(terms) / ROWS + penalty).item())


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize(
    "objective", [Triplet(), Triplet(mining="hardest", margin=0.5), PairContrast(num_others=5), NPair(l2=0.1)]
)
def test_two_processes_equal_one(pair, objective, sides):
    objective = replace(objective, sides=sides)
    assert_two_are_one(pair, objective, objective)


def test_validate_names_the_wrong_setting():
    data = Data(train=(), views=(simclr(),), batch_size=8)
    experiment = Experiment("x", Single(image=TimmImage("test_vit")), {}, data)
    for objective in (Triplet(), PairContrast(), NPair()):
        objective.validate(experiment)
        with pytest.raises(UserError, match=f"{type(objective).__name__} needs at least one further view"):
            objective.validate(replace(experiment, data=Data(train=())))
    with pytest.raises(UserError, match="a micro-batch of 8 has 1 to 7 other rows"):
        PairContrast(num_others=8).validate(experiment)
