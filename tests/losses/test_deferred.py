"""Deferred checks of losses name the same rows as immediate ones, and do not wait for them."""

import pytest
import torch

from tests.syncs import host_reads
from vlp.losses.classification import one_hot
from vlp.losses.inputs import NonFiniteLoss, check_finite, deferred_checks
from vlp.losses.pairwise import contrastive_loss
from vlp.losses.softmax import info_nce

IDS = torch.arange(4)


def embeddings(bad: float | None = None, row: int = 2) -> torch.Tensor:
    rows = torch.nn.functional.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    if bad is not None:
        rows[row, 1] = bad
    return rows


def info_nce_of(rows: torch.Tensor) -> torch.Tensor:
    return info_nce(rows, embeddings(), 2.0, IDS, IDS)


def hadsell_of(rows: torch.Tensor) -> torch.Tensor:
    """An infinite distance has a loss of 0 beyond the margin, so that only the check notices it."""
    return contrastive_loss(rows, embeddings(), torch.zeros(4, dtype=torch.bool))


@pytest.mark.parametrize("loss", [info_nce_of, hadsell_of])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_deferred_check_raises_the_same_error_and_makes_the_loss_nan(loss, bad):
    with pytest.raises(NonFiniteLoss) as immediate:
        loss(embeddings(bad))
    with deferred_checks() as checks, host_reads() as reads:
        loss(embeddings())
        found = loss(embeddings(bad))
        total = checks.applied_to(torch.tensor(1.0, requires_grad=True) + 0 * found.nan_to_num(0, 0, 0))
    assert reads == {} and total.isnan()
    with pytest.raises(NonFiniteLoss) as deferred:
        checks.raise_first()
    assert str(deferred.value) == str(immediate.value) and "row 2 of" in str(deferred.value)


def test_overflow_of_finite_rows_is_named_as_such():
    with deferred_checks() as checks:
        check_finite(torch.tensor(torch.inf), rows=torch.full((2, 2), 3e38))
    with pytest.raises(NonFiniteLoss, match="although its inputs are finite"):
        checks.raise_first()


def test_wrong_label_is_named_later_and_makes_the_loss_nan():
    with deferred_checks() as checks, host_reads() as reads:
        one_hot(torch.tensor([0, 7]), 3)
    assert reads == {} and checks.applied_to(torch.tensor(1.0)).isnan()
    with pytest.raises(ValueError, match="row 1 has a label that is not from 0 to 2"):
        checks.raise_first()


def test_checks_that_pass_change_nothing():
    rows = embeddings().requires_grad_()
    with deferred_checks() as checks:
        loss = info_nce_of(rows)
    checks.raise_first()
    total = checks.applied_to(loss)
    total.backward()
    expected = embeddings().requires_grad_()
    info_nce_of(expected).backward()
    assert total.item() == info_nce_of(embeddings()).item() and torch.equal(rows.grad, expected.grad)
    with deferred_checks() as none:
        pass
    assert none.applied_to(loss) is loss
