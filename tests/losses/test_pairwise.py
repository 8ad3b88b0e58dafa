import math

import pytest
import torch
import torch.nn.functional as F

from vlp.errors import NonFiniteLoss
from vlp.losses.pairwise import contrastive_loss, hardest_triplets, semi_hard_triplets, triplet_loss


def normal(rows, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, dtype=torch.float64, generator=generator)


def unit(rows, width=4, seed=0):
    return F.normalize(normal(rows, width, seed), dim=1)


def square_distance(x, y):
    return math.dist(x.tolist(), y.tolist()) ** 2


def as_set(triplets):
    return set(zip(*(index.tolist() for index in triplets)))


MATCH = torch.tensor([True, False, True, False, False, True])
IDS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])  # id 3 has one row
NOT_ITSELF = ~torch.eye(9, dtype=torch.bool)


@pytest.mark.parametrize("margin", [1.0, 2.5])
def test_contrastive_loss_is_the_definition_over_pairs(margin):
    a, b, total = normal(6), normal(6, seed=1), 0.0
    for i in range(6):
        d = math.dist(a[i].tolist(), b[i].tolist())
        total += d**2 / 2 if MATCH[i] else max(margin - d, 0) ** 2 / 2
    assert contrastive_loss(a, b, MATCH, margin).item() == pytest.approx(total / 6, rel=1e-12)


def test_contrastive_loss_is_half_the_mean_square_of_pytorch_metric_learnings_terms():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, reducers

    a, b, row = unit(6), unit(6, seed=1), torch.arange(6)
    theirs = losses.ContrastiveLoss(distance=distances.LpDistance(), reducer=reducers.DoNothingReducer())
    pairs = row[MATCH], row[MATCH], row[~MATCH], row[~MATCH]
    terms = theirs(a, indices_tuple=pairs, ref_emb=b)
    expected = torch.cat([terms["pos_loss"]["losses"], terms["neg_loss"]["losses"]]).square().mean() / 2
    torch.testing.assert_close(contrastive_loss(a, b, MATCH), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("loss", ["contrastive", "triplet"])
def test_gradient_is_the_numerical_one(loss):
    x = tuple(normal(6, seed=seed).requires_grad_() for seed in range(3))
    if loss == "contrastive":
        assert torch.autograd.gradcheck(lambda a, b: contrastive_loss(a, b, MATCH, 2.5), x[:2])
    else:
        assert torch.autograd.gradcheck(lambda a, p, n: triplet_loss(a, p, n, 1.0), x)


def test_equal_rows_have_a_finite_gradient():
    a = unit(6).requires_grad_()
    loss = contrastive_loss(a, a.detach(), MATCH)
    loss.backward()
    assert loss.item() == pytest.approx(
        3 / 6 / 2
    )  # the three pairs that do not match have distance 0, a whole margin too close
    assert (a.grad == 0).all()


def test_triplet_loss_equals_torch_with_squared_distances():
    a, p, n = unit(20), unit(20, seed=1), unit(20, seed=2)
    expected = F.triplet_margin_with_distance_loss(
        a, p, n, distance_function=lambda x, y: (x - y).square().sum(1), margin=0.2
    )
    torch.testing.assert_close(triplet_loss(a, p, n), expected, rtol=1e-12, atol=0)


def test_triplet_loss_equals_pytorch_metric_learning_with_its_conventions_set():
    """With squared distances, the same margin, and the mean over all triplets. Their defaults differ."""
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, reducers

    x = unit(9)
    a, p, n = triplets = torch.tensor([[0, 1, 3, 5, 6], [1, 2, 4, 7, 5], [3, 8, 0, 1, 2]]).unbind()
    theirs = losses.TripletMarginLoss(
        margin=0.2, distance=distances.LpDistance(power=2), reducer=reducers.MeanReducer()
    )
    torch.testing.assert_close(triplet_loss(x[a], x[p], x[n]), theirs(x, IDS, triplets), rtol=1e-10, atol=0)


def test_no_triplet_is_a_loss_of_zero_with_a_zero_gradient():
    x = unit(3).requires_grad_()
    none = torch.empty(0, dtype=torch.long)
    loss = triplet_loss(x[none], x[none], x[none])
    loss.backward()
    assert loss.item() == 0
    assert (x.grad == 0).all()


@pytest.mark.parametrize("margin", [0.1, 0.5, 10.0])
def test_semi_hard_is_the_nearest_negative_beyond_each_positive_within_the_margin(margin):
    anchors, candidates = unit(7), unit(9, seed=1)
    ids, expected = torch.tensor([0, 1, 2, 3, 0, 9, 1]), set()
    for a in range(7):
        d = [square_distance(anchors[a], c) for c in candidates]
        for p in range(9):
            inside = [n for n in range(9) if IDS[n] != ids[a] and d[p] < d[n] < d[p] + margin]
            if IDS[p] == ids[a] and inside:
                expected.add((a, p, min(inside, key=d.__getitem__)))
    assert expected
    assert as_set(semi_hard_triplets(anchors, candidates, ids, IDS, margin)) == expected


def test_semi_hard_is_the_nearest_of_what_pytorch_metric_learning_returns():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, miners

    x, nearest = unit(9), {}
    miner = miners.TripletMarginMiner(margin=0.5, type_of_triplets="semihard", distance=distances.LpDistance(power=2))
    for a, p, n in as_set(miner(x, IDS)):
        d = square_distance(x[a], x[n])
        nearest[a, p] = min(nearest.get((a, p), (math.inf, None)), (d, n))
    assert nearest
    expected = {(a, p, n) for (a, p), (_, n) in nearest.items()}
    assert as_set(semi_hard_triplets(x, x, IDS, IDS, 0.5, NOT_ITSELF)) == expected


def test_hardest_is_the_farthest_positive_and_the_nearest_negative():
    anchors, candidates = unit(5), unit(9, seed=1)
    ids, expected = torch.tensor([0, 1, 2, 3, 9]), set()
    for a in range(4):  # the last has no positive
        d = [square_distance(anchors[a], c) for c in candidates]
        positives, negatives = ([j for j in range(9) if (IDS[j] == ids[a]) == own] for own in (True, False))
        expected.add((a, max(positives, key=d.__getitem__), min(negatives, key=d.__getitem__)))
    assert as_set(hardest_triplets(anchors, candidates, ids, IDS)) == expected


def test_hardest_equals_pytorch_metric_learning():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, miners

    x = unit(9)
    expected = as_set(miners.BatchHardMiner(distance=distances.LpDistance())(x, IDS))
    mined = hardest_triplets(x, x, IDS, IDS, NOT_ITSELF)
    assert as_set(mined) == expected
    assert len(mined[0]) == 8  # all but the row without a positive


@pytest.mark.parametrize("mine", [semi_hard_triplets, hardest_triplets])
@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_give_no_triplet(mine, rows):
    x, ids = unit(rows), torch.zeros(rows, dtype=torch.long)
    assert [len(index) for index in mine(x, x, ids, ids)] == [0, 0, 0]


@pytest.mark.parametrize("mine", [semi_hard_triplets, hardest_triplets])
def test_only_allowed_pairs_are_mined(mine):
    x, allowed = unit(9), NOT_ITSELF.clone()
    allowed[:, [1, 4, 7]] = False
    allowed[2] = False
    a, p, n = mine(x, x, IDS, IDS, allowed=allowed)
    assert len(a) > 0
    assert allowed[a, p].all() and allowed[a, n].all()


def test_mining_works_on_half_precision():
    x = unit(9).bfloat16()
    expected = hardest_triplets(x.float(), x.float(), IDS, IDS, NOT_ITSELF)
    with torch.autocast("cpu", torch.bfloat16):
        assert as_set(hardest_triplets(x, x, IDS, IDS, NOT_ITSELF)) == as_set(expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_row_is_named(bad):
    x, y = unit(6), unit(6, seed=1)
    y[1, 0] = bad  # row 1 does not match, so its loss is 0 at an infinite distance
    with pytest.raises(NonFiniteLoss, match="row 1 of b"):
        contrastive_loss(x, y, MATCH)
    with pytest.raises(NonFiniteLoss, match="row 1 of negative"):
        triplet_loss(x, x, y)
    for mine in (semi_hard_triplets, hardest_triplets):
        with pytest.raises(NonFiniteLoss, match="row 1 of candidates"):
            mine(x, y, IDS[:6], IDS[:6])


def test_unpaired_rows_are_an_error():
    with pytest.raises(ValueError, match="pairs of rows"):
        contrastive_loss(unit(6), unit(5), MATCH)
    with pytest.raises(ValueError, match="pairs of rows"):
        contrastive_loss(unit(0), unit(0), MATCH[:0])
    with pytest.raises(ValueError, match="a bool for each, .* torch.float32"):
        contrastive_loss(unit(6), unit(6), MATCH.float())  # floats are ambiguous: in the paper 1 means no match
    with pytest.raises(ValueError, match="triplets of rows"):
        triplet_loss(unit(6), unit(6), unit(5))
    with pytest.raises(ValueError, match="one id per row"):
        hardest_triplets(unit(6), unit(6), IDS, IDS)
