import math

import pytest
import torch
from torch.nn import functional as F

from vlp.errors import NonFiniteLoss
from vlp.losses.classification import one_hot, sigmoid_cross_entropy, softmax_cross_entropy

ROWS, CLASSES = 5, 7


def given(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = torch.randn(2, ROWS, CLASSES, generator=generator, dtype=torch.float64)
    soft = torch.rand(ROWS, CLASSES, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), teacher, torch.randint(CLASSES, (ROWS,), generator=generator), soft


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_of_labels_is_torchs_cross_entropy(smoothing):
    logits, _, labels, _ = given()
    found = softmax_cross_entropy(logits, one_hot(labels, CLASSES), label_smoothing=smoothing)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, label_smoothing=smoothing), rtol=1e-6, atol=1e-7)


def test_softmax_of_equal_logits_is_log_of_the_number_of_classes():
    loss = softmax_cross_entropy(torch.zeros(ROWS, CLASSES), one_hot(torch.arange(ROWS), CLASSES))
    assert math.isclose(loss.item(), math.log(CLASSES), rel_tol=1e-6)


def test_distillation_is_the_sum_of_two_cross_entropies_row_by_row():
    logits, teacher, labels, _ = given()
    rows = []
    for row, label in enumerate(labels.tolist()):
        logs, soft = logits[row].log_softmax(0), teacher[row].softmax(0)
        rows.append(-0.6 * logs[label] - 0.4 * sum(soft[c] * logs[c] for c in range(CLASSES)))
    found = softmax_cross_entropy(logits, one_hot(labels, CLASSES), teacher, distill=0.4)
    torch.testing.assert_close(found, sum(rows) / ROWS, rtol=1e-6, atol=1e-7)


def test_sigmoid_is_the_mean_over_all_values_times_the_number_of_classes():
    logits, teacher, _, soft = given()
    expected = F.binary_cross_entropy_with_logits(logits, soft) * CLASSES
    torch.testing.assert_close(sigmoid_cross_entropy(logits, soft), expected)
    taught = F.binary_cross_entropy_with_logits(logits, teacher.sigmoid()) * CLASSES
    found = sigmoid_cross_entropy(logits, soft, teacher, distill=0.3)
    torch.testing.assert_close(found, 0.7 * expected + 0.3 * taught)


@pytest.mark.parametrize("loss", [softmax_cross_entropy, sigmoid_cross_entropy])
def test_gradient_flows_to_logits_only_and_is_computed_in_float32(loss):
    logits, teacher, _, soft = (part if part.dtype == torch.int64 else part.detach().bfloat16() for part in given())
    for part in (logits, teacher):
        part.requires_grad_()
    value = loss(logits, soft.float(), teacher, 0.4)
    value.backward()
    assert value.dtype == torch.float32 and logits.grad.any() and teacher.grad is None


def test_label_out_of_range_or_non_finite_row_is_named():
    logits, _, labels, soft = given()
    with pytest.raises(ValueError, match="row 2 has a label that is not from 0 to 6"):
        one_hot(torch.tensor([0, 6, 7, -1]), CLASSES)
    with pytest.raises(ValueError, match=r"logits \(5, 7\), targets \(5, 6\)"):
        softmax_cross_entropy(logits, soft[:, 1:])
    broken = logits.detach().clone()
    broken[3, 1] = math.nan
    for loss in (softmax_cross_entropy, sigmoid_cross_entropy):
        with pytest.raises(NonFiniteLoss, match="row 3 of logits"):
            loss(broken, soft)
