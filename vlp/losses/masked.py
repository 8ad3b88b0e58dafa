"""Losses of masked and causal modelling: predict hidden or following tokens, or masked patches.

M predicted positions, V vocabulary, C values of a patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.losses.inputs import check_finite, in_float32

IGNORED = -100  # torch's and transformers' label for positions without a prediction


@in_float32
def masked_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None = None,
    distill: float = 0.0,
    count: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Masked language modelling (Devlin et al. 2019) with momentum distillation (ALBEF, Li et al. 2021, eq. 7).

    ``1/count sum_i w_i [(1 - a) CE(logits_i, labels_i) + a CE(logits_i, softmax(teacher_i))]`` with a = ``distill``.
    Computed in float32. Gradient flows to ``logits`` only. Value and gradient are 0 if no row counts.

    Args:
        logits: (M, V). M may be 0.
        labels: (M,) int64. A row with -100 does not count.
        teacher: (M, V) logits of the teacher, or None without distillation.
        distill: Share of the teacher.
        count: () divisor of the sum. None takes the number of rows that count. With the mean of that number over all
            processes, the mean of their losses is the loss of all rows.
        weight: (M,) w. None weights all rows by 1.

    Returns:
        () mean over rows, in nats.

    Raises:
        ValueError: if the shapes differ.
        NonFiniteLoss: naming the row, if logits are not finite.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or (teacher is not None and teacher.shape != logits.shape):
        of_teacher = "" if teacher is None else f", teacher {tuple(teacher.shape)}"
        raise ValueError(
            f"one label per row is needed: logits {tuple(logits.shape)}, labels {tuple(labels.shape)}{of_teacher}"
        )
    rows = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")  # (M,)
    if teacher is not None:
        soft = F.cross_entropy(logits, teacher.detach().softmax(1), reduction="none")
        rows = (1 - distill) * rows + distill * soft.masked_fill(labels == IGNORED, 0)
    total = rows.sum() if weight is None else (rows * weight).sum()
    if count is None:
        count = (labels != IGNORED).sum()
    loss = total / torch.where(count > 0, count, 1)
    return check_finite(loss, logits=logits, **({} if teacher is None else {"teacher": teacher}))


@in_float32
def masked_pixel_loss(predicted: Tensor, pixels: Tensor) -> Tensor:
    """Mean squared error of masked patches (MAE, He et al. 2022, sec. 3).

    Args:
        predicted: (M, C). Gradient flows here only.
        pixels: (M, C), normalised per patch or not.

    Returns:
        () mean over patches and values.

    Raises:
        ValueError: if the shapes differ or there is no patch.
        NonFiniteLoss: naming the row, if a value is not finite.
    """
    if predicted.shape != pixels.shape or not len(predicted):
        raise ValueError(f"patches need one prediction each, got {tuple(predicted.shape)} for {tuple(pixels.shape)}")
    return check_finite(F.mse_loss(predicted, pixels.detach()), predicted=predicted, pixels=pixels)
