"""Run the ``vlp`` command in new processes, with exit codes, signals and several connected processes.

The processes are forked from one that has imported everything, so that a start takes a second and not ten. The environment that
`accelerate launch` sets is set here. tests/training/test_engines.py runs the launcher itself.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, TOY
from vlp.testing import free_port
from vlp.weights.checkpoints import all_steps

CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, by the process that all others are forked from. It computes nothing: threads do not survive a fork.
CONTEXT.set_forkserver_preload(["tests.preload"])


@dataclass
class Done:
    """Exit codes and standard errors of the processes. The exit code of a killed process is minus its signal."""

    codes: list[int]
    errors: list[str]


def engine_environment(engine: str) -> dict[str, str]:
    """Return what `accelerate launch` adds to the environment for an engine: "ddp", "fsdp2", or "zeroN"; "deepspeed" is
    "zero2"."""
    if engine == "fsdp2":
        return {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    if engine == "ddp":
        return {}
    config = ROOT / "launch" / f"{engine.replace('deepspeed', 'zero2')}.json"
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config),
        "ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file,zero3_init_flag",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    }


@contextlib.contextmanager
def launched_with(engine: str, process: int, processes: int):
    """Give this process, which is connected to the others already, the environment of a launcher for one engine.

    Without this, accelerate would remember the engine that it started first.
    """
    from accelerate.state import AcceleratorState, GradientState

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    mine = {}
    if processes > 1:
        mine = {"RANK": process, "LOCAL_RANK": process, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        mine |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}  # not used
    before = dict(os.environ)
    forget()
    os.environ.update({name: str(value) for name, value in mine.items()} | engine_environment(engine))
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        forget()


class Running:
    """Several connected processes that run ``function(*arguments)``, whose result is the exit code."""

    def __init__(
        self, function, arguments: tuple, world: int = 1, engine: str = "ddp", environment: dict | None = None
    ):
        self.folder = Path(tempfile.mkdtemp(prefix="vlp-processes-"))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        shared["LOCAL_WORLD_SIZE"] = str(world)
        shared = (shared if world > 1 or engine != "ddp" else {}) | (environment or {})
        shared |= engine_environment(engine)
        self.processes = []
        for rank in range(world):
            own = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if "WORLD_SIZE" in shared else {})
            self.processes.append(CONTEXT.Process(target=_child, args=(function, arguments, own, self.folder, rank)))
            self.processes[-1].start()

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it may end just then
                    os.kill(process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float = 120) -> Done:
        """Wait for all processes. When one fails, end the others, as a launcher does."""
        end = time.monotonic() + timeout
        while any(p.is_alive() for p in self.processes):
            time.sleep(0.02)
            if time.monotonic() > end or any(p.exitcode for p in self.processes):
                for process in self.processes:  # a failing process has time to write its error
                    process.join(5)
                self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join(10)
        errors = [(self.folder / f"{rank}.err").read_text() for rank in range(len(self.processes))]
        assert time.monotonic() < end, f"no end after {timeout} s:\n{errors}"
        return Done([p.exitcode for p in self.processes], errors)


def _child(function, arguments: tuple, environment: dict[str, str], folder: Path, rank: int) -> None:
    os.environ.update({"OMP_NUM_THREADS": "1"} | environment)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was started by hand
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.exit(function(*arguments))


def command_line(arguments: list[str]) -> int:
    """Run ``vlp ARGUMENTS`` in this process."""
    from vlp.cli import main

    torch.set_num_threads(1)
    return main(arguments)


def kill_at_call(number: int, *functions: tuple[object, str], counts: Callable[[], bool] = lambda: True) -> None:
    """Kill this process, as SIGKILL does, at the given one of the calls that change files.

    Args:
        number: Number of the call, counted from 1.
        functions: Modules and names of functions that count, in addition to those of `os`.
        counts: Whether a call counts.
    """
    calls = []

    def counted(original):
        def call(*args, **kwargs):
            if counts():
                calls.append(original)
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for module, name in (*functions, *((os, name) for name in ("fsync", "replace", "rmdir", "unlink"))):
        setattr(module, name, counted(getattr(module, name)))


def start(*arguments: object, function=command_line, **how) -> Running:
    """Start ``vlp ARGUMENTS`` in new processes; keywords are those of `Running`."""
    return Running(function, ([str(a) for a in arguments],), **how)


def run(*arguments: object, **how) -> Done:
    return start(*arguments, **how).wait()


def train(*arguments: object, **how) -> Done:
    """Train the toy experiment and assert that it succeeds."""
    done = run("train", TOY, *arguments, **how)
    assert not any(done.codes), "\n".join(done.errors)
    return done


def resume(folder: Path, *arguments: object, **how) -> Done:
    done = run("train", "--resume", folder, *arguments, **how)
    assert not any(done.codes), "\n".join(done.errors)
    return done


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """Return the loss of each step, and assert that each step has exactly one line."""
    lines = records(folder)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def samples(folder: Path) -> list[list[str]]:
    """Return the keys of every global batch in order."""
    batches: dict[int, list[str]] = {}
    lines = {}
    for path in folder.glob("samples.*.jsonl"):
        lines[int(path.name.split(".")[1])] = [json.loads(line) for line in path.read_text().splitlines()]
    for rank in sorted(lines):
        for line in lines[rank]:
            batches.setdefault(line["step"], []).extend(line["keys"])
    return [batches[step] for step in sorted(batches)]


def tensors(folder: Path, name: str, step: int | None = None) -> dict:
    """Return the tensors of a checkpoint. Without ``step`` it is the newest one."""
    path = all_steps(folder / "checkpoints")[0] if step is None else folder / "checkpoints" / f"step-{step:08d}"
    return load_file(path / f"{name}.safetensors")


def wait_for_step(running: Running, folder: Path, step: int) -> None:
    """Wait until the log has ``step``, or the processes have ended."""
    log = folder / "log.jsonl"
    while any(p.is_alive() for p in running.processes):
        if log.exists() and log.read_text().count("\n") >= step:
            return
        time.sleep(0.003)
