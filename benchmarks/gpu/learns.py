"""Does it learn on this device? Short runs of `vlp train`, with what is held out evaluated on the way.

The runs share the device, each in a process of its own; none is for its time. A run that is still going at the limit is asked to
stop, and its curve ends there. The starting weights are carried rounded to 8 bits (see `benchmarks.gpu.weights`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from safetensors.torch import load_file, save_file

from benchmarks.common import DATA
from benchmarks.gpu.weights import restored
from tests.conftest import ROOT, TOY, make_world, toy_overrides

SECONDS = 88  # of each run, start included; all of them run at once


@dataclass(frozen=True)
class Run:
    """A config and what is changed of it.

    Args:
        chance: of ``metric``, in the same unit, for a model that knows nothing.
    """

    config: str
    overrides: tuple[str, ...]
    metric: str
    chance: float


def checks(small: bool) -> dict[str, Callable[[], dict]]:
    runs = {"toy": toy()} if small else carried()
    return {name: partial(curve, name, small) for name in runs}


def toy() -> Run:
    folder = Path(tempfile.mkdtemp(prefix="vlp-learns-"))
    overrides = ("train.steps=4", "evaluate_every=2", *toy_overrides(make_world(folder), folder))
    return Run(str(TOY), overrides, "retrieval/mean_r@10", 10 / 50)


def carried() -> dict[str, Run]:
    """Of 190 drawings, and of 1,000 photos."""
    image = "model.image.weights=weights/efficientnet_lite0.safetensors"
    text, tokenizer = "model.text.weights=weights/minilm", "data.tokenizer=weights/minilm"
    common = (image, text, tokenizer, "data.workers=6", "save.every=100000", "output=runs")
    drawings = ("data.train=shards/openmoji/train", "data.val=shards/openmoji/val", "evaluate_every=40")
    photos = ("data.train=shards/flickr8k/train", "data.val=shards/flickr8k/val", "evaluate_every=90")
    fusion = ("model.fusion.weights=weights/minilm", "train.steps=720")
    return {
        "ALIGN's demo": Run("configs/align/demo.py", (*common, *drawings), "retrieval/mean_r@1", 1 / 190),
        "ALBEF on Flickr8k": Run(
            "configs/albef/flickr8k.py", (*common, *photos, *fusion), "retrieval/mean_r@10", 10 / 1000
        ),
    }


def curve(name: str, small: bool) -> dict:
    """The held-out metric by step; it must end above twice chance, but for the toy."""
    if not small and not (DATA / "shards").is_dir():
        return {"not_run": f"{DATA} has no shards: make gpu-carry makes them"}
    run, folder, code = finished(small)[name]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    evaluations = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    points = [[line["step"], line[run.metric]] for line in evaluations]
    if code or not points:
        output = (folder.parent / f"{folder.name}.out").read_text().splitlines()
        raise RuntimeError(f"vlp train exited with {code}: {' | '.join(output[-3:])}")
    return {
        "metric": run.metric,
        "chance": round(run.chance, 4),
        "points": points,
        "steps": len(log),
        "samples_a_second": round(sorted(line["samples_per_second"] for line in log)[len(log) // 2]),
        "ok": small or points[-1][1] > 2 * run.chance,
    }


@cache
def finished(small: bool) -> dict[str, tuple[Run, Path, int]]:
    """All runs, started at once: the run, its folder, and its exit code."""
    runs = {"toy": toy()} if small else carried()
    work = Path(tempfile.mkdtemp(prefix="vlp-learns-"))
    if not small:
        lay_out(work)
    started = {}
    for number, (name, run) in enumerate(runs.items()):
        folder = Path(next(o for o in run.overrides if o.startswith("output=")).removeprefix("output="))
        folder = work / folder / f"run-{number}"
        folder.parent.mkdir(exist_ok=True)
        started[name] = run, folder, start(run, folder, work)
    end = time.monotonic() + (600 if small else SECONDS)
    return {name: (run, folder, stopped(process, end)) for name, (run, folder, process) in started.items()}


def start(run: Run, folder: Path, work: Path) -> subprocess.Popen:
    config = run.config if Path(run.config).is_absolute() else str(ROOT / run.config)
    command = [sys.executable, "-m", "vlp.cli", "train", config, *run.overrides, f"name={folder.name}"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with open(folder.parent / f"{folder.name}.out", "w") as output:
        return subprocess.Popen(
            command, cwd=work, env=os.environ | {"PYTHONPATH": path}, stdout=output, stderr=subprocess.STDOUT
        )


def stopped(process: subprocess.Popen, end: float) -> int:
    """Exit code; at the end of its time a run is asked to save and stop."""
    try:
        return process.wait(max(1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        return process.wait(60)


def lay_out(work: Path) -> None:
    """``shards`` and ``weights`` in the folder that the runs start in."""
    (work / "shards").symlink_to(DATA / "shards")
    weights = work / "weights"
    (weights / "minilm").mkdir(parents=True)
    for file in (DATA / "weights" / "minilm").glob("*.json"):
        (weights / "minilm" / file.name).write_bytes(file.read_bytes())
    for source, target in {
        "minilm/rounded.safetensors": "minilm/model.safetensors",
        "efficientnet_lite0.rounded.safetensors": "efficientnet_lite0.safetensors",
    }.items():
        save_file(restored(load_file(DATA / "weights" / source)), weights / target)
