import math

import pytest
import torch

from vlp.errors import NonFiniteLoss
from vlp.losses.masked import masked_cross_entropy, masked_pixel_loss

LABELS = torch.tensor([3, -100, 0, 6, -100])


def rows(seed=0, count=5, width=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(count, width, generator=generator, dtype=dtype)).requires_grad_()


def slow(logits, labels, teacher=None, distill=0.0):
    """Compute the loss row by row, with exp and log written out."""
    total, count = 0.0, 0
    for i, label in enumerate(labels.tolist()):
        if label == -100:
            continue
        log_sum = math.log(sum(math.exp(x) for x in logits[i].tolist()))
        hard = log_sum - logits[i, label].item()
        soft = 0.0
        if teacher is not None:
            weights = [math.exp(x) for x in teacher[i].tolist()]
            soft = sum(w / sum(weights) * (log_sum - x) for w, x in zip(weights, logits[i].tolist()))
        total, count = total + (1 - distill) * hard + distill * soft, count + 1
    return total / count


def test_equals_the_definition_row_by_row():
    assert masked_cross_entropy(rows(), LABELS).item() == pytest.approx(slow(rows(), LABELS), rel=1e-12)
    for share in (0.4, 1.0):
        loss = masked_cross_entropy(rows(), LABELS, rows(1), share)
        assert loss.item() == pytest.approx(slow(rows(), LABELS, rows(1), share), rel=1e-12)


def test_equal_logits_give_log_of_the_vocabulary_size():
    assert masked_cross_entropy(torch.zeros(4, 30), torch.arange(4)).item() == pytest.approx(math.log(30))


def test_self_distillation_is_the_entropy_with_zero_gradient():
    logits = rows()
    loss = masked_cross_entropy(logits, LABELS.abs() % 7, logits.detach().clone(), 1.0)
    probabilities = logits.detach().softmax(1)
    assert loss.item() == pytest.approx(-(probabilities * probabilities.log()).sum(1).mean().item())
    loss.backward()
    assert logits.grad.abs().max() < 1e-15


def test_gradient_is_the_numerical_one_and_the_teacher_gets_none():
    teacher = rows(1)
    assert torch.autograd.gradcheck(lambda x: masked_cross_entropy(x, LABELS, teacher, 0.4), rows())
    masked_cross_entropy(rows(), LABELS, teacher, 0.4).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("labels", [torch.full((5,), -100), torch.zeros(0, dtype=torch.int64)], ids=["ignored", "none"])
@pytest.mark.parametrize("distill", [0.0, 0.4])
def test_no_masked_token_gives_zero_loss_and_gradient(labels, distill):
    logits = rows(count=len(labels))
    teacher = rows(1, count=len(labels)) if distill else None
    for count in (None, torch.tensor(0.0), torch.tensor(2.5)):
        logits.grad = None
        loss = masked_cross_entropy(logits, labels, teacher, distill, count)
        assert loss.item() == 0
        loss.backward()
        assert logits.grad.shape == logits.shape and not logits.grad.any()


def test_count_makes_the_mean_over_parts_the_mean_over_all_rows():
    logits, labels = rows(count=6), torch.tensor([1, 2, 3, -100, 5, -100])
    for parts in ([slice(0, 2), slice(2, 6)], [slice(0, 1), slice(1, 6)]):
        count = torch.tensor(4 / 2)
        mean = sum(masked_cross_entropy(logits[part], labels[part], count=count) for part in parts) / 2
        torch.testing.assert_close(mean, masked_cross_entropy(logits, labels))


def test_bfloat16_logits_are_computed_on_in_float32():
    logits = rows(dtype=torch.float32).detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = masked_cross_entropy(logits, LABELS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, masked_cross_entropy(logits.float(), LABELS), rtol=0, atol=0)


def test_invalid_input_is_named():
    with pytest.raises(ValueError, match="one label per row"):
        masked_cross_entropy(rows(), LABELS[:4])
    with pytest.raises(ValueError, match="one label per row"):
        masked_cross_entropy(rows(), LABELS, rows(count=4), 0.4)
    spoilt = rows().detach().index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(math.nan, dtype=torch.float64))
    with pytest.raises(NonFiniteLoss, match="row 2 of logits"):
        masked_cross_entropy(spoilt, LABELS)
    with pytest.raises(NonFiniteLoss, match="row 2 of teacher"):
        masked_cross_entropy(rows(), LABELS, spoilt, 0.4)
    with pytest.raises(NonFiniteLoss, match="row 2 of predicted"):
        masked_pixel_loss(spoilt, rows())
    with pytest.raises(ValueError, match="one prediction each"):
        masked_pixel_loss(rows(count=0), rows(count=0))
    with pytest.raises(ValueError, match="one prediction each"):
        masked_pixel_loss(rows(), rows(width=6))


def test_pixel_loss_is_the_mean_squared_error():
    predicted, pixels = rows(), rows(1)
    squares = [(a - b) ** 2 for a, b in zip(predicted.flatten().tolist(), pixels.flatten().tolist())]
    loss = masked_pixel_loss(predicted, pixels)
    assert loss.item() == pytest.approx(sum(squares) / len(squares))
    loss.backward()
    assert predicted.grad is not None and pixels.grad is None
