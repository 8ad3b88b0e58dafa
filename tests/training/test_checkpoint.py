"""A checkpoint is complete or absent, damage is detected before anything is loaded, and loading never executes code."""

import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import time
import warnings
import weakref
from pathlib import Path
from typing import ClassVar

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from tests.conftest import TOY, toy_overrides
from tests.processes import command_line, kill_at_call, losses, resume, run, train
from vlp.errors import UserError
from vlp.files import file_hash
from vlp.optim.groups import parameter_groups
from vlp.optim.optimizers import AdamW, Lamb
from vlp.training import checkpoint, optimizer_state
from vlp.weights import checkpoints

FILES = ("model.safetensors", "optimizer.safetensors", "average.safetensors", "state.json")


def write(folder: Path, step: int, size: int = 500) -> Path:
    torch.manual_seed(step)
    files = {n.partition(".")[0]: {"w": torch.randn(size), "b": torch.randn(3)} for n in FILES if "safe" in n}
    return checkpoint.save(folder, step, files, {"step": step, "position": 8 * step})


@pytest.fixture
def two(tmp_path) -> Path:
    """Return a folder with the checkpoints of steps 3 and 6."""
    for step in (3, 6):
        write(tmp_path, step)
    return tmp_path


def mutations() -> list[tuple[str, str, float]]:
    names = (*FILES, "manifest.json")
    damages = [(what, name, part / 10) for what in ("truncate", "flip") for name in names for part in range(10)]
    rng = random.Random(0)
    damages += [("flip", rng.choice(FILES), rng.random()) for _ in range(20)]
    return damages + [("remove", name, 0.0) for name in names]


def mutate(folder: Path, what: str, name: str, where: float) -> None:
    path = folder / name
    if what == "remove":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    offset = min(int(where * len(data)), len(data) - 1)
    if what == "flip":
        data[offset] ^= 1 << (offset % 8)
    path.write_bytes(data[:offset] if what == "truncate" else data)


def test_damaged_newest_checkpoint_is_passed_over_with_a_warning(two):
    assert len(mutations()) > 100
    for what, name, where in mutations():
        shutil.rmtree(two / "step-00000006")
        newest = write(two, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert checkpoints.newest_whole(two) == newest
        mutate(newest, what, name, where)
        in_manifest = name == "manifest.json" and what == "flip"
        if in_manifest and checkpoints.damage(newest) is None:
            # a flipped bit outside of the hashes, such as in white space or the step: every loaded byte is still checked
            assert set(json.loads((newest / name).read_text())["sha256"]) == set(FILES)
            continue
        with pytest.warns(UserWarning, match="damaged checkpoint .*step-00000006: .*taking step-00000003"):
            assert checkpoints.newest_whole(two) == two / "step-00000003", (what, name, where)


def test_only_damaged_checkpoints_are_an_error_and_no_checkpoint_is_not(two, tmp_path_factory):
    for step in (3, 6):
        mutate(two / f"step-{step:08d}", "flip", "model.safetensors", 0.5)
    with pytest.raises(UserError, match="every checkpoint .* is damaged") as error:
        checkpoints.newest_whole(two)
    assert "\n" not in str(error.value)
    assert checkpoints.newest_whole(tmp_path_factory.mktemp("empty")) is None


def test_checkpoint_with_a_file_outside_the_manifest_is_passed_over(two):
    newest = two / "step-00000006"
    hashes = json.loads((newest / "manifest.json").read_text())
    del hashes["sha256"]["optimizer.safetensors"]
    (newest / "manifest.json").write_text(json.dumps(hashes))
    with pytest.warns(UserWarning, match="optimizer.safetensors"):
        assert checkpoints.newest_whole(two) == two / "step-00000003"


class Payload:
    def __reduce__(self):
        return os.mkdir, (str(Path("executed").absolute()),)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["FIFO", "device", "folder"])
def test_file_that_is_not_regular_is_damage_at_once(two, name, kind):
    """Reading a FIFO would wait for ever, and /dev/zero never ends."""
    path = two / "step-00000006" / name
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    began = time.monotonic()
    with pytest.warns(UserWarning, match=rf"damaged checkpoint .*step-00000006: {name} is not"):
        assert checkpoints.newest_whole(two) == two / "step-00000003"
    assert time.monotonic() - began < 5


def test_endless_manifest_is_damage(two):
    with open(two / "step-00000006" / "manifest.json", "ab") as file:
        file.truncate(1 << 40)  # a sparse file of a terabyte
    assert checkpoints.damage(two / "step-00000006") == "manifest.json is not readable"


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"step": 6}', '{"step": "6", "value": 1}', '{"step": 6, "value": null}']
)
def test_odd_best_json_marks_no_checkpoint(two, text):
    (two / "best.json").write_text(text)
    assert checkpoints.best(two) is None and checkpoints.best_path(two) is None


def test_loading_never_unpickles(two, tmp_path, monkeypatch):
    """Each file is replaced by a pickle whose hash is in the manifest."""
    monkeypatch.chdir(tmp_path)
    path = two / "step-00000006"
    for name in FILES:
        (path / name).write_bytes(pickle.dumps(Payload()))
    hashes = {name: file_hash(path / name) for name in FILES}
    (path / "manifest.json").write_text(json.dumps({"step": 6, "sha256": hashes}))
    assert checkpoints.newest_whole(two) == path
    for name in ("model", "optimizer", "average"):
        with pytest.raises((UserError, SafetensorError)):
            checkpoints.read(path, name)
    with pytest.raises((UserError, ValueError)):
        checkpoints.read_state(path)
    assert not (tmp_path / "executed").exists()


def save_killed_at(folder: Path, count: int) -> None:
    """Save step 9, and kill the process at the ``count``-th of the calls that change files."""
    kill_at_call(count, (checkpoint, "save_file"))
    write(folder, 9)
    checkpoint.prune(folder, 2, 9)


def test_process_killed_anywhere_in_a_save_leaves_only_complete_checkpoints(two):
    count, killed = 0, True
    while killed:
        count += 1
        if not (child := os.fork()):
            save_killed_at(two, count)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert checkpoints.newest_whole(two) in (two / "step-00000006", two / "step-00000009")
        if checkpoints.newest_whole(two).name == "step-00000009" and killed:
            assert checkpoints.damage(two / "step-00000006") is None  # it is only pruned when the new one is complete
            shutil.rmtree(two / "step-00000009")
            shutil.rmtree(two / "step-00000003", ignore_errors=True)
            write(two, 3)
    assert count > 10
    assert [p.name for p in sorted(two.iterdir())] == ["step-00000006", "step-00000009"]


def test_written_file_has_the_bytes_of_safetensors(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "layers.10.weight": torch.randn(3, 4, generator=generator),
        "layers.9.weight": torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "count": torch.arange(5),
        "mask": torch.tensor([True, False, True]),
    }
    checkpoint.save_file(tensors, tmp_path / "own.safetensors")
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "reference.safetensors")
    assert (tmp_path / "own.safetensors").read_bytes() == (tmp_path / "reference.safetensors").read_bytes()


class ShardedRows:
    """A tensor that is whole only while somebody holds the result of `full_tensor`."""

    shape, dtype = torch.Size([4, 3]), torch.float32
    alive: ClassVar[list] = []
    most_alive = 0

    def __init__(self, value: float):
        self.value = value

    def full_tensor(self) -> torch.Tensor:
        whole = torch.full(self.shape, self.value)
        self.alive.append(weakref.ref(whole))
        ShardedRows.most_alive = max(self.most_alive, sum(each() is not None for each in self.alive))
        return whole


def test_sharded_tensors_are_gathered_one_after_the_other(tmp_path):
    """Once the next tensor is gathered, only the one before may still be in memory."""
    sharded = {f"layer.{n}": ShardedRows(float(n)) for n in range(6)}
    saved = checkpoint.save(tmp_path, 1, {"model": sharded}, {"step": 1})
    found = checkpoints.read(saved, "model")
    assert all(torch.equal(found[name], torch.full((4, 3), each.value)) for name, each in sharded.items())
    checkpoint.gather({"model": sharded})
    assert len(ShardedRows.alive) == 12 and ShardedRows.most_alive <= 2


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), OSError(errno.EDQUOT, "Quota exceeded")])
def test_full_disk_leaves_earlier_checkpoints_and_no_other_file(two, monkeypatch, error):
    def save_file(tensors, path):
        Path(path).write_bytes(b"half")
        if "optimizer" in str(path):
            raise error

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(UserError, match="cannot save .*step-00000009.*free some space"):
        write(two, 9)
    assert [p.name for p in sorted(two.iterdir())] == ["step-00000003", "step-00000006"]
    assert checkpoints.newest_whole(two) == two / "step-00000006"


def has_little_room(arguments: list[str]) -> int:
    """Run with a limit of 200 kB per file, which is smaller than a checkpoint and larger than a log."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    return command_line(arguments)


def test_run_without_disk_space_for_its_checkpoint_ends_with_one_line_and_resumes_later(world, tmp_path):
    train(*toy_overrides(world, tmp_path), "name=whole")
    arguments = [*toy_overrides(world, tmp_path), "name=full"]
    done = run("train", TOY, *arguments, function=has_little_room)
    assert done.codes == [2]
    assert "Traceback" not in done.errors[0]
    assert [line for line in done.errors[0].splitlines() if line.startswith("vlp: ")][0].startswith("vlp: cannot save")
    assert list((tmp_path / "full" / "checkpoints").iterdir()) == []
    resume(tmp_path / "full")
    assert losses(tmp_path / "full") == losses(tmp_path / "whole")


def test_checkpoint_without_a_file_of_the_experiment_is_refused(two):
    with pytest.raises(UserError, match="has no other.safetensors, so it is of another experiment"):
        checkpoints.read(max(two.glob("step-*")), "other")


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        write(tmp_path, step)
        checkpoint.prune(tmp_path, 2, step)
        if step == 2:
            checkpoint.mark_best(tmp_path, 2, "retrieval/mean_recall", 0.5)
    assert [p.name for p in checkpoints.all_steps(tmp_path)] == ["step-00000006", "step-00000005", "step-00000002"]
    assert checkpoints.best_path(tmp_path) == tmp_path / "step-00000002"


def test_pruning_does_not_count_a_damaged_checkpoint_of_a_later_step(two):
    """The run was resumed from step 3 and stopped at step 4. Step 6 is damaged."""
    mutate(two / "step-00000006", "flip", "model.safetensors", 0.5)
    write(two, 4)
    checkpoint.prune(two, 1, 4)
    assert checkpoints.newest_whole(two) == two / "step-00000004"


def test_run_with_a_damaged_newest_checkpoint_ends_with_the_same_weights(world, tmp_path):
    train(*toy_overrides(world, tmp_path), "name=whole")
    folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / "damaged"))
    mutate(folder / "checkpoints" / "step-00000012", "flip", "optimizer.safetensors", 0.7)
    done = resume(folder)
    assert "step-00000012: optimizer.safetensors was altered" in done.errors[0]
    assert "resumed at step 9 from step-00000009" in done.errors[0]
    assert losses(folder) == losses(tmp_path / "whole")
    same = [checkpoints.read(f / "checkpoints" / "step-00000012", "model") for f in (folder, tmp_path / "whole")]
    assert all(torch.equal(same[0][k], same[1][k]) for k in same[1])


def test_run_with_only_damaged_checkpoints_does_not_restart(world, tmp_path):
    train(*toy_overrides(world, tmp_path), "name=toy")
    for path in checkpoints.all_steps(tmp_path / "toy" / "checkpoints"):
        (path / "manifest.json").unlink()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "toy").rglob("*")}
    done = run("train", "--resume", tmp_path / "toy")
    assert done.codes == [2]
    assert done.errors[0].startswith("vlp: every checkpoint in ") and done.errors[0].count("\n") == 1
    assert "Warning" not in done.errors[0]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "toy").rglob("*")} == before


@pytest.mark.parametrize(
    "other, message",
    [
        (nn.Linear(4, 2, bias=False), "has unknown 1 tensors, e.g. bias"),
        (nn.Linear(5, 2), "another shape of 1 tensors, e.g. weight"),
        (nn.Sequential(nn.Linear(4, 2)), "lacks 2 tensors, e.g. 0.bias"),
    ],
)
def test_checkpoint_of_another_model_is_refused_without_a_change(other, message):
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(UserError, match=message):
        checkpoints.load_model(other, nn.Linear(4, 2).state_dict(), Path("step-00000003"))
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


class Sequential(nn.Sequential):
    def no_weight_decay(self):
        return set()


@pytest.mark.parametrize("settings", [AdamW(), Lamb()])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_optimizer_continues_bitwise_from_its_saved_tensors(settings, layout):
    """In any memory layout: a fused optimizer pairs weights and averages by their position in memory."""

    def build():
        torch.manual_seed(0)
        model = Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(memory_format=layout)
        return model, settings.build(parameter_groups(model, 0.1))

    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(2, 3, 4, 4)).square().sum().backward()
        optimizer.step()

    whole, optimizer = build()
    for n in range(4):
        step(whole, optimizer, n)
        if n == 1:
            kept = {k: v.detach().clone().contiguous() for k, v in whole.state_dict().items()}
            state = optimizer_state.tensors(whole, optimizer)
            state = {k: v.clone().contiguous() for k, v in state.items()}
    again, optimizer = build()
    checkpoints.load_model(again, kept, Path())
    optimizer_state.load(again, optimizer, state)
    for n in (2, 3):
        step(again, optimizer, n)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
