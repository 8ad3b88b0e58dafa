"""Mixed images are what the definition says, and depend on nothing but the key."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlp.data.mixup import Mixup
from vlp.errors import UserError
from vlp.training.validation import check_mixup
from vlp.types import Batch


def batch(count: int = 6) -> Batch:
    torch.manual_seed(0)
    return Batch(torch.arange(count), torch.randn(count, 3, 8, 8), labels=torch.arange(count) % 4)


def test_mixup_is_a_weighted_sum_with_the_batch_backwards():
    given, mixed = batch(), Mixup(mixup=0.8, cutmix=0.0)(batch(), 4, (1, 2, 3))
    own = mixed.targets[0, 0].item()  # classes 0 and 1 (of the last) have a share each
    assert 0 < own < 1 and torch.allclose(mixed.targets.sum(1), torch.ones(6))
    torch.testing.assert_close(mixed.image, own * given.image + (1 - own) * given.image.flip(0))
    one_hot = torch.nn.functional.one_hot(given.labels, 4).float()
    torch.testing.assert_close(mixed.targets, own * one_hot + (1 - own) * one_hot.flip(0))


def test_cutmix_takes_a_box_of_as_large_a_share_as_the_class():
    given, mixed = batch(), Mixup(mixup=0.0, cutmix=1.0)(batch(), 4, (5,))
    foreign = (mixed.image != given.image).all(1)
    assert torch.equal(mixed.image.movedim(1, -1)[foreign], given.image.flip(0).movedim(1, -1)[foreign])
    assert mixed.targets[0, 1].item() == pytest.approx(foreign[0].float().mean().item(), abs=1e-6)


def test_draws_depend_only_on_the_key_and_restore_numpys_state():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    a, b, c = (Mixup()(batch(), 4, key) for key in ((0, 7), (0, 7), (0, 8)))
    assert torch.equal(a.image, b.image) and torch.equal(a.targets, b.targets) and not torch.equal(a.targets, c.targets)
    assert (np.random.get_state()[1] == before).all()


def test_mixup_refuses_odd_batches_and_missing_labels():
    def experiment(mix=None, classes=4, size=8, accumulation=1):
        return SimpleNamespace(
            model=SimpleNamespace(classes=classes),
            micro_batch_size=size // accumulation,
            train=SimpleNamespace(mixup=mix or Mixup()),
        )

    check_mixup(experiment())
    for wrong, message in (
        (experiment(classes=None), "model.classes"),
        (experiment(Mixup(mixup=0.0, cutmix=0.0)), "one must be above 0"),
        (experiment(size=9, accumulation=3), "even"),
    ):
        with pytest.raises(UserError, match=message):
            check_mixup(wrong)
    with pytest.raises(ValueError, match="even number"):
        Mixup()(batch(5), 4, (0,))
