"""Evaluations show their progress: a bar on a terminal, and lines elsewhere."""

import os
import re
import sys
import time

import pytest
import torch
from torch.utils.data import Dataset

from tests.tasks.fakes import BlindModel, eval_model
from vlp.tasks import progress
from vlp.tasks.base import Result, Task
from vlp.tasks.metrics import Interval
from vlp.tasks.progress import evaluation, tracked
from vlp.tasks.sharded import ShardedBatches, length_batches


class Clock:
    """A clock that a test moves on."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)

    def batches(self, count: int, seconds: float):
        for n in range(count):
            self.now += seconds
            yield n


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def test_log_file_gets_a_line_every_ten_seconds_with_the_mean_of_all_batches(clock, capsys):
    with evaluation("retrieval"):
        assert list(tracked(clock.batches(10, 6.0), 10)) == list(range(10))
    # batch n is loaded n times 6 seconds after the start, when n - 1 batches are done
    assert capsys.readouterr().err.splitlines() == [
        "retrieval: batch 1/10  about 1.8 min left",
        "retrieval: batch 3/10  about 0.9 min left",
        "retrieval: batch 5/10  about 0.6 min left",
        "retrieval: batch 7/10  about 0.3 min left",
        "retrieval: batch 9/10  about 0.1 min left",
    ]


def test_short_evaluation_prints_nothing(clock, capsys):
    assert list(tracked(clock.batches(10, 0.9), 10)) == list(range(10))
    assert capsys.readouterr().err == ""


def test_other_processes_print_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr("vlp.distributed.rank", lambda: 1)
    assert list(tracked(clock.batches(10, 60.0), 10)) == list(range(10))
    assert capsys.readouterr().err == ""


def shown_on_terminal(monkeypatch, batches, total: int) -> str:
    """Run `tracked` with a terminal as stderr, and return what the terminal has received, without escape sequences."""
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        patch.setenv("TERM", "xterm")
        with evaluation("retrieval"):
            assert len(list(tracked(batches, total))) == total
        stderr.flush()
        os.set_blocking(master, False)
        try:
            text = os.read(master, 1 << 20).decode()
        except BlockingIOError:
            text = ""
    os.close(master)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(progress, "FIRST_BAR", 0.05)
    text = shown_on_terminal(monkeypatch, (time.sleep(0.04) or n for n in range(10)), 10)
    assert re.search(r"retrieval .*\d+/10", text) and "min left" not in text


def test_terminal_shows_nothing_of_a_short_evaluation(monkeypatch):
    assert shown_on_terminal(monkeypatch, range(10), 10) == ""


class Numbers(Dataset):
    def __len__(self) -> int:
        return 7

    def __getitems__(self, positions):
        return positions, []


def test_tasks_name_their_loops_and_count_their_batches(monkeypatch):
    """Both loops over batches report their number of batches, under the name of the task."""
    seen = []

    def record(batches, total):
        seen.append((progress.NAME.get(), total, len(found := list(batches))))
        return iter(found)

    monkeypatch.setattr("vlp.tasks.sharded.tracked", record)

    class Loops(Task):
        name = "loops"

        def evaluate(self, model):
            assert [n for batch in ShardedBatches(model, Numbers(), 3) for n in batch] == list(range(7))
            assert len(list(length_batches(torch.arange(7), 2))) == 4
            return Result("p", "d", {"n": 7}, {"a": Interval(1, 1, 1)})

    Loops()(eval_model(BlindModel()))
    assert seen == [("loops", 3, 3), ("loops", 4, 4)] and progress.NAME.get() == "encoding"
