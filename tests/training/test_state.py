"""Queue, bank and averages against obvious references, and their way through a checkpoint."""

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from vlp.objectives.queues import MemoryBank, Queue
from vlp.optim.ema import EMA
from vlp.training.state import TrainState

CPU = torch.device("cpu")


def rows(count: int, start: int = 0, width: int = 3) -> torch.Tensor:
    return (torch.arange(count) + start)[:, None] * torch.ones(width)


def oldest_first(queue: Queue, name: str = "key") -> list[float]:
    """First numbers of the rows, in the order in which they were pushed."""
    held = queue[name][:, 0].tolist()
    begin = queue._pointer if len(queue) == len(queue._image_id) else 0
    return held[begin:] + held[:begin]


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 20])
@pytest.mark.parametrize("batches", [(8, 8, 8), (3, 1, 5, 2), (30,), (1,) * 25, (0, 4, 0)])
def test_queue_holds_the_newest_rows_for_any_batch(size, batches):
    queue, pushed = Queue(size, {"key": 3}, CPU), []
    for batch in batches:
        queue.push(torch.arange(batch) + len(pushed), key=rows(batch, len(pushed)))
        pushed += range(len(pushed), len(pushed) + batch)
        assert len(queue) == min(size, len(pushed)) == len(queue["key"]) == len(queue.image_id)
        assert oldest_first(queue) == pushed[-size:]
        assert queue.image_id.tolist() == queue["key"][:, 0].tolist()


def test_columns_stay_side_by_side_and_keep_no_graph():
    queue = Queue(4, {"image": 2, "text": 3}, CPU)
    queue.push(torch.arange(6), image=rows(6, width=2).requires_grad_(), text=(rows(6) + 100).to(torch.bfloat16))
    assert not queue["image"].requires_grad and queue["text"].dtype == torch.float32
    assert (queue["text"][:, 0] - queue["image"][:, 0]).tolist() == [100.0] * 4


def test_queue_starts_empty_or_full_of_random_directions_that_are_nobodys():
    assert len(Queue(5, {"key": 3}, CPU)) == 0
    full = Queue(500, {"key": 3}, CPU, torch.Generator().manual_seed(0))
    assert len(full) == 500 and (full.image_id == -1).all()
    torch.testing.assert_close(full["key"].norm(dim=1), torch.ones(500))
    assert full["key"].mean(0).norm() < 0.15
    again = Queue(500, {"key": 3}, CPU, torch.Generator().manual_seed(0))
    assert torch.equal(full["key"], again["key"])
    full.push(torch.arange(2), key=rows(2))
    assert full.image_id[:3].tolist() == [0, 1, -1] and len(full) == 500


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_bank_moves_the_rows_of_a_step_and_no_others(momentum):
    bank = MemoryBank(10, 4, momentum, CPU, torch.Generator().manual_seed(0))
    before, new = bank.rows.clone(), normalize(torch.randn(3, 4), dim=1)
    bank.push(torch.tensor([7, 0, 2]), new)
    for place, row in enumerate((7, 0, 2)):
        mixed = momentum * before[row] + (1 - momentum) * new[place]
        torch.testing.assert_close(bank.rows[row], mixed / mixed.norm())
    others = [1, 3, 4, 5, 6, 8, 9]
    assert torch.equal(bank.rows[others], before[others])


def test_of_a_row_that_comes_twice_the_last_counts():
    bank, once = (MemoryBank(10, 4, 0.5, CPU, torch.Generator().manual_seed(0)) for _ in range(2))
    new = torch.randn(5, 4)
    bank.push(torch.tensor([3, 1, 3, 3, 1]), new)
    once.push(torch.tensor([3, 1]), new[3:])
    assert torch.equal(bank.rows, once.rows)


def test_bank_starts_with_norms_about_one_and_without_a_partition():
    bank = MemoryBank(2000, 64, 0.5, CPU, torch.Generator().manual_seed(0))
    assert len(bank) == 2000 and bank.partition.item() == 0
    assert bank.rows.norm(dim=1).mean().item() == pytest.approx(1, abs=0.01)
    assert bank.rows.abs().max() <= (3 / 64) ** 0.5
    bank.push(torch.tensor([0]), torch.ones(1, 64), torch.tensor([5.0]))
    bank.push(torch.tensor([1]), torch.ones(1, 64))
    assert bank.partition.item() == 5


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_average_is_the_recurrence_of_parameters_and_a_copy_of_buffers():
    model = network()
    average = EMA(model, decay=0.9)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(5, 3))  # moves the running statistics
        average.update(model)
        expected = {n: 0.9 * expected[n] + 0.1 * p.detach() for n, p in model.named_parameters()}
    for name, parameter in average.network.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name])
        assert not parameter.requires_grad
    for own, buffer in zip(average.network.buffers(), model.buffers()):
        assert torch.equal(own, buffer)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_average_runs_in_the_mode_that_was_asked_for(mode):
    average = EMA(network(), 0.9, mode)
    assert {module.training for module in average.network.modules()} == {mode == "train"}


def test_average_in_training_mode_leaves_what_is_frozen_in_evaluation_mode():
    model = network()
    model[1].eval()  # as the trainer puts a frozen BatchNorm
    average = EMA(model, 0.9, "train")
    assert [module.training for module in average.network] == [True, False, True]


def states() -> TrainState:
    queue, bank = Queue(5, {"key": 3}, CPU), MemoryBank(6, 3, 0.5, CPU, torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = network()
    return TrainState(
        average=EMA(model, 0.9), momentum=EMA(model, 0.99, "train"), queues={"moco": queue, "instance": bank}
    )


def test_state_of_a_checkpoint_is_the_state_that_was_saved():
    saved, loaded = states(), states()
    saved.step, saved.position, saved.skipped = 7, 56, 1
    saved.queues["moco"].push(torch.arange(7), key=rows(7))
    saved.queues["instance"].push(torch.tensor([2]), torch.ones(1, 3), torch.tensor([4.0]))
    for average in (saved.average, saved.momentum):
        average.update(network())
    files = {name: {k: t.clone() for k, t in tensors.items()} for name, tensors in saved.files().items()}
    assert files.keys() == {"average", "momentum", "memory"}
    loaded.load(saved.counters(), files.__getitem__)
    assert loaded.counters() == saved.counters() and loaded.counters()["position"] == 56
    for name, tensors in loaded.files().items():
        assert tensors.keys() == files[name].keys()
        assert all(torch.equal(t, files[name][k]) for k, t in tensors.items())
    for state in (saved, loaded):  # and goes on in the same way
        state.queues["moco"].push(torch.tensor([50, 51]), key=rows(2, 50))
    assert oldest_first(loaded.queues["moco"]) == oldest_first(saved.queues["moco"]) == [4, 5, 6, 50, 51]


def check_queues(process: int, pushed: int) -> str:
    """Push a row to a queue, another one on the second process if ``pushed``; return the complaint."""
    state = TrainState(queues={"itc": Queue(4, {"key": 3}, CPU)})
    state.queues["itc"].push(torch.arange(1), key=rows(1, start=process * pushed))
    try:
        state.check_replicas()
    except RuntimeError as error:
        return str(error)
    return ""


def test_queues_that_differ_between_processes_are_noticed(pair):
    assert pair(check_queues, 0) == ["", ""]
    assert pair(check_queues, 1) == ["the queue of objectives.itc differs between the processes"] * 2
