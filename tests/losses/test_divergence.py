import math

import pytest
import torch
import torch.nn.functional as F

from vlp.errors import NonFiniteLoss
from vlp.losses.divergence import jensen_shannon


def views(number, rows=5, classes=4):
    generator = torch.Generator().manual_seed(0)
    return list(2 * torch.randn(number, rows, classes, dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_is_the_mean_kl_to_the_mixture(number):
    logits = views(number)
    probabilities, total = [view.softmax(1).tolist() for view in logits], 0.0
    for row in range(5):
        mean = [sum(p[row][c] for p in probabilities) / number for c in range(4)]
        total += sum(p[row][c] * math.log(p[row][c] / mean[c]) for p in probabilities for c in range(4)) / number
    assert jensen_shannon(*logits).item() == pytest.approx(total / 5, rel=1e-10, abs=1e-15)


def test_equals_scipy():
    distance = pytest.importorskip("scipy.spatial.distance")
    p, q = views(2)
    expected = distance.jensenshannon(p.softmax(1).numpy(), q.softmax(1).numpy(), axis=1) ** 2  # scipy's is the root
    assert jensen_shannon(p, q).item() == pytest.approx(expected.mean())


def test_is_the_entropy_of_the_mixture_less_the_mean_entropy():
    p = torch.stack(views(3)).softmax(2)
    expected = torch.special.entr(p.mean(0)).sum(1).mean() - torch.special.entr(p).sum(2).mean()
    torch.testing.assert_close(jensen_shannon(*views(3)), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("number", [2, 3])
def test_certain_views_that_disagree_reach_the_maximum_log_v(number):
    logits = [60.0 * F.one_hot(torch.tensor([v]), number).double() for v in range(number)]
    assert jensen_shannon(*logits).item() == pytest.approx(math.log(number))
    mean = torch.stack(logits).softmax(2).mean(0)
    swapped = sum(F.kl_div(view.log_softmax(1), mean, reduction="batchmean") for view in logits) / number
    assert swapped > 10 * math.log(number)  # as in the published Cutoff code


def test_equal_views_have_zero_divergence_and_gradient():
    logits = views(1)[0].requires_grad_()
    loss = jensen_shannon(logits, logits.detach() + 7, logits.detach())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert logits.grad.abs().max() < 1e-15


def test_gradient_is_the_numerical_one():
    assert torch.autograd.gradcheck(jensen_shannon, [view.requires_grad_() for view in views(3)])


def test_excluded_class_has_no_effect_and_zero_gradient():
    p, q = views(2)
    p[:, 3] = q[:, 3] = -torch.inf
    p.requires_grad_()
    loss = jensen_shannon(p, q)
    loss.backward()
    torch.testing.assert_close(loss, jensen_shannon(p[:, :3], q[:, :3]))
    assert (p.grad[:, 3] == 0).all()
    assert p.grad.isfinite().all()


def test_class_excluded_by_one_view_has_a_finite_divergence():
    p, q = views(2)
    p[0, 1] = -torch.inf
    p.requires_grad_(), q.requires_grad_()
    loss = jensen_shannon(p, q)
    loss.backward()
    assert 0 < loss < math.log(2)
    assert p.grad.isfinite().all() and q.grad.isfinite().all()


def test_row_with_nan_or_without_a_class_is_named():
    p, q = views(2)
    q[3, 0] = math.nan
    with pytest.raises(NonFiniteLoss, match="row 3 of logits"):
        jensen_shannon(p, q)
    p[2] = -torch.inf
    with pytest.raises(NonFiniteLoss, match="row 2 of logits"):
        jensen_shannon(p, p)


def test_no_view_no_row_or_other_shapes_are_an_error():
    p, q = views(2)
    for bad in ((p, q[:4]), (p[:0], q[:0])):
        with pytest.raises(ValueError, match="views of one shape"):
            jensen_shannon(*bad)
