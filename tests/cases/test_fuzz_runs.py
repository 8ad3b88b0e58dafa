"""Run folders with seeded damage: every command that opens one ends with its result or with one line, and writes nothing else.

A fifth of the mutations damage bytes, the others replace, remove or add one value of valid JSON.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.cases.inputs import run as vlp
from tests.cases.test_fuzz import SECONDS, alter_json, damage, limited
from tests.conftest import toy_overrides
from tests.processes import train
from vlp.report.comparison import write_comparison

SEEDS, PER_TEST = 150, 15
# the commands that read a file
COMMANDS = {
    "eval/retrieval.json": ("compare",),
    "log.jsonl": ("report",),
    "eval.jsonl": ("report",),
    "starts.jsonl": ("report",),
    "checkpoints/best.json": ("eval",),
    "experiment.json": ("report", "eval"),
    "data.json": ("eval",),
}


@pytest.fixture(autouse=True)
def quick_plots(monkeypatch):
    """Draw every figure, but small and without its layout, which takes most of the time."""
    save = Figure.savefig

    def quick(figure: Figure, *arguments, dpi: float, **options) -> None:
        figure.set_layout_engine("none")
        save(figure, *arguments, dpi=20, **options)

    monkeypatch.setattr(Figure, "savefig", quick)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    """A run without its optimizer state, of which a copy takes no time."""
    output = tmp_path_factory.mktemp("runs")
    train(*toy_overrides(world, output), "train.steps=2", "save.every=2", "data.workers=0")
    return output / "toy"


def mutate(path: Path, rng: np.random.Generator) -> None:
    data = path.read_bytes()
    if rng.random() < 0.2:
        path.write_bytes(damage(data, rng))
    elif path.suffix == ".json":
        path.write_text(json.dumps(alter_json(json.loads(data), rng)))
    else:
        lines = [json.loads(line) for line in data.splitlines()]
        path.write_text("".join(json.dumps(alter_json(line, rng)) + "\n" for line in lines))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(0, SEEDS, PER_TEST))
def test_damaged_run_folders(first, trained, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where relative locations of a damaged experiment lead to
    for seed in range(first, first + PER_TEST):
        rng, name = np.random.default_rng(seed), list(COMMANDS)[seed % len(COMMANDS)]
        run = Path(shutil.copytree(trained, tmp_path / str(seed) / "run"))
        mutate(run / name, rng)
        before = files(tmp_path)
        arguments = {
            "report": ["report", run],
            "compare": ["report", run, "--output", tmp_path / str(seed) / "out"],
            "eval": ["eval", run, "retrieval", "resamples=0", "examples=1", "allow_contamination=true"],
        }
        for command in (arguments[command] for command in COMMANDS[name]):
            with limited(SECONDS):
                try:
                    code, _, error = vlp(capfd, *command)
                except BaseException as e:
                    raise AssertionError(f"seed {seed}, {name}: vlp {command[0]} raised {e!r}") from e
            assert code in (0, 2), (seed, name, command[0], error)
            if code == 2:
                assert error.count("\n") == 1 and error.startswith("vlp: "), (seed, name, command[0], error)
                assert len(error) < 5000, (seed, name, len(error))
        written = {path for path in files(tmp_path) - before if "/run/eval/retrieval" not in path}
        allowed = {f"{seed}/run/report.html", f"{seed}/out", f"{seed}/out/report.html"}
        assert written <= allowed | {f"{seed}/out/alignment_uniformity.png"}, (seed, name, written)
        shutil.rmtree(tmp_path / str(seed))


def test_the_run_that_is_damaged_is_whole(trained, tmp_path, capfd):
    """Without damage the same commands succeed, so that the tests above begin from something."""
    assert vlp(capfd, "report", trained)[0] == 0
    assert write_comparison([trained], tmp_path / "out").is_file()
