"""Is a run right on this device? Resume to the bit; one process with NCCL (gloo on a CPU), under ZeRO-2, ZeRO-3, and FSDP2.

Each run is `vlp train` on the tests' toy in a process of its own, some of them at the same time: a start costs more than six
steps. Kernels whose sums depend on the order of threads are off, so that equal means equal.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.gpu.timing import DEVICE
from tests.conftest import ROOT, TOY, make_world, toy_overrides
from tests.processes import engine_environment, free_port

STEPS, CUT = 6, 3
TRAIN = "import torch, sys; torch.use_deterministic_algorithms(True, warn_only=True); from vlp.cli import main; sys.exit(main())"
ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def checks(small: bool) -> dict[str, Callable[[], dict]]:
    return {
        "resume is equal to the bit": resume,
        "collectives with one process": collectives,
        "DDP with one process": lambda: same_losses("ddp"),
        "ZeRO-2 with one process": lambda: zero("zero2"),
        "ZeRO-3 with one process": lambda: zero("zero3"),
        "FSDP2 with one process": lambda: same_losses("fsdp2"),
    }


@cache
def runs() -> dict[str, subprocess.CompletedProcess]:
    """The runs that do not need each other, all at once, in folders of their names."""
    wanted = {"plain": {}, "again": {}}
    for engine in ("ddp", "fsdp2", *(["zero2", "zero3"] if importlib.util.find_spec("deepspeed") else [])):
        wanted[engine] = ONE_PROCESS | {"MASTER_PORT": str(free_port())} | engine_environment(engine)
        if "DS_ACCELERATOR" in wanted[engine]:
            wanted[engine]["DS_ACCELERATOR"] = DEVICE
    started = {name: start(new(name), environment) for name, environment in wanted.items()}
    return {name: finished(process) for name, process in started.items()}


@cache
def folder() -> Path:
    return make_world(Path(tempfile.mkdtemp(prefix="vlp-runs-")))


def new(name: str) -> list[str]:
    sizes = (f"train.steps={STEPS}", f"save.every={CUT}", "save.best=none", "evaluate_every=0")
    return ["train", str(TOY), *toy_overrides(folder(), folder()), f"name={name}", *sizes]


def start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen:
    whole = os.environ | {"PYTHONPATH": path(), "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAIN, *arguments]
    return subprocess.Popen(
        command, env=whole | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


def path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def finished(process: subprocess.Popen) -> subprocess.CompletedProcess:
    output, _ = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def succeeded(name: str) -> Path:
    """The folder of a run. Raises RuntimeError with its last lines if it failed."""
    done = runs()[name]
    if done.returncode:
        print(done.stdout)
        raise RuntimeError(f"vlp train exited with {done.returncode}: {' | '.join(done.stdout.splitlines()[-3:])}")
    return folder() / name


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def equal(first: Path, second: Path, step: int) -> dict[str, bool]:
    """Which files of the checkpoints after a step hold the same bits."""
    found = {}
    for file in sorted((first / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")):
        a, b = load_file(file), load_file(second / "checkpoints" / file.parent.name / file.name)
        found[file.stem] = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return found


def resume() -> dict:
    """A copy that lost its last checkpoint goes on from the one before; the same run twice shows that equal can be had."""
    plain, again = succeeded("plain"), succeeded("again")
    resumed = plain.with_name("resumed")
    shutil.copytree(plain, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step-{STEPS:08d}")
    (resumed / "eval.jsonl").unlink(missing_ok=True)
    done = finished(start(["train", "--resume", str(resumed)], {}))
    if done.returncode:
        print(done.stdout)
        raise RuntimeError(f"resume exited with {done.returncode}: {' | '.join(done.stdout.splitlines()[-3:])}")
    twice, after = equal(plain, again, STEPS), equal(plain, resumed, STEPS)
    return {"same_run_twice": twice, "resumed": after, "ok": all(after.values())}


def same_losses(name: str, tolerance: float = 1e-5) -> dict:
    """The losses of a run under another engine, against the plain one's."""
    found, expected = losses(succeeded(name)), losses(succeeded("plain"))
    error = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    return {"loss_error": error, "ok": error <= tolerance}


def zero(stage: str) -> dict:
    if stage not in runs():
        return {"not_run": "deepspeed is not installed here"}
    return same_losses(stage)


def collectives() -> dict:
    """Those that vlp.distributed calls, with every type that it sends, on NCCL (gloo on a CPU)."""
    import torch.distributed as dist

    backend = "nccl" if DEVICE == "cuda" else "gloo"
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group(backend, init_method=address, rank=0, world_size=1)
    try:
        wrong = []
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8):
            x = torch.arange(6, device=DEVICE).to(dtype)
            parts = [torch.empty_like(x)]
            dist.all_gather(parts, x)
            total = x.clone()
            dist.all_reduce(total)
            dist.broadcast(total, src=0)
            wrong += [str(dtype)] * (not (torch.equal(parts[0], x) and torch.equal(total, x)))
        objects: list = [None]
        dist.all_gather_object(objects, {"key": "value"})
        dist.barrier()
        return {"backend": backend, "wrong": wrong, "ok": not wrong and objects == [{"key": "value"}]}
    finally:
        dist.destroy_process_group()
