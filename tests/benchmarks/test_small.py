"""Every program of `make bench` runs at its small sizes."""

import importlib
import json
import subprocess
import sys

import pytest
import torch

from benchmarks.__main__ import LONG, MEASURES
from benchmarks.common import DATA
from tests.conftest import ROOT, environment

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there: captions and photos to measure with")
WITHOUT_DATA = (
    "start_up",
    "seek",
    "contrastive_memory",
    "uniformity_memory",
    "queue_info_nce",
    "retrieval_memory",
    "vqa_ranking",
)
WITHOUT_DATA += (
    "data_wait",
    "shards_a_node",
    "pack_memory",
    "align_scale",
    "remote_shards",
    "engine_memory",
    "save_stop",
    "plan_accuracy",
    "soak",
)
SLOW = ("data_wait", "albef_step", "soak")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def marked(name: str):
    return pytest.param(name, marks=[needs_data] * (name not in WITHOUT_DATA) + [pytest.mark.slow] * (name in SLOW))


@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("name", map(marked, MEASURES + LONG))
def test_program_runs_small(name, monkeypatch):
    program = importlib.import_module(f"benchmarks.{name}")
    if hasattr(program, "in_fresh_process"):  # only measured peaks need one, and these are not looked at
        monkeypatch.setattr(program, "in_fresh_process", lambda function, *arguments: function(*arguments))
    measured = program.measure(**program.SMALL)
    assert json.loads(json.dumps(measured)) and program.SIZES.keys() == program.SMALL.keys()


def test_program_prints_its_measures_as_json():
    command = [sys.executable, "-m", "benchmarks.queue_info_nce", "--small"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["queries"] == 8
