"""``vlp doctor``: check packages, devices, communication, disk, data and engines of this machine before a long run."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlp.errors import BadSample, UserError
from vlp.files import local_path

GIB = 1 << 30
FREE_DISK, FREE_SHARED_MEMORY = 10 * GIB, 1 * GIB
OPTIONAL = ("deepspeed", "tensorboard", "wandb", "gradio", "pycocoevalcap", "sentencepiece")
READ_SAMPLES, READ_SECONDS = 500, 5.0  # at most, in the test of the data's speed
CONNECT_SECONDS, STEP_SECONDS = 60, 300  # limits of two checks
LAUNCH = Path(__file__).parents[2] / "launch"  # of a checkout


@dataclass(frozen=True)
class Check:
    """Result of a check.

    Args:
        name: Subject of the check.
        found: Measured values, or the error.
        advice: Remedy of a failed check. An empty string means that the check passed.
    """

    name: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{'FAILED' if self.advice else 'ok':<6}  {self.name}: {self.found}" + (
            f"\n        {self.advice}" if self.advice else ""
        )


def add_parser(commands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check packages, devices, communication, disk, data and engines",
        epilog="example: vlp doctor --data shards/train",
    )
    doctor.add_argument("--data", metavar="SHARDS", help="shards whose reading speed is measured")
    doctor.add_argument("--folder", default="runs", metavar="DIR", help="folder of the runs (default: %(default)s)")
    doctor.add_argument("--no-engines", action="store_true", help="leave out the training step on each engine")
    doctor.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print a line for each check. Return 0 if all passed, 1 if not."""
    failed = 0
    for check in checks(options):
        print(check, flush=True)
        failed += bool(check.advice)
    print(f"{failed} of the checks failed" if failed else "all checks passed")
    return 1 if failed else 0


def checks(options: argparse.Namespace) -> Iterator[Check]:
    yield packages()
    yield devices()
    yield free_space("disk", existing_parent(local_path(options.folder)), FREE_DISK, "checkpoints need several GB")
    if Path("/dev/shm").is_dir():
        yield free_space("shared memory", Path("/dev/shm"), FREE_SHARED_MEMORY, "in a container, raise --shm-size")
    yield from communication()
    if options.data:
        yield reading(options.data)
    if not options.no_engines:
        yield from engines()


def packages() -> Check:
    """Compare the installed packages with the requirements of vlp."""
    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires("vlp") or []
    except importlib.metadata.PackageNotFoundError:
        return Check("packages", "vlp is not installed", "pip install -e . in the checkout")
    found, wrong = [f"python {sys.version.split()[0]}"], []
    for requirement in map(Requirement, required):
        optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        if optional and requirement.name not in OPTIONAL:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if not optional:
                wrong.append(str(requirement))
            continue
        found.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(str(requirement))
    advice = "pip install " + " ".join(f"'{name}'" for name in wrong) if wrong else ""
    return Check("packages", ", ".join(dict.fromkeys(found)), advice)


def devices() -> Check:
    """Name the processors, their memory, and the GPUs that torch can use."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has none
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    found = f"{cores} CPU cores, {torch.get_num_threads()} threads of torch, {memory:.0f} GiB of memory"
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        found += f"; GPU {number}: {gpu.name}, {gpu.total_memory / GIB:.0f} GiB, {bf16}"
    if torch.cuda.device_count() == 0 and shutil.which("nvidia-smi"):
        advice = f"torch {torch.__version__} sees no GPU; install the build of torch that fits the driver of nvidia-smi"
        return Check("devices", found, advice)
    return Check("devices", found)


def existing_parent(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def free_space(name: str, folder: Path, least: int, reason: str) -> Check:
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    if not os.access(folder, os.W_OK):
        return Check(name, found, f"{folder} cannot be written; check its permissions")
    return Check(name, found, f"less than {least / GIB:.0f} GiB: {reason}" if free < least else "")


def communication() -> Iterator[Check]:
    """Sum a tensor over two processes by gloo, and over all GPUs by NCCL."""
    import torch

    groups = {"gloo": 2} | ({"nccl": torch.cuda.device_count()} if torch.cuda.is_available() else {})
    for backend, processes in groups.items():
        began = time.monotonic()
        error = connect(backend, processes)
        found = error or f"{processes} processes connected and summed in {time.monotonic() - began:.1f} s"
        interface = (
            "GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME (and NCCL_DEBUG=INFO for the cause)"
        )
        yield Check(backend, found, f"set {interface} to the network interface of this machine" if error else "")


def connect(backend: str, processes: int) -> str:
    """Start processes that sum their ranks; return the error, or "" if the sums are right."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"from vlp.commands.doctor import sum_ranks; sum_ranks({backend!r}, {folder!r}, {processes}, RANK)"
        started = [start([sys.executable, "-c", code.replace("RANK", str(rank))]) for rank in range(processes)]
        return next(filter(None, [outcome(process, CONNECT_SECONDS) for process in started]), "")


def sum_ranks(backend: str, folder: str, processes: int, rank: int) -> None:
    """Process of `connect`."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    total = torch.tensor([float(rank)], device=device)
    dist.all_reduce(total)
    dist.destroy_process_group()
    assert total.item() == sum(range(processes)), f"the sum of the ranks is {total.item()}"


def start(command: list[str]) -> subprocess.Popen:
    """Start a process in the checkout, which the launch files' paths are relative to, with this vlp on its path."""
    checkout = Path(__file__).parents[2]
    paths = [str(checkout), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        command,
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def outcome(process: subprocess.Popen, seconds: float) -> str:
    """Wait for a process; return the last line of its errors, or "" if it succeeded."""
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a launcher and the processes that it started
        process.communicate()
        return f"no answer within {seconds:.0f} s"
    if process.returncode == 0:
        return ""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("vlp: ")]
    return (own or lines or [f"exit code {process.returncode}"])[-1][:300]


def reading(location: str) -> Check:
    """Measure how fast samples are read from shards, without decoding."""
    from vlp.data.reading.shards import ShardReader

    try:
        reader = ShardReader(location)
        if len(reader) == 0:
            return Check("data", f"{location} has no sample", "run `vlp data check` on it")
        began, samples, size = time.monotonic(), 0, 0
        for row in range(0, len(reader), max(1, len(reader) // READ_SAMPLES)):
            size += len(reader.read(*reader.locate(row)).image)
            samples += 1
            if time.monotonic() - began > READ_SECONDS:
                break
    except UserError as e:
        return Check("data", str(e), "run `vlp data check` on it")
    except BadSample as e:
        return Check("data", f"a sample of {location} is damaged: {e}", "run `vlp data check` on it")
    seconds = time.monotonic() - began
    rate = f"{samples / seconds:,.0f} samples/s, {size / seconds / 1e6:,.0f} MB/s by one process"
    return Check("data", f"{len(reader):,} samples in {len(reader.shards)} shards; {rate}")


def engines() -> Iterator[Check]:
    """Train a tiny model for one step on each engine that launch/ has a file for."""
    import torch

    gpus = torch.cuda.device_count()
    files = sorted(LAUNCH.glob("*gpu8.yaml" if gpus else "*cpu2.yaml"))
    if not files:
        yield Check("engines", f"not tried: {LAUNCH} is not there (launch files come with a checkout of vlp)")
        return
    with tempfile.TemporaryDirectory() as folder:
        config = write_experiment(Path(folder))
        for file in files:
            engine = file.stem
            if "zero" in engine and importlib.util.find_spec("deepspeed") is None:
                yield Check(
                    f"one step, {engine}", "not tried: deepspeed is not installed (pip install 'vlp[deepspeed]')"
                )
                continue
            command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
            command += ["--num_processes", str(gpus)] if gpus else []
            command += ["-m", "vlp.train", str(config), f"name={engine}"]
            began = time.monotonic()
            error = outcome(start(command), STEP_SECONDS)
            found = error or f"{time.monotonic() - began:.0f} s with the start of the processes"
            advice = f"run it to see all messages: accelerate launch --config_file {file} -m vlp.train CONFIG"
            yield Check(f"one step, {engine}", found, advice if error else "")


def write_experiment(folder: Path) -> Path:
    """Write shards of random images, and an experiment of one step with a tiny ViT; return its path."""
    import numpy as np
    from PIL import Image

    from vlp.config import Data, Experiment, Training
    from vlp.data.augment import RandomResizedCrop
    from vlp.data.preparing.formats import Pair
    from vlp.data.preparing.pack import pack
    from vlp.data.reading.shards import Source
    from vlp.encoders.image import TimmImage
    from vlp.models.single import Single
    from vlp.objectives.simclr import SimClr
    from vlp.specs.json import dump

    draw = np.random.default_rng(0)
    pairs = []
    for number in range(16):
        path = folder / f"{number}.png"
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        pairs.append(Pair(str(path), ("random colours",), key=str(number)))
    pack(pairs, folder / "shards")
    view = RandomResizedCrop()
    experiment = Experiment(
        name="doctor",
        model=Single(image=TimmImage("test_vit", image_size=32), head="mlp", embed_size=16),
        objectives={"simclr": SimClr()},
        data=Data(train=(Source(str(folder / "shards")),), batch_size=16, augment=view, views=(view,), workers=0),
        train=Training(steps=1),
        output=str(folder / "runs"),
    )
    path = folder / "experiment.json"
    path.write_text(dump(experiment.resolved()))
    return path
