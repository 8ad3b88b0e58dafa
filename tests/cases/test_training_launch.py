"""Launches that would train something else, or wait for ever, say so: precision, missing processes, FSDP, odd variables."""

import os
import signal
import time

import pytest

from tests.cases.inputs import refused
from tests.conftest import TOY, toy_overrides
from tests.processes import command_line, run, start, train
from vlp.config import Training
from vlp.errors import UserError
from vlp.testing import free_port
from vlp.training import environment
from vlp.training.environment import check_settings

ONE_OF_TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}


def overrides(world, output) -> list[str]:
    return [*toy_overrides(world, output), "data.workers=0", "train.steps=3", "name=run"]


@pytest.mark.parametrize(
    "variables, ours, message",
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, Training(), "set train.precision=bf16"),
        (
            {"ACCELERATE_MIXED_PRECISION": "BF16"},
            Training(),
            "asks for mixed precision bf16 and train.precision is fp32",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, Training(), "launch with --mixed_precision no$"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, Training(precision="bf16"), "train.precision is bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, Training(), "launch with --mixed_precision no$"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, Training(), "set train.compile=true"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, Training(accumulation=2), "asks for 4 .* is 2"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, Training(), "clipping at 0.5 and train.clip_norm is 1.0"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, Training(precision="bf16"), None),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, Training(precision="bf16"), None),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO"}, Training(), None),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, Training(accumulation=2), None),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, Training(clip_norm=1.0), None),
        ({}, Training(), None),
    ],
)
def test_settings_of_the_launcher_agree_with_the_experiment(monkeypatch, variables, ours, message):
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if message is None:
        check_settings(ours)
    else:
        with pytest.raises(UserError, match=message):
            check_settings(ours)


def test_precision_of_the_launcher_is_not_ignored(world, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    error = refused(capfd, "train", TOY, *overrides(world, tmp_path / "runs"))
    assert "the launcher asks for mixed precision bf16 and train.precision is fp32; launch with" in error
    assert not (tmp_path / "runs").exists()


def test_variables_that_accelerate_prefers_to_its_arguments_do_not_change_the_run(world, tmp_path):
    """With 1 accumulation step of the launcher, Accelerate would step after each of two micro-batches."""
    for name, variables in (("plain", {}), ("set", {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"})):
        more = ("train.accumulation=2", f"name={name}")
        train(*overrides(world, tmp_path), *more, environment=variables)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("plain", "set")]
    assert [line.partition('"epoch"')[0] for line in logs[0]] == [line.partition('"epoch"')[0] for line in logs[1]]


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 and not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start several"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 and not LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start several"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two, which is not a whole number; unset it"),
        ({**ONE_OF_TWO, "RANK": "-1"}, "RANK=-1, which is not a whole number"),
        ({**ONE_OF_TWO, "RANK": "2"}, "RANK=2 of WORLD_SIZE=2"),
        (
            {**ONE_OF_TWO, "MASTER_PORT": "99999"},
            "MASTER_PORT=99999; give the launcher a --main_process_port up to 65535",
        ),
        ({**ONE_OF_TWO, "MASTER_PORT": "http"}, "MASTER_PORT=http, which is not a whole number"),
        ({**ONE_OF_TWO, "MASTER_ADDR": "nowhere.invalid"}, "MASTER_ADDR=nowhere.invalid, which is not known"),
        ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "1"}, "FSDP"),
    ],
)
def test_environment_of_no_possible_launch_is_refused(world, tmp_path, capfd, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert message in refused(capfd, "train", TOY, *overrides(world, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_port_in_use_is_refused(world, tmp_path, capfd, monkeypatch):
    import socket

    with socket.socket(socket.AF_INET6) as busy:
        busy.bind(("::", 0))
        busy.listen()
        for name, value in {**ONE_OF_TWO, "MASTER_PORT": str(busy.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        # torch itself prints two warnings, so only the last line is ours
        from vlp import cli

        assert cli.main(["train", str(TOY), *overrides(world, tmp_path / "runs")]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("vlp: port ") and "is in use; launch with another --main_process_port" in last


def soon(arguments: list[str], rank: str = "0") -> int:
    environment.FIRST_NOTE = 0.5
    os.environ.update({"RANK": rank, "LOCAL_RANK": rank})
    return command_line(arguments)


def soon_second(arguments: list[str]) -> int:
    return soon(arguments, "1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("rank", [0, 1])
def test_process_without_its_others_says_who_is_awaited_and_can_be_stopped(world, tmp_path, rank, number):
    assert environment.FIRST_NOTE < 60
    port = free_port()
    alone, function = {**ONE_OF_TWO, "MASTER_PORT": str(port)}, (soon, soon_second)[rank]
    running = start("train", TOY, *overrides(world, tmp_path / "runs"), function=function, environment=alone)
    error, end = running.folder / "0.err", time.monotonic() + 60
    while not error.exists() or "waiting for" not in error.read_text():
        assert time.monotonic() < end and running.processes[0].is_alive(), error.read_text()
        time.sleep(0.05)
    began = time.monotonic()
    running.signal(number)
    done = running.wait(timeout=30)
    assert time.monotonic() - began < 10 and done.codes == [130]
    line, stopped = done.errors[0].splitlines()
    awaited = (
        f"process 1 of 2 (0 to 1) to connect to 127.0.0.1:{port}"
        if rank == 0
        else f"process 0 of 2 at 127.0.0.1:{port}"
    )
    assert line == f"vlp: waiting for {awaited}; start it, or unset WORLD_SIZE to train in one process"
    assert stopped == "vlp: stopped while waiting for other processes"
    assert not (tmp_path / "runs").exists()


def gives_up(arguments: list[str]) -> int:
    environment.GIVE_UP = 1.0
    return command_line(arguments)


def test_waiting_for_a_process_ends(world, tmp_path):
    alone = {**ONE_OF_TWO, "MASTER_PORT": str(free_port())}
    done = run("train", TOY, *overrides(world, tmp_path / "runs"), function=gives_up, environment=alone)
    assert done.codes == [2]
    (line,) = done.errors[0].splitlines()
    assert line.startswith("vlp: waited 1 s for process 1 of 2 (0 to 1) to connect to 127.0.0.1:")
