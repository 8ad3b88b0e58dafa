import math

import pytest
import torch
import torch.nn.functional as F

from vlp.errors import NonFiniteLoss
from vlp.losses.npair import n_pair_loss, tuplet_loss
from vlp.losses.pairwise import triplet_loss
from vlp.losses.softmax import info_nce


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def unit(*shape, seed=0):
    return F.normalize(normal(*shape, seed=seed), dim=-1)


def dot(x, y):
    return sum(a * b for a, b in zip(x.tolist(), y.tolist()))


def test_tuplet_loss_is_the_definition():
    a, p, n, total = normal(5, 3), normal(5, 3, seed=1), normal(5, 4, 3, seed=2), 0.0
    for i in range(5):
        total += math.log(1 + sum(math.exp(dot(a[i], n[i, j]) - dot(a[i], p[i])) for j in range(4)))
    assert tuplet_loss(a, p, n).item() == pytest.approx(total / 5, rel=1e-12)


def test_one_negative_is_a_smooth_triplet_loss():
    """At unit norm a.n - a.p = (d_ap^2 - d_an^2) / 2. A longer anchor turns softplus into the hinge."""
    a, p, n = unit(50, 8), unit(50, 8, seed=1), unit(50, 1, 8, seed=2)
    excess = (a - p).square().sum(1) - (a - n[:, 0]).square().sum(1)
    torch.testing.assert_close(tuplet_loss(a, p, n), F.softplus(excess / 2).mean(), rtol=1e-12, atol=0)
    hinge = triplet_loss(a, p, n[:, 0], margin=0.0) / 2
    gaps = [(tuplet_loss(sharp * a, p, n) / sharp - hinge).item() for sharp in (1, 10, 100, 1000)]
    assert gaps == sorted(gaps, reverse=True)
    assert 0 < gaps[0] <= math.log(2)
    assert 0 < gaps[-1] < 1e-4


def test_tuplet_loss_is_info_nce_among_the_tuplet():
    a, p, n = normal(1, 3), normal(1, 3, seed=1), normal(1, 4, 3, seed=2)
    expected = info_nce(a, torch.cat([p, n[0]]), 1.0, torch.zeros(1).long(), torch.arange(5))
    torch.testing.assert_close(tuplet_loss(a, p, n), expected, rtol=1e-12, atol=0)


def test_n_pair_loss_is_the_definition():
    a, p, total = normal(5, 3), normal(5, 3, seed=1), 0.0
    for i in range(5):
        total += math.log(1 + sum(math.exp(dot(a[i], p[j]) - dot(a[i], p[i])) for j in range(5) if j != i))
    penalty = sum(dot(x, x) for x in torch.cat([a, p])) / 10
    assert n_pair_loss(a, p, l2=0.3).item() == pytest.approx(total / 5 + 0.3 / 2 * penalty, rel=1e-12)


def test_n_pair_loss_is_the_tuplet_loss_of_the_others_positives():
    a, p = normal(5, 3), normal(5, 3, seed=1)
    others = torch.stack([p[[j for j in range(5) if j != i]] for i in range(5)])
    torch.testing.assert_close(n_pair_loss(a, p, l2=0), tuplet_loss(a, p, others), rtol=1e-12, atol=0)


def test_n_pair_loss_equals_pytorch_metric_learning_with_its_conventions_set():
    """With no normalisation, squared norms in the penalty and 1/2 in its weight. Their defaults differ."""
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, regularizers

    a, p, l2 = normal(6, 3), normal(6, 3, seed=1), 0.1
    theirs = losses.NPairsLoss(
        distance=distances.DotProductSimilarity(normalize_embeddings=False),
        embedding_regularizer=regularizers.LpRegularizer(power=2),
        embedding_reg_weight=l2 / 2,
    )
    ids = torch.arange(6).repeat(2)
    torch.testing.assert_close(n_pair_loss(a, p, l2), theirs(torch.cat([a, p]), ids), rtol=1e-10, atol=0)
    assert abs(losses.NPairsLoss()(torch.cat([a, p]), ids) - n_pair_loss(a, p, 0)) > 0.1


def test_gradients_are_the_numerical_ones():
    a, p, n = (x.requires_grad_() for x in (normal(4, 3), normal(4, 3, seed=1), normal(4, 2, 3, seed=2)))
    assert torch.autograd.gradcheck(tuplet_loss, (a, p, n))
    assert torch.autograd.gradcheck(lambda a, p: n_pair_loss(a, p, 0.1), (a, p))


def test_large_norms_do_not_overflow():
    a, p, n = 1e4 * unit(4, 3), 1e4 * unit(4, 3, seed=1), 1e4 * unit(4, 2, 3, seed=2)
    assert tuplet_loss(a.float(), p.float(), n.float()).isfinite()
    assert n_pair_loss(a.float(), p.float()).isfinite()


def test_equal_embeddings_give_the_log_of_their_number():
    x = unit(1, 3).expand(7, -1)
    assert n_pair_loss(x, x, l2=0).item() == pytest.approx(math.log(7))
    assert tuplet_loss(x, x, x.expand(7, 7, 3)).item() == pytest.approx(math.log(8))


def test_no_negative_gives_zero():
    a, p = unit(1, 3), unit(1, 3, seed=1)
    assert tuplet_loss(a, p, a[:, None][:, :0]).item() == 0
    assert n_pair_loss(a, p, l2=0.5).item() == pytest.approx(0.25)  # the penalty of unit norms


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_row_is_named(bad):
    a, p, n = unit(4, 3), unit(4, 3, seed=1), unit(4, 2, 3, seed=2)
    p[2, 1] = n[3, 0, 0] = bad
    with pytest.raises(NonFiniteLoss, match="row 2 of positive"):
        n_pair_loss(a, p)
    with pytest.raises(NonFiniteLoss, match="row 3 of negatives"):
        tuplet_loss(a, a, n)


def test_shapes_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="pairs of rows"):
        n_pair_loss(unit(3, 2), unit(4, 2))
    with pytest.raises(ValueError, match="pairs of rows"):
        n_pair_loss(unit(3, 2)[:0], unit(3, 2)[:0])
    with pytest.raises(ValueError, match=r"negatives \(3, N, 2\)"):
        tuplet_loss(unit(3, 2), unit(3, 2), unit(3, 2))
