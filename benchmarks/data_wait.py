"""Share of the demo's step that is spent waiting for data, with one worker."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import main
from tests.conftest import TOY, make_world, toy_overrides


def demo(folder: Path) -> list[str]:
    """What `vlp train` takes for the demo; its shards are made first if need be."""
    subprocess.run([sys.executable, "-m", "vlp.cli", "data", "demo", "data/openmoji"], check=True, capture_output=True)
    return ["configs/align/demo.py", f"output={folder}"]


def toy(folder: Path) -> list[str]:
    """What `vlp train` takes for the tests' toy."""
    return [str(TOY), *toy_overrides(make_world(folder), folder)]


SIZES = {"experiment": demo, "steps": 30}
SMALL = {"experiment": toy, "steps": 3}


def measure(experiment: Callable[[Path], list[str]], steps: int) -> dict:
    """Trains for some steps and reads the log."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = ["name=run", "train.epochs=none", f"train.steps={steps}", "evaluate_every=0", "data.workers=1"]
        command = [sys.executable, "-m", "vlp.cli", "train", *experiment(folder), *overrides]
        subprocess.run(command, check=True, capture_output=True)
        log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    # the first step waits for the worker to start
    seconds = sum(line["seconds"] for line in log[1:])
    wait = sum(line["seconds"] * line["data_wait"] for line in log[1:])
    return {"steps": steps, "workers": 1, "data_wait_fraction": round(wait / seconds, 4), "goal": 0.05}


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
