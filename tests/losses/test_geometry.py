import math

import pytest
import torch
import torch.nn.functional as F

from vlp.errors import NonFiniteLoss
from vlp.losses.geometry import alignment, modality_gap, uniformity


def unit(rows, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, dtype=torch.float64, generator=generator), dim=1)


def by_pdist(x, t):
    return torch.pdist(x).pow(2).mul(-t).exp().mean().log()


@pytest.mark.parametrize("alpha", [1, 2])
def test_alignment_is_the_mean_power_of_the_distance(alpha):
    x, y = unit(5), unit(5, seed=1)
    expected = sum(math.dist(a, b) ** alpha for a, b in zip(x.tolist(), y.tolist())) / 5
    assert alignment(x, y, alpha).item() == pytest.approx(expected)


@pytest.mark.parametrize("alpha", [1, 2])
def test_alignment_of_equal_rows_has_a_finite_gradient(alpha):
    x = unit(5).requires_grad_()
    alignment(x, x.detach(), alpha).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("tile_rows", [1, 7, 256])
@pytest.mark.parametrize("normalised", [True, False])
def test_uniformity_and_its_gradient_equal_pdist(tile_rows, normalised):
    x = (unit(23) if normalised else 3 * unit(23) + 1).requires_grad_()
    value, expected = uniformity(x, 1.5, tile_rows), by_pdist(x, 1.5)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(2 * loss, x)[0] for loss in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-14)


def test_uniformity_in_float32_is_close():
    x = unit(100, 64)
    assert uniformity(x.float()).item() == pytest.approx(by_pdist(x, 2).item(), abs=1e-5)


def test_uniformity_of_equal_rows_is_zero_and_of_opposite_rows_minus_four_t():
    x = unit(1).expand(6, -1)
    assert uniformity(x).item() == pytest.approx(0, abs=1e-12)
    assert uniformity(torch.cat([x[:1], -x[:1]]), t=3).item() == pytest.approx(-12)


def test_uniformity_of_far_apart_rows_does_not_underflow():
    x = torch.tensor([[0.0], [1000.0]], dtype=torch.float64)
    assert uniformity(x, t=2).item() == pytest.approx(-2e6)


def test_uniformity_refuses_double_backward():
    x = unit(4).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(uniformity(x), x, create_graph=True)


def test_modality_gap_is_the_distance_of_the_centroids():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    y = torch.tensor([[0.0, -1.0]])
    assert modality_gap(x, y).item() == pytest.approx(math.hypot(0.5, 1.5))


def test_too_few_or_unpaired_rows_are_an_error():
    with pytest.raises(ValueError, match="at least 2 rows"):
        uniformity(unit(1))
    with pytest.raises(ValueError, match="pairs of rows"):
        alignment(unit(3), unit(4))
    with pytest.raises(ValueError, match="both sides"):
        modality_gap(unit(3), unit(3)[:0])


@pytest.mark.parametrize("measure", [uniformity, lambda x: alignment(x, x), lambda x: modality_gap(x, x)])
def test_non_finite_row_is_named(measure):
    x = unit(4)
    x[3, 2] = math.nan
    with pytest.raises(NonFiniteLoss, match="row 3 of x"):
        measure(x)
