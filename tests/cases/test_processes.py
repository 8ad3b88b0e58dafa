"""Evaluations that are killed leave no process, do not keep images in memory, and survive a damaged training image."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cases.inputs import write_shard
from tests.conftest import ROOT, environment
from vlp.config import Data
from vlp.data.augment import Resize
from vlp.data.preprocess import Preprocess
from vlp.data.reading.index import ShardIndex
from vlp.data.reading.shards import ShardReader, Source
from vlp.data.stream import EvalDataset, evaluation_batches
from vlp.tasks.contamination import contaminated_images
from vlp.tasks.retrieval import Retrieval

KILLED = """
import sys, time
from vlp.data.augment import Resize
from vlp.data.preprocess import Preprocess
from vlp.data.stream import EvalDataset, evaluation_batches
dataset = EvalDataset(sys.argv[1], Resize(), Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3, "bicubic"), 10_000)
for batch in evaluation_batches(dataset, 1, 2):
    print("begun", flush=True)
    time.sleep(1000)
"""


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(p) for p in found.split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_loader_workers_end_with_a_killed_evaluation(tmp_path):
    """Otherwise they hold the pipe of the terminal, whose reader waits for ever."""
    write_shard(tmp_path / "0.tar", range(40))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"begun\n"
    workers = children(process.pid)
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, "workers of a killed evaluation live on"
        time.sleep(0.05)
    assert process.stdout.read() == b""  # nobody holds its other end


def test_evaluation_keeps_no_encoded_image(tmp_path):
    write_shard(tmp_path / "0.tar", range(5))
    dataset = EvalDataset(str(tmp_path), Resize(), Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3, "bicubic"), 10_000)
    samples = [raw for batch, _ in evaluation_batches(dataset, 2, 0) for _, raw in batch]
    assert len(samples) == 5 and all(raw.image is None and raw.captions for raw in samples)


def test_damaged_training_image_does_not_end_an_evaluation(tmp_path):
    """The contamination check compares images to evaluate with those trained on, which may have been damaged since."""
    train, val = tmp_path / "train", tmp_path / "val"
    shard = write_shard(train / "0.tar", range(5))
    write_shard(val / "0.tar", range(3, 8))
    data, task = Data(train=(Source(str(train)),), val=str(val)), Retrieval(data=str(val))
    assert contaminated_images(task, data, allow=True) == 2
    offset, size, _ = ShardIndex.scan(shard).members[4]["jpg"]
    ShardReader(str(train)).index(0)  # indexed before the damage
    content = bytearray(shard.read_bytes())
    content[offset + size // 2] ^= 1
    shard.write_bytes(content)
    assert contaminated_images(task, data, allow=True) == 1


def test_reading_a_large_file_of_texts_takes_little_memory(tmp_path):
    """The bounds of the lines are in memory, not the texts."""
    with open(tmp_path / "t.txt", "wb") as file:
        for _ in range(30):
            file.write((b"x" * 9_999 + b"\n") * 500)  # 150 MB
    code = "import resource, sys; from vlp.data.reading.sentences import Sentences; r = Sentences(sys.argv[1]).open(); "
    code += "r.read(0, 14_999); print(len(r), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "t.txt")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    rows, peak = map(int, done.stdout.split())
    bare = subprocess.run(
        [
            sys.executable,
            "-c",
            code.partition("r = ")[0] + "print(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)",
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert rows == 15_000 and peak - int(bare.stdout.split()[1]) < 100  # MiB
