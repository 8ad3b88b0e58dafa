import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from transformers.models.align.modeling_align import align_loss

from vlp.errors import NonFiniteLoss
from vlp.losses.softmax import id_targets, info_nce, soft_info_nce


def unit(rows, width=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, dtype=dtype, generator=generator), dim=1)


def by_loops(queries, keys, scale, query_ids, key_ids, eps, allowed):
    """Compute the definition, one pair at a time."""
    total = 0.0
    for i in range(len(queries)):
        columns = [j for j in range(len(keys)) if allowed[i, j]]
        positives = [j for j in columns if query_ids[i] == key_ids[j]]
        logit = {j: scale * sum(a * b for a, b in zip(queries[i].tolist(), keys[j].tolist())) for j in columns}
        log_total = math.log(sum(math.exp(value) for value in logit.values()))
        for j in columns:
            p = (1 - eps) * (j in positives) / len(positives) + eps / len(columns)
            total += p * (log_total - logit[j])
    return total / len(queries)


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_definition_over_pairs(eps, masked):
    queries, keys = unit(6), unit(9, seed=1)
    query_ids, key_ids = torch.tensor([0, 1, 1, 2, 3, 4]), torch.tensor([4, 3, 2, 1, 0, 0, 1, 7, 8])
    allowed = torch.ones(6, 9, dtype=torch.bool)
    if masked:
        allowed[torch.arange(6), torch.tensor([4, 3, 0, 8, 2, 1])] = False
    loss = info_nce(queries, keys, 5.0, query_ids, key_ids, eps, allowed if masked else None)
    assert loss.item() == pytest.approx(by_loops(queries, keys, 5.0, query_ids, key_ids, eps, allowed), rel=1e-12)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_unique_ids_equal_torch_cross_entropy(eps):
    queries, keys, positive = unit(6), unit(9, seed=1), torch.tensor([3, 1, 8, 0, 4, 5])
    loss = info_nce(queries, keys, 20.0, positive, torch.arange(9), eps)
    expected = F.cross_entropy(20.0 * queries @ keys.T, positive, label_smoothing=eps)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_mean_of_both_ways_equals_open_clip():
    image, text, ids = unit(32, dtype=torch.float32), unit(32, dtype=torch.float32, seed=1), torch.arange(32)
    scale = torch.tensor([14.0])
    loss = (info_nce(image, text, scale, ids, ids) + info_nce(text, image, scale, ids, ids)) / 2
    torch.testing.assert_close(loss, ClipLoss()(image, text, scale), rtol=0, atol=1e-6)


def test_mean_of_both_ways_with_smoothing_equals_transformers_align():
    image, text, ids = unit(32, dtype=torch.float32), unit(32, dtype=torch.float32, seed=1), torch.arange(32)
    temperature = torch.tensor(0.07)
    scale = 1 / temperature
    loss = (info_nce(image, text, scale, ids, ids, 0.1) + info_nce(text, image, scale, ids, ids, 0.1)) / 2
    torch.testing.assert_close(loss, align_loss(text @ image.T / temperature), rtol=0, atol=1e-6)


def two_views():
    """SimCLR: 8 samples in two views, with all views but itself as the keys of a view."""
    views, ids = unit(16, dtype=torch.float32), torch.arange(8).repeat(2)
    return views, ids, info_nce(views, views, 1 / 0.5, ids, ids, allowed=~torch.eye(16, dtype=torch.bool))


def test_views_among_all_other_views_equal_lightly():
    NTXentLoss = pytest.importorskip("lightly.loss").NTXentLoss
    views, _, loss = two_views()
    torch.testing.assert_close(loss, NTXentLoss(temperature=0.5)(*views.chunk(2)), rtol=1e-5, atol=0)


def test_views_among_all_other_views_equal_pytorch_metric_learning():
    """It normalises. With more than two views it excludes the other positives from the denominator."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    views, ids, loss = two_views()
    torch.testing.assert_close(loss, losses.NTXentLoss(temperature=0.5)(views, ids), rtol=1e-5, atol=0)


def test_gradient_is_the_numerical_one():
    ids = torch.tensor([0, 1, 1, 2])
    inputs = (unit(4, 3).requires_grad_(), unit(4, 3, seed=1).requires_grad_(), torch.tensor([3.0]).double())
    inputs[2].requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k, s: info_nce(q, k, s, ids, ids, 0.1), inputs)


@pytest.mark.parametrize("queue", [0, 1, 15, 16])
def test_equal_embeddings_give_log_of_the_number_of_keys(queue):
    keys = unit(1).expand(8 + queue, -1)
    loss = info_nce(keys[:8], keys, 10.0, torch.arange(8), torch.arange(8 + queue))
    assert loss.item() == pytest.approx(math.log(8 + queue))


def test_one_row_batch_is_zero():
    assert info_nce(unit(1), unit(1, seed=1), 10.0, torch.zeros(1).long(), torch.zeros(1).long(), 0.1).item() == 0


def test_soft_targets_equal_torch_and_get_no_gradient():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(5, 7, dtype=torch.float64).softmax(1).requires_grad_()
    loss = soft_info_nce(logits, targets)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets), rtol=1e-12, atol=0)
    assert targets.grad is None


def test_excluded_pair_has_no_effect_and_zero_gradient():
    logits = torch.randn(3, 5, dtype=torch.float64)
    logits[:, 4] = -torch.inf
    logits.requires_grad_()
    targets = torch.eye(3, 5, dtype=torch.float64)
    loss = soft_info_nce(logits, targets)
    loss.backward()
    torch.testing.assert_close(loss, soft_info_nce(logits[:, :4], targets[:, :4]))
    assert (logits.grad[:, 4] == 0).all()
    assert logits.grad.isfinite().all()


def test_target_rows_sum_to_one_over_the_allowed_keys():
    ids = torch.tensor([0, 0, 1])
    allowed = ~torch.eye(3, 3, dtype=torch.bool) | (torch.arange(3) == 2)[:, None]
    targets = id_targets(ids, ids, 0.3, allowed)
    torch.testing.assert_close(targets.sum(1), torch.ones(3))
    assert (targets[~allowed] == 0).all()


def test_half_precision_is_computed_in_float32_also_under_autocast():
    queries, keys, ids = unit(8).bfloat16().requires_grad_(), unit(8, seed=1).bfloat16(), torch.arange(8)
    expected = info_nce(queries.detach().float(), keys.float(), 20.0, ids, ids)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(queries, keys, 20.0, ids, ids)
        of_float32 = info_nce(queries.detach().float(), keys.float(), 20.0, ids, ids)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss == expected == of_float32
    assert queries.grad.dtype == torch.bfloat16


def test_row_without_a_positive_is_named():
    with pytest.raises(ValueError, match="row 2 has no positive"):
        info_nce(unit(3), unit(3, seed=1), 1.0, torch.tensor([0, 1, 5]), torch.arange(3))


def test_row_without_an_allowed_pair_is_named():
    allowed = torch.ones(3, 3, dtype=torch.bool)
    allowed[1] = False
    with pytest.raises(ValueError, match="row 1 has no positive"):
        info_nce(unit(3), unit(3, seed=1), 1.0, torch.arange(3), torch.arange(3), allowed=allowed)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_row_is_named(bad):
    queries, keys, ids = unit(3), unit(3, seed=1), torch.arange(3)
    keys[1, 0] = bad
    with pytest.raises(NonFiniteLoss, match="row 1 of keys"):
        info_nce(queries, keys, 1.0, ids, ids)
    with pytest.raises(NonFiniteLoss, match="scale"):
        info_nce(queries, queries, torch.tensor([bad]), ids, ids)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("left_out", [False, True])
def test_non_finite_key_is_named_even_where_the_loss_does_not_see_it(left_out, bad):
    queries, keys, allowed = unit(3).abs(), unit(5, seed=1).abs(), torch.ones(3, 5, dtype=torch.bool)
    keys[4, 0] = bad
    allowed[:, 4] = not left_out
    with pytest.raises(NonFiniteLoss, match="row 4 of keys"):
        info_nce(queries, keys, 1.0, torch.arange(3), torch.arange(5), allowed=allowed)


def test_soft_target_on_an_excluded_pair_is_named():
    logits = torch.tensor([[0.0, 1.0], [0.0, -torch.inf]])
    with pytest.raises(NonFiniteLoss, match="row 1"):
        soft_info_nce(logits, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))


def test_missing_ids_are_an_error():
    with pytest.raises(ValueError, match="one id per row"):
        info_nce(unit(3), unit(4), 1.0, torch.arange(3), torch.arange(3))
