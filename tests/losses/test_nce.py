import math

import pytest
import torch
import torch.nn.functional as F

from vlp.errors import NonFiniteLoss
from vlp.losses.nce import draw_noise, instance_softmax_loss, log_partition, nce_loss


def unit(rows, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, dtype=torch.float64, generator=generator), dim=1)


ROWS = torch.tensor([3, 0, 6])
BANKS = [pytest.param(7, id="products"), pytest.param(50, id="gathered")]  # 3 columns of width 4 are fewer than 50 rows


def noise_of(bank, num_noise=2):
    return draw_noise(ROWS, len(bank), num_noise, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", BANKS)
def test_nce_loss_is_the_definition(size):
    queries, bank, scale, partition, total = unit(3), unit(size, seed=1), 3.0, 12.0, 0.0
    noise = noise_of(bank)

    def h(i, j):
        p = math.exp(scale * sum(a * b for a, b in zip(queries[i].tolist(), bank[j].tolist()))) / partition
        return p / (p + 2 / size)

    for i in range(3):
        total -= math.log(h(i, ROWS[i])) + sum(math.log(1 - h(i, j)) for j in noise[i])
    loss = nce_loss(queries, bank, scale, ROWS, noise, math.log(partition))
    assert loss.item() == pytest.approx(total / 3, rel=1e-12)


@pytest.mark.parametrize("size", BANKS)
def test_gradient_is_the_numerical_one_and_the_bank_gets_none(size):
    queries, bank, scale = unit(3).requires_grad_(), unit(size, seed=1).requires_grad_(), torch.tensor([3.0]).double()
    noise = noise_of(bank)
    assert torch.autograd.gradcheck(
        lambda q, s: nce_loss(q, bank, s, ROWS, noise, 1.5), (queries, scale.requires_grad_())
    )
    for loss in (nce_loss(queries, bank, scale, ROWS, noise, 1.5), instance_softmax_loss(queries, bank, scale, ROWS)):
        loss.backward()
    assert bank.grad is None


@pytest.mark.parametrize("times", [1, 10, 1000])
def test_noise_of_the_whole_bank_has_the_softmax_gradient_times_k_over_p_plus_k(times):
    """With every row k times as noise, m Pn = k, so the gradient of logit j is (P_j - y_j) k / (P_j + k)."""
    queries, bank, row = unit(1).requires_grad_(), unit(7, seed=1), torch.tensor([2])
    noise = torch.arange(7).repeat(times)[None]
    loss = nce_loss(queries, bank, 5.0, row, noise, log_partition(queries, bank, 5.0))
    (gradient,) = torch.autograd.grad(loss, queries)
    p = (5.0 * queries.detach() @ bank.T).softmax(1)
    by_logit = (p - F.one_hot(row, 7)) * times / (p + times)
    torch.testing.assert_close(gradient, 5.0 * by_logit @ bank, rtol=1e-9, atol=1e-12)
    (softmax,) = torch.autograd.grad(instance_softmax_loss(queries, bank, 5.0, row), queries)
    assert (gradient - softmax).norm() < softmax.norm() / times


def test_differs_from_the_published_code_by_its_epsilon_only():
    queries, bank = unit(3), unit(7, seed=1)
    noise, log_z = noise_of(bank), log_partition(queries, bank, 3.0)
    p = (3.0 * queries @ bank.T - log_z).exp().gather(1, torch.cat([ROWS[:, None], noise], 1))
    pn, eps = 2 / 7, 1e-7
    published = -((p[:, :1] / (p[:, :1] + pn + eps)).log().sum() + (pn / (p[:, 1:] + pn + eps)).log().sum()) / 3
    assert nce_loss(queries, bank, 3.0, ROWS, noise, log_z).item() == pytest.approx(published.item(), abs=1e-5)


def test_softmax_form_equals_torch_cross_entropy():
    queries, bank = unit(3).requires_grad_(), unit(3000, seed=1)
    loss = instance_softmax_loss(queries, bank, 1 / 0.07, ROWS)
    expected = F.cross_entropy(queries @ bank.T / 0.07, ROWS)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, queries)[0] for x in (loss, expected)), rtol=1e-9, atol=1e-12)


def test_partition_is_the_mean_over_queries_of_the_whole_sum_and_is_a_constant():
    queries, bank = unit(3).requires_grad_(), unit(40, seed=1)
    value = log_partition(queries, bank, 3.0)
    assert not value.requires_grad
    assert value.exp().item() == pytest.approx((3.0 * queries @ bank.T).exp().sum(1).mean().item())


def test_published_estimate_converges_to_the_partition():
    queries, bank = unit(3), unit(40, seed=1)
    noise = draw_noise(ROWS, 40, 20_000, torch.Generator().manual_seed(0), may_be_own=True)
    estimate = (3.0 * queries @ bank.T).gather(1, noise).exp().mean() * 40
    assert log_partition(queries, bank, 3.0).item() == pytest.approx(estimate.log().item(), abs=0.01)


def test_noise_is_any_other_row_evenly_and_never_the_own():
    noise = draw_noise(ROWS, 7, 12_000, torch.Generator().manual_seed(0))
    for own, drawn in zip(ROWS, noise):
        counts = drawn.bincount(minlength=7)
        assert counts[own] == 0
        assert ((counts - 2000).abs() < 200)[torch.arange(7) != own].all()


def test_noise_may_be_the_own_row_as_in_the_published_code():
    noise = draw_noise(ROWS, 7, 14_000, torch.Generator().manual_seed(0), may_be_own=True)
    assert all(((drawn.bincount(minlength=7) - 2000).abs() < 200).all() for drawn in noise)


def test_noise_is_a_function_of_its_generator():
    bank = unit(50)
    assert torch.equal(noise_of(bank), noise_of(bank))


def test_far_apart_logits_do_not_overflow():
    queries, bank = unit(3).float().requires_grad_(), unit(7, seed=1).float()
    log_z = log_partition(queries, bank, 2000.0)
    loss = nce_loss(queries, bank, 2000.0, ROWS, noise_of(bank), log_z)
    loss.backward()
    assert loss.isfinite()
    assert queries.grad.isfinite().all()


def test_half_precision_is_computed_in_float32_also_under_autocast():
    queries, bank = unit(3).bfloat16(), unit(7, seed=1).bfloat16()
    expected = nce_loss(queries.float(), bank.float(), 5.0, ROWS, noise_of(bank), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert nce_loss(queries, bank, 5.0, ROWS, noise_of(bank), 1.0) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("size", BANKS)
def test_non_finite_row_is_named(size, bad):
    queries, bank = unit(3), unit(size, seed=1)
    bank[6, 0] = bad  # the last query's own row
    with pytest.raises(NonFiniteLoss, match="row 6 of bank"):
        nce_loss(queries, bank, 3.0, ROWS, noise_of(bank), 1.0)
    with pytest.raises(NonFiniteLoss, match="row 6 of queue"):
        instance_softmax_loss(queries, bank, 3.0, ROWS)
    with pytest.raises(NonFiniteLoss, match="row 6 of bank"):
        log_partition(queries, bank, 3.0)
    with pytest.raises(NonFiniteLoss, match="log_partition"):
        nce_loss(queries, unit(size), 3.0, ROWS, noise_of(bank), bad)


def test_non_finite_bank_row_is_named_even_if_it_was_not_drawn():
    queries, bank = unit(3).requires_grad_(), unit(7, seed=1)
    bank[5] = math.nan
    with pytest.raises(NonFiniteLoss, match="row 5 of bank"):
        nce_loss(queries, bank, 3.0, ROWS, torch.tensor([[1], [1], [1]]), 1.0)


def test_shapes_that_do_not_fit_the_bank_are_an_error():
    queries, bank = unit(3), unit(7)
    with pytest.raises(ValueError, match="m >= 1"):
        nce_loss(queries, bank, 1.0, ROWS, noise_of(bank)[:, :0], 1.0)
    with pytest.raises(ValueError, match="one row of the bank"):
        nce_loss(queries, bank, 1.0, ROWS[:2], noise_of(bank), 1.0)
    with pytest.raises(ValueError, match="one row of the bank"):
        instance_softmax_loss(queries[:0], bank, 1.0, ROWS[:0])
    with pytest.raises(ValueError, match="none to draw noise from"):
        draw_noise(torch.zeros(1).long(), 1, 4)
