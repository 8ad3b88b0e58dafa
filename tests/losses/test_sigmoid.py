import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss

from vlp.errors import NonFiniteLoss
from vlp.losses.sigmoid import sigmoid_loss


def unit(rows, width=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, dtype=dtype, generator=generator), dim=1)


def test_equals_the_definition_over_pairs():
    queries, keys = unit(3), unit(5, seed=1)
    query_ids, key_ids = torch.tensor([0, 1, 9]), torch.tensor([1, 0, 0, 3, 4])
    total = 0.0
    for i in range(3):
        for j in range(5):
            z = 1 if query_ids[i] == key_ids[j] else -1
            total += math.log1p(math.exp(-z * (4.0 * (queries[i] @ keys[j]).item() - 1.5)))
    loss = sigmoid_loss(queries, keys, 4.0, -1.5, query_ids, key_ids)
    assert loss.item() == pytest.approx(total / 3, rel=1e-12)


def test_unique_ids_equal_open_clip():
    image, text, ids = unit(32, dtype=torch.float32), unit(32, dtype=torch.float32, seed=1), torch.arange(32)
    scale, bias = torch.tensor([10.0]), torch.tensor([-10.0])
    expected = SigLipLoss()(image, text, scale, bias)
    torch.testing.assert_close(sigmoid_loss(image, text, scale, bias, ids, ids), expected.squeeze(), rtol=0, atol=1e-6)


def test_gradient_is_the_numerical_one():
    ids = torch.tensor([0, 1, 1, 2])
    inputs = [unit(4, 3), unit(4, 3, seed=1), torch.tensor([3.0]).double(), torch.tensor([-1.0]).double()]
    inputs = tuple(value.requires_grad_() for value in inputs)
    assert torch.autograd.gradcheck(lambda q, k, s, b: sigmoid_loss(q, k, s, b, ids, ids), inputs)


def test_non_finite_row_is_named():
    keys = unit(3)
    keys[2, 0] = math.nan
    with pytest.raises(NonFiniteLoss, match="row 2 of keys"):
        sigmoid_loss(unit(3), keys, 1.0, 0.0, torch.arange(3), torch.arange(3))
