"""The files of launch/ for eight GPUs, with the GPUs that are there: one is enough. Losses are those of the CPU in float32."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import ROOT, TOY, command, environment, toy_overrides
from tests.processes import engine_environment, losses, train
from vlp.testing import free_port

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
SAME = ("model.text.dropout=0.0", "train.clip_norm=0.5", "train.ema_decay=0.9", "train.steps=8", "save.every=4")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def launch_file(engine: str, machine: str) -> dict:
    return yaml.safe_load((ROOT / "launch" / f"{engine}_{machine}.yaml").read_text())


@pytest.mark.parametrize("engine", ENGINES)
def test_launch_files_for_gpus_are_those_for_cpus_with_more_processes(engine):
    """The files for CPUs are run by other tests, without a GPU."""
    gpus, cpus = launch_file(engine, "gpu8"), launch_file(engine, "cpu2")
    assert (gpus.pop("num_processes"), cpus.pop("num_processes")) == (8, 2)
    assert gpus.pop("gpu_ids", "all") == "all" and gpus == cpus


@pytest.fixture(scope="module")
def on_cpu(world, tmp_path_factory) -> list[float]:
    output = tmp_path_factory.mktemp("cpu")
    train(*toy_overrides(world, output), *SAME, "name=cpu", environment={"CUDA_VISIBLE_DEVICES": ""})
    return losses(output / "cpu")


def losses_on(device: str, engine: str, world: Path, output: Path, *more: str) -> list[float]:
    """Train on a device in one process, or with the launcher on two GPUs: it refuses these files for one process."""
    processes = 2 if device == "cuda" and torch.cuda.device_count() > 1 else 1
    name = "deepspeed" if engine.startswith("zero") else "single" if (engine, processes) == ("ddp", 1) else engine
    own, launch = {"NVIDIA_TF32_OVERRIDE": "0"}, ()  # float32 is float32
    if processes == 1:
        own |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        own |= {"MASTER_PORT": str(free_port())} | engine_environment(engine)
        own |= {"DS_ACCELERATOR": device} if "DS_ACCELERATOR" in own else {}
    else:
        file = str(ROOT / "launch" / f"{engine}_gpu8.yaml")
        launch = ("--config_file", file, "--num_processes", str(processes), "--main_process_port", str(free_port()))
    arguments = (*toy_overrides(world, output), *SAME, *more, f"name={engine}", f"train.engine={name}")
    done = subprocess.run(
        command("train", TOY, *arguments, f"train.processes={processes}", launch=launch),
        cwd=ROOT,
        env=environment() | own,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    if name != "single":  # which connects nothing
        assert f"over {'nccl' if device == 'cuda' else 'gloo'}" in done.stderr
    return losses(output / engine)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
def test_losses_on_gpus_equal_those_of_the_cpu(world, tmp_path, on_cpu, engine):
    found = losses_on("cuda", engine, world, tmp_path)
    assert len(found) == 8 and found == pytest.approx(on_cpu, abs=1e-4)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_losses_on_gpus_are_close_to_those_of_float32(world, tmp_path, on_cpu, engine):
    found = losses_on("cuda", engine, world, tmp_path, "train.precision=bf16")
    assert found != on_cpu and found == pytest.approx(on_cpu, abs=0.05)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would use the GPU, as above")
@pytest.mark.parametrize("engine", ENGINES)
def test_losses_of_the_same_commands_on_a_cpu(world, tmp_path, on_cpu, engine):
    """A mistake in the tests above is found before they meet a GPU."""
    assert losses_on("cpu", engine, world, tmp_path) == pytest.approx(on_cpu, abs=1e-5)
