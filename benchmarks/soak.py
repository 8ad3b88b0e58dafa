"""Memory, open files and threads of a run over many minutes of training, saving and evaluating, which must not grow.

Two processes train a tiny ALBEF with DDP. It is asked to stop at the end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import ROOT, main, resident_mib
from tests.conftest import environment, make_world, toy_overrides
from vlp.testing import free_port

SIZES = {"minutes": 20.0, "every": 25}
SMALL = {"minutes": 0.1, "every": 2}
CONFIG = ROOT / "tests" / "fixtures" / "toy_albef.py"
MARKS = 5  # readings, of which the first is at the start and the last at the end
READINGS = 20  # samples of a reading, of which the median counts: an evaluation starts threads and opens files
PAUSE = 0.5  # seconds between two samples


def measure(minutes: float, every: int) -> dict:
    """Train with a checkpoint every ``every`` steps and an evaluation every four checkpoints; read both processes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run, evaluations = folder / "soak", folder / "soak" / "eval.jsonl"
        settings = [f"save.every={every}", f"evaluate_every={4 * every}", "train.steps=10000000", "name=soak"]
        settings += ["schedule.kind=constant", "log.sample_keys=false"]
        words = ["train", str(CONFIG), *toy_overrides(make_world(folder), folder), *settings]
        shared = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "vlp.cli", *words],
                cwd=ROOT,
                env=environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=sys.stderr if minutes > 1 else subprocess.DEVNULL,
            )
            for rank in range(2)
        ]
        try:
            while not evaluations.exists():  # by then every kind of work has been done once
                assert all(process.poll() is None for process in processes), "a process has ended"
                time.sleep(0.1)
            began, readings = time.monotonic(), {}
            for mark in range(MARKS):
                minute = minutes * mark / (MARKS - 1)
                time.sleep(max(0, began + 60 * minute - time.monotonic()))
                readings[f"minute {minute:g}"] = [reading(process.pid) for process in processes]
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
        codes = [process.wait(120) for process in processes]
        assert codes == [0, 0], f"exit codes {codes}"
        counts = {
            "steps": len((run / "log.jsonl").read_text().splitlines()),
            "evaluations": len(evaluations.read_text().splitlines()),
        }
    return counts | {"checkpoints": counts["steps"] // every} | readings


def reading(pid: int) -> dict[str, float]:
    """Return medians over some seconds of a process: resident memory, open files, threads and child processes."""
    samples = []
    for _ in range(READINGS):
        samples.append(
            {
                "resident_mib": round(resident_mib("VmRSS", pid), 1),
                "open_files": len(os.listdir(f"/proc/{pid}/fd")),
                "threads": len(os.listdir(f"/proc/{pid}/task")),
                "children": len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()),
            }
        )
        time.sleep(PAUSE)
    return {name: sorted(sample[name] for sample in samples)[len(samples) // 2] for name in samples[0]}


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
