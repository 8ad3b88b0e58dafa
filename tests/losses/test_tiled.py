import math

import pytest
import torch
import torch.nn.functional as F

from vlp.errors import NonFiniteLoss
from vlp.losses.sigmoid import sigmoid_loss
from vlp.losses.softmax import info_nce
from vlp.losses.tiled import queue_info_nce, tiled_info_nce, tiled_sigmoid_loss

ROWS, KEYS = 37, 53  # not multiples of a tile


def symmetric(queries, keys, scale, query_ids, key_ids, eps):
    return info_nce(queries, keys, scale, query_ids, key_ids, eps) + info_nce(
        keys, queries, scale, key_ids, query_ids, eps
    )


def tiled_symmetric(queries, keys, scale, query_ids, key_ids, eps=0.0, tile_rows=256):
    return tiled_info_nce(queries, keys, scale, query_ids, key_ids, eps, tile_rows) + tiled_info_nce(
        keys, queries, scale, key_ids, query_ids, eps, tile_rows
    )


def plain_sigmoid(queries, keys, scale, query_ids, key_ids, bias):
    return sigmoid_loss(queries, keys, scale, bias, query_ids, key_ids)


def tiled_sigmoid(queries, keys, scale, query_ids, key_ids, bias, tile_rows):
    return tiled_sigmoid_loss(queries, keys, scale, bias, query_ids, key_ids, tile_rows)


CASES = [
    pytest.param(info_nce, tiled_info_nce, 0.0, id="info_nce"),
    pytest.param(info_nce, tiled_info_nce, 0.1, id="info_nce-smoothed"),
    pytest.param(symmetric, tiled_symmetric, 0.0, id="symmetric"),
    pytest.param(symmetric, tiled_symmetric, 0.1, id="symmetric-smoothed"),
    pytest.param(plain_sigmoid, tiled_sigmoid, -7.0, id="sigmoid"),
]


def inputs(dtype, last):
    """Return unit rows with repeated ids, a learned scale, and the label smoothing or a learned bias."""
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(ROWS, 16, dtype=dtype, generator=generator), dim=1)
    keys = F.normalize(torch.randn(KEYS, 16, dtype=dtype, generator=generator), dim=1)
    key_ids = torch.arange(KEYS) % 30
    query_ids = torch.arange(ROWS).flip(0) % 30
    learned = [queries, keys, torch.tensor([20.0], dtype=dtype)]
    if last < 0:
        learned.append(torch.tensor([last], dtype=dtype))
    learned = [value.requires_grad_() for value in learned]
    return (*learned[:3], query_ids, key_ids, learned[3] if last < 0 else last), learned


@pytest.mark.parametrize("tile_rows", [1, 8, 256])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("plain", "tiled", "last"), CASES)
def test_value_and_every_gradient_equal_the_plain_form(plain, tiled, last, dtype, tolerance, tile_rows):
    arguments, learned = inputs(dtype, last)
    value, expected = tiled(*arguments, tile_rows=tile_rows), plain(*arguments)
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=0)
    gradients = torch.autograd.grad(0.3 * value, learned)
    for gradient, reference in zip(gradients, torch.autograd.grad(0.3 * expected, learned)):
        assert (gradient - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize(("plain", "tiled", "last"), CASES)
def test_far_apart_logits_do_not_overflow(plain, tiled, last):
    arguments, learned = inputs(torch.float32, last)
    queries, keys, _, *rest = arguments
    scale = torch.tensor([2000.0])  # exp of the logits and of their differences overflows float32
    value = tiled(queries, keys, scale, *rest, tile_rows=8)
    torch.testing.assert_close(value, plain(queries, keys, scale, *rest), rtol=1e-5, atol=0)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, learned[:2]))


@pytest.mark.parametrize(("plain", "tiled", "last"), CASES)
def test_one_tensor_on_both_sides_gets_both_gradients(plain, tiled, last):
    (_, keys, scale, _, key_ids, rest), _ = inputs(torch.float64, last)
    gradients = []
    for loss in (plain(keys, keys, scale, key_ids, key_ids, rest), tiled(keys, keys, scale, key_ids, key_ids, rest, 8)):
        gradients.append(torch.autograd.grad(loss, keys)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-14)


def test_frozen_keys_as_in_a_queue_leave_the_other_gradients():
    (queries, keys, scale, *rest), _ = inputs(torch.float64, 0.1)
    keys = keys.detach()
    value = torch.autograd.grad(tiled_info_nce(queries, keys, scale, *rest, tile_rows=8), [queries, scale])
    expected = torch.autograd.grad(info_nce(queries, keys, scale, *rest), [queries, scale])
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-14)


def test_half_precision_inputs_are_widened_and_get_their_dtype_back():
    (queries, keys, scale, *rest), _ = inputs(torch.float32, 0.1)
    queries, keys = queries.detach().bfloat16().requires_grad_(), keys.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = tiled_info_nce(queries, keys, scale, *rest, tile_rows=8)
    value.backward()
    torch.testing.assert_close(value, info_nce(queries, keys, scale, *rest), rtol=1e-6, atol=0)
    assert queries.grad.dtype == torch.bfloat16


def test_second_backward_is_refused():
    arguments, learned = inputs(torch.float64, 0.1)
    value = tiled_symmetric(*arguments)
    torch.autograd.grad(value, learned, retain_graph=True)
    with pytest.raises(RuntimeError, match="backward once"):
        torch.autograd.grad(value, learned)


def test_double_backward_is_refused():
    arguments, learned = inputs(torch.float64, 0.1)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(tiled_info_nce(*arguments), learned, create_graph=True)


def test_without_gradient_the_value_is_the_same():
    arguments, _ = inputs(torch.float64, 0.1)
    with torch.no_grad():
        value = tiled_symmetric(*arguments)
    assert value == tiled_symmetric(*arguments).detach()
    assert not value.requires_grad


@pytest.mark.parametrize("tiled", [tiled_info_nce, tiled_symmetric])
def test_row_without_a_positive_is_named(tiled):
    (queries, keys, scale, query_ids, key_ids, _), _ = inputs(torch.float64, 0.0)
    query_ids[5] = 1000
    with pytest.raises(ValueError, match="row 5 has no positive"):
        tiled(queries, keys, scale, query_ids, key_ids)


def test_row_without_a_positive_on_the_other_side_is_named():
    (queries, keys, scale, query_ids, key_ids, _), _ = inputs(torch.float64, 0.0)
    key_ids[6] = 1000
    with pytest.raises(ValueError, match="row 6 has no positive"):
        tiled_symmetric(queries, keys, scale, query_ids, key_ids)


@pytest.mark.parametrize(("plain", "tiled", "last"), CASES)
def test_non_finite_row_is_named(plain, tiled, last):
    (queries, *rest), _ = inputs(torch.float64, last)
    queries = queries.detach()
    queries[4, 0] = math.nan
    with pytest.raises(NonFiniteLoss, match="row 4 of queries"):
        tiled(queries, *rest, tile_rows=8)


@pytest.mark.parametrize(("plain", "tiled", "last"), CASES)
def test_key_at_minus_infinity_is_named_although_the_loss_is_finite(plain, tiled, last):
    (queries, keys, *rest), _ = inputs(torch.float64, last)
    keys = keys.detach().clone()
    keys[52, 0] = -math.inf
    with pytest.raises(NonFiniteLoss, match="row 52 of keys"):
        tiled(queries.detach().abs(), keys, *rest, tile_rows=8)


def test_tile_of_no_rows_is_an_error():
    arguments, _ = inputs(torch.float64, 0.0)
    with pytest.raises(ValueError, match="tile_rows"):
        tiled_info_nce(*arguments, tile_rows=0)


def queue_case(dtype=torch.float64, queue=53):
    """Return 11 queries, 7 keys and a queue, with one or several positives in the keys, the queue, or both."""
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(18 + queue, 16, dtype=dtype, generator=generator), dim=1).split([11, 7, queue])
    queries, keys, scale = (x.requires_grad_() for x in (*rows[:2], torch.tensor([20.0], dtype=dtype)))
    queue_ids = torch.arange(queue) % 20
    return (queries, keys, rows[2], scale, torch.arange(11) % 9, torch.arange(7), queue_ids), [queries, keys, scale]


def whole(queries, keys, queue, scale, query_ids, key_ids, queue_ids, eps, allowed):
    allowed = torch.cat([allowed, allowed.new_ones(len(queries), len(queue))], 1)
    return info_nce(queries, torch.cat([keys, queue]), scale, query_ids, torch.cat([key_ids, queue_ids]), eps, allowed)


@pytest.mark.parametrize("tile_keys", [1, 8, 1024])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("masked", [False, True])
def test_queue_equals_the_plain_form_in_value_and_every_gradient(masked, eps, dtype, tolerance, tile_keys):
    arguments, learned = queue_case(dtype)
    allowed = torch.ones(11, 7, dtype=torch.bool)
    if masked:
        allowed[torch.arange(11), torch.arange(11) % 7] = False
        allowed[3] = False
    value = queue_info_nce(*arguments, eps, allowed if masked else None, tile_keys)
    expected = whole(*arguments, eps, allowed)
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=0)
    gradients = torch.autograd.grad(0.3 * value, learned)
    for gradient, reference in zip(gradients, torch.autograd.grad(0.3 * expected, learned)):
        assert (gradient - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize("queue", [0, 1, 3, 10])
def test_queue_may_be_shorter_than_the_batch_or_empty(queue):
    (queries, keys, rows, scale, *_), learned = queue_case(queue=queue)
    queries, ids, other = queries[:7], torch.arange(7), torch.full((queue,), -1)
    value = queue_info_nce(queries, keys, rows, scale, ids, ids, other)
    expected = info_nce(queries, torch.cat([keys, rows]), scale, ids, torch.cat([ids, other]))
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    for pair in zip(torch.autograd.grad(value, learned), torch.autograd.grad(expected, learned)):
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-12)


def test_own_key_and_queue_equal_lightlys_moco_loss():
    """NTXentLoss with a memory bank contrasts each query with its own key and the queue, and normalises."""
    NTXentLoss = pytest.importorskip("lightly.loss").NTXentLoss
    (queries, _, queue, *_), _ = queue_case(torch.float32)
    keys, ids = F.normalize(queries.detach() + 0.1, dim=1), torch.arange(11)
    theirs = NTXentLoss(temperature=0.07, memory_bank_size=(53, 16))
    theirs.memory_bank.bank = queue
    loss = queue_info_nce(
        queries, keys, queue, 1 / 0.07, ids, ids, torch.full((53,), -1), allowed=torch.eye(11, dtype=torch.bool)
    )
    torch.testing.assert_close(loss, theirs(queries.detach(), keys), rtol=1e-5, atol=1e-6)


def test_queue_with_far_apart_logits_does_not_overflow():
    (queries, keys, queue, _, *ids), learned = queue_case(torch.float32)
    value = queue_info_nce(queries, keys, queue, 2000.0, *ids, tile_keys=8)
    expected = whole(queries, keys, queue, 2000.0, *ids, 0.0, torch.ones(11, 7, dtype=torch.bool))
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, learned[:2]))


def test_queue_without_gradient_has_the_same_value_and_double_backward_is_refused():
    arguments, learned = queue_case()
    with torch.no_grad():
        value = queue_info_nce(*arguments)
    assert value == queue_info_nce(*arguments).detach()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(queue_info_nce(*arguments), learned, create_graph=True)


def test_query_without_a_positive_in_keys_and_queue_is_named():
    (*arguments, query_ids, key_ids, queue_ids), _ = queue_case()
    query_ids[5] = 1000
    with pytest.raises(ValueError, match="row 5 has no positive"):
        queue_info_nce(*arguments, query_ids, key_ids, queue_ids)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["queries", "keys", "queue"])
def test_non_finite_row_beside_a_queue_is_named_even_where_it_is_left_out(name, bad):
    arguments, _ = queue_case()
    tensors = dict(zip(("queries", "keys", "queue"), (x.detach().abs() for x in arguments[:3])))
    tensors[name][4, 0] = bad
    allowed = torch.ones(11, 7, dtype=torch.bool)
    allowed[:, 4] = False
    with pytest.raises(NonFiniteLoss, match=f"row 4 of {name}"):
        queue_info_nce(*tensors.values(), *arguments[3:], allowed=allowed)


def test_queue_tile_of_no_keys_is_an_error():
    with pytest.raises(ValueError, match="tile_keys"):
        queue_info_nce(*queue_case()[0], tile_keys=0)
