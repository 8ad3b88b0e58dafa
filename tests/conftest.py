"""Fixtures: a small data set of coloured shapes with captions, packed into shards, and commands in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from vlp.data.preparing.formats import Pair
from vlp.data.preparing.pack import Packing, pack
from vlp.data.text import train_tokenizer
from vlp.specs.config_file import ConfigLoader

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
TOY = ROOT / "tests" / "fixtures" / "toy.py"
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 60),
    "blue": (40, 60, 220),
    "yellow": (230, 220, 40),
    "black": (10, 10, 10),
}
PLACES = ("left", "right", "top", "bottom")


def draw_pairs(folder: Path, count: int) -> list[Pair]:
    """Draw ``count`` images of a coloured square, each with two captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pairs = []
    for n in range(count):
        colour, place = list(COLOURS)[n % 5], PLACES[n // 5 % 4]
        pixels = rng.integers(200, 256, (40, 48, 3), dtype=np.uint8)
        rows = {"top": slice(2, 14), "bottom": slice(26, 38)}.get(place, slice(14, 26))
        columns = {"left": slice(2, 14), "right": slice(34, 46)}.get(place, slice(18, 30))
        pixels[rows, columns] = COLOURS[colour]
        path = folder / f"{n:04d}.png"
        Image.fromarray(pixels).save(path)
        captions = (f"a {colour} square at the {place} number {n}", f"{place} {colour} thing")
        pairs.append(Pair(image=str(path), captions=captions, key=f"{n:04d}", source="toy", extra={}))
    return pairs


@pytest.fixture(autouse=True)
def forget_configs():
    """Remove the modules and the entries of ``sys.path`` that a test's configs added."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if isinstance(vars(module).get("__loader__"), ConfigLoader):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def forget_modules_of_tests(tmp_path_factory):
    """Remove modules that a test wrote, so that the next one can write modules of the same name."""
    yield
    written = str(tmp_path_factory.getbasetemp()) + os.sep
    for name, module in list(sys.modules.items()):
        if str(vars(module).get("__file__")).startswith(written):
            del sys.modules[name]


@pytest.fixture(scope="session")
def fork_server():
    """Start the process that others are forked from, with the modules of `tests.preload`.

    A `ProcessPool` that comes first would start it with fewer modules, and each later process would import the rest.
    """
    import tests.processes  # noqa: F401, which sets what is imported

    forkserver.ensure_running()


@pytest.fixture(scope="session")
def pair(fork_server):
    """Return two connected processes that all tests share."""
    from vlp.testing import two_processes

    return two_processes()


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def make_world(folder: Path) -> Path:
    """Fill ``folder`` with ``shards`` (50 samples in 5 shards) and ``tokenizer`` (up to 200 tokens)."""
    pairs = draw_pairs(folder / "pictures", 50)
    pack(pairs, folder / "shards", Packing(shard_samples=10))
    train_tokenizer([c for p in pairs for c in p.captions], vocab_size=200).save(folder / "tokenizer")
    return folder


def toy_overrides(world: Path, output: Path) -> list[str]:
    return [
        f"data.train={world / 'shards'}",
        f"data.val={world / 'shards'}",
        f"data.tokenizer={world / 'tokenizer'}",
        f"output={output}",
    ]


def vlp(
    *arguments: object, launch: tuple[str, ...] = (), cwd: Path = ROOT, timeout: float = 240
) -> subprocess.CompletedProcess:
    """Run ``vlp ARGUMENTS`` in a new process, with ``accelerate launch LAUNCH`` if ``launch`` is given."""
    return subprocess.run(
        command(*arguments, launch=launch), cwd=cwd, timeout=timeout, capture_output=True, text=True, env=environment()
    )


def command(*arguments: object, launch: tuple[str, ...] = ()) -> list[str]:
    if launch:
        start = [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "vlp.cli"]
    else:
        start = [sys.executable, "-m", "vlp.cli"]
    return [*start, *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
