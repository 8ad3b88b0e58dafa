"""Share of the demo's step that is spent waiting for data, with one worker."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def measure(steps: int = 30) -> dict:
    """Trains the demo's experiment for some steps (its shards are made first if need be) and reads its log."""
    subprocess.run([sys.executable, "-m", "vlp.cli", "data", "demo", "data/openmoji"], check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            f"output={folder}",
            "train.epochs=none",
            f"train.steps={steps}",
            "evaluate_every=0",
            "data.workers=1",
        ]
        command = [sys.executable, "-m", "vlp.cli", "train", "configs/align/demo.py", *arguments]
        subprocess.run(command, check=True, capture_output=True)
        log = [json.loads(line) for line in (Path(folder) / "demo" / "log.jsonl").read_text().splitlines()]
    # the first step waits for the worker to start
    seconds = sum(line["seconds"] for line in log[1:])
    wait = sum(line["seconds"] * line["data_wait"] for line in log[1:])
    return {"steps": steps, "workers": 1, "data_wait_fraction": round(wait / seconds, 4), "goal": 0.05}


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
