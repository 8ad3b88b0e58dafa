"""Classification losses against one class of C, or a share of each.

B rows, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.losses.inputs import check_every_row, check_finite, in_float32


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Return (B, C) float32 targets for (B,) int64 labels.

    Args:
        labels: (B,) int64, from 0 to C - 1.
        classes: C.

    Raises:
        ValueError: naming the row, if a label is out of range.
    """
    targets = (labels[:, None] == torch.arange(classes, device=labels.device)).float()  # (B, C)
    check_every_row(targets.any(1), f"has a label that is not from 0 to {classes - 1}")
    return targets


@in_float32
def softmax_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    teacher: Tensor | None = None,
    distill: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy against soft targets, with distillation from a teacher (ALBEF, Li et al. 2021, sec. 4 and eq. 7).

    ``1/B sum_i [(1 - a) CE(logits_i, targets_i) + a CE(logits_i, softmax(teacher_i))]`` with a = ``distill``. Computed
    in float32. Gradient flows to ``logits`` only.

    Args:
        logits: (B, C).
        targets: (B, C) with any row sum: `one_hot`, or a share of each class.
        teacher: (B, C) logits, or None without distillation.
        distill: Share of the teacher.
        label_smoothing: s. Targets become ``(1 - s) targets + s / C``. The teacher's are not smoothed.

    Returns:
        () mean over rows, in nats.

    Raises:
        ValueError: if the shapes differ.
        NonFiniteLoss: naming the row, if logits are not finite.
    """
    _check_shapes(logits, targets, teacher)
    targets = torch.lerp(targets, torch.full_like(targets, 1 / targets.shape[1]), label_smoothing)
    if teacher is not None:
        targets = torch.lerp(targets, teacher.detach().softmax(1).to(targets.dtype), distill)
    loss = -(targets * logits.log_softmax(1)).sum(1).mean()
    return check_finite(loss, logits=logits, targets=targets)


@in_float32
def sigmoid_cross_entropy(
    logits: Tensor, targets: Tensor, teacher: Tensor | None = None, distill: float = 0.0
) -> Tensor:
    """Binary cross-entropy of every class independently, the VQA loss of VLMo and BEiT-3.

    ``1/B sum_i sum_c BCE(logits_ic, y_ic)`` with ``y = (1 - a) targets + a sigmoid(teacher)`` and a = ``distill``: C times
    the mean over all values. Computed in float32. Gradient flows to ``logits`` only.

    Args:
        logits: (B, C).
        targets: (B, C) from 0 to 1.
        teacher: (B, C) logits, or None without distillation.
        distill: Share of the teacher.

    Returns:
        () sum over classes, mean over rows, in nats.

    Raises:
        ValueError: if the shapes differ.
        NonFiniteLoss: naming the row, if logits are not finite.
    """
    _check_shapes(logits, targets, teacher)
    if teacher is not None:
        targets = torch.lerp(targets, teacher.detach().sigmoid().to(targets.dtype), distill)
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum") / len(logits)
    return check_finite(loss, logits=logits, targets=targets)


def _check_shapes(logits: Tensor, targets: Tensor, teacher: Tensor | None) -> None:
    if logits.ndim != 2 or targets.shape != logits.shape or (teacher is not None and teacher.shape != logits.shape):
        of_teacher = "" if teacher is None else f", teacher {tuple(teacher.shape)}"
        raise ValueError(
            f"one target per class is needed: logits {tuple(logits.shape)}, targets {tuple(targets.shape)}{of_teacher}"
        )
