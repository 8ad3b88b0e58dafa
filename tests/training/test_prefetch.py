"""Batches reach the device complete and in their order."""

import pytest
import torch

from vlp.data.stream import Loaded
from vlp.training.prefetch import on_device
from vlp.types import Answers, Batch


def loaded(number: int, image: torch.Tensor) -> Loaded:
    answers = Answers(torch.full((1, 3), number), torch.ones(1, 3).bool(), torch.ones(1), torch.zeros(1).long())
    view = Batch(torch.tensor([number]), image + 1)
    return Loaded(
        Batch(torch.tensor([number]), image, answers=answers, views=(view,), keys=(str(number),)), [{"bad": number}]
    )


def check(device: str, count: int, pinned: bool) -> None:
    images = [torch.randn(1, 3, 64, 64) for _ in range(count)]
    sent = [loaded(n, image) for n, image in enumerate(images)]
    sent = [each.pin_memory() for each in sent] if pinned else sent
    received = list(on_device(iter(sent), torch.device(device)))
    assert [each.batch.keys for each in received] == [(str(n),) for n in range(count)]
    assert [each.bad for each in received] == [[{"bad": n}] for n in range(count)]
    for n, (each, image) in enumerate(zip(received, images)):
        assert each.batch.image.device.type == device and torch.equal(each.batch.image.cpu(), image)
        assert torch.equal(each.batch.views[0].image.cpu(), image + 1)
        assert each.batch.answers.input_ids.device.type == device and each.batch.answers.input_ids[0, 0] == n


@pytest.mark.parametrize("count", [0, 1, 5])
def test_all_batches_arrive_in_order(count):
    check("cpu", count, pinned=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("count", [0, 1, 50])
def test_all_batches_arrive_in_order_on_a_gpu(count):
    check("cuda", count, pinned=True)
