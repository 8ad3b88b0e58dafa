"""The console of a run: the time left does not jump with single steps, and the bar makes room for that of an evaluation."""

import os
import re
import sys
from dataclasses import replace

import pytest

from tests.fixtures.toy import config as toy
from vlp.training import logging
from vlp.training.logging import RunLog


def record(step: int, seconds: float) -> dict:
    return {"step": step, "loss": 1.0, "lr": 1e-3, "samples_per_second": 8.0, "seconds": seconds, "data_wait": 0.0}


@pytest.fixture
def run_log(tmp_path):
    """Return a function that opens the log of a run in a new folder."""
    experiment = replace(toy(), output=str(tmp_path))
    experiment.folder.mkdir()
    return lambda total_steps: RunLog(experiment, 0, total_steps)


def test_time_left_is_that_of_the_mean_step(run_log, capsys, monkeypatch):
    """Steps alternate between 1 and 9 seconds, as on a busy machine. Those of one step would give 16 or 150 minutes."""
    clock = [0.0]
    monkeypatch.setattr(logging.time, "monotonic", lambda: clock[0])
    log = run_log(1200)
    for step in range(1, 201):
        seconds = 1.0 if step % 2 else 9.0
        clock[0] += seconds
        log.step(record(step, seconds))
    log.close()
    left = [float(text) for text in re.findall(r"about ([\d.]+) min left", capsys.readouterr().err)]
    assert len(left) > 50
    # after a hundred steps, the mean of 5 seconds times the steps that are left
    assert all(abs(a - b) < 1.0 for a, b in zip(left[40:], left[41:])) and left[-1] == pytest.approx(
        1000 * 5 / 60, abs=1
    )


def test_time_left_follows_a_lasting_change_of_speed(run_log, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(logging.time, "monotonic", lambda: clock[0])
    log = run_log(1000)
    for step in range(1, 401):
        seconds = 1.0 if step <= 200 else 11.0
        clock[0] += seconds
        log.step(record(step, seconds))
    log.close()
    left = re.findall(r"about ([\d.]+) min left", capsys.readouterr().err)
    assert float(left[-1]) == pytest.approx(600 * 11 / 60)


def test_bar_of_the_training_is_stopped_during_an_evaluation(run_log, monkeypatch):
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        patch.setenv("TERM", "xterm")
        log = run_log(10)
        assert log.progress.live.is_started
        with log.paused():
            assert not log.progress.live.is_started
        log.step(record(5, 1.0))
        assert log.progress.live.is_started and log.progress.tasks[0].completed == 5
        log.close()
    os.close(master)
