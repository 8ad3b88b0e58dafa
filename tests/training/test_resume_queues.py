"""Queues, memory banks and momentum encoders of a resumed run equal those of a run without interruption."""

from pathlib import Path

import pytest
import torch

from tests.conftest import TOY
from tests.processes import losses, records, resume, run, samples, tensors
from vlp.weights.checkpoints import all_steps

FILES = {"moco": ("model", "optimizer", "momentum", "memory"), "instance": ("model", "optimizer", "memory")}
ENGINES = {"single": {"world": 1}, "ddp": {"world": 2}, "zero2": {"world": 2, "engine": "zero2"}}
ENGINES |= {engine: {"world": 2, "engine": engine} for engine in ("zero3", "fsdp2")}
SLOW = [pytest.param(engine, marks=pytest.mark.slow) for engine in ("zero2", "zero3", "fsdp2")]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def trained(data: Path, output: Path, method: str, name: str, *overrides: str, **how) -> Path:
    toy = TOY.with_name(f"toy_{method}.py")
    arguments = (f"data.train={data / 'shards'}", f"output={output}", f"name={name}", *overrides)
    done = run("train", toy, *arguments, **how)
    assert not any(done.codes), "\n".join(done.errors)
    return output / name


@pytest.mark.parametrize("engine", ["single", "ddp", *SLOW])
@pytest.mark.parametrize("method", FILES)
def test_three_steps_and_three_resumed_steps_equal_six_bitwise(world, output, method, engine):
    how = ENGINES[engine]
    whole = trained(world, output, method, f"{method}-{engine}", **how)
    folder = trained(world, output, method, f"{method}-{engine}-again", **how)
    assert len(losses(whole)) == 6
    assert all_steps(folder / "checkpoints")[0].name == "step-00000006"
    # as after a kill behind the third step
    for path in (folder / "checkpoints" / "step-00000006").iterdir():
        path.unlink()
    (folder / "checkpoints" / "step-00000006").rmdir()
    resume(folder, **how)
    assert losses(folder) == losses(whole) and samples(folder) == samples(whole)
    assert [r["gradient_norm"] for r in records(folder)] == [r["gradient_norm"] for r in records(whole)]
    for name in FILES[method]:
        expected, found = tensors(whole, name), tensors(folder, name)
        assert expected.keys() == found.keys()
        assert [k for k in expected if not torch.equal(expected[k], found[k])] == []
    if "zero" not in engine:
        assert any(k.startswith("momentum_buffer/") for k in tensors(folder, "optimizer"))


def test_queue_has_the_newest_keys_and_the_momentum_encoder_is_an_average(world, output):
    folder = trained(world, output, "moco", "moco-queue", "save.every=1", "save.keep=10")
    for step in range(1, 7):
        memory = tensors(folder, "memory", step)
        pointer, filled = memory["moco/counters"].tolist()
        assert (pointer, filled) == (8 * step % 21, min(21, 8 * step))
        torch.testing.assert_close(memory["moco/column.key"][:filled].norm(dim=1), torch.ones(filled))
    for step in range(2, 7):
        before, now = tensors(folder, "momentum", step - 1), tensors(folder, "momentum", step)
        weights = tensors(folder, "model", step)
        name = "head.0.weight"
        torch.testing.assert_close(now[name], 0.9 * before[name] + 0.1 * weights[name], rtol=1e-5, atol=1e-7)


def test_bank_changes_only_at_rows_of_the_batch_and_partition_is_reestimated(world, output):
    folder = trained(world, output, "instance", "instance-bank", "save.every=1", "save.keep=10")
    seen, partitions = set(), []
    before = tensors(folder, "memory", 1)["instance/rows"]
    for step, batch in enumerate(samples(folder), 1):
        memory = tensors(folder, "memory", step)
        partitions.append(memory["instance/partition"].item())
        rows = {int(key.split("/")[1]) for key in batch}
        if step > 1:
            moved = (memory["instance/rows"] != before).any(1).nonzero().flatten().tolist()
            assert set(moved) == rows and not seen & rows
        seen, before = seen | rows, memory["instance/rows"]
    assert partitions[0] == partitions[3] != partitions[4] == partitions[5]


def test_skipped_step_does_not_change_queue_and_momentum_encoder(world, output):
    third = samples(trained(world, output, "moco", "moco-fine"))[2]
    overrides = ("save.every=1", "save.keep=10", "train.nonfinite=skip", f"objectives.gradient.key={third[5]}")
    folder = trained(world, output, "moco_faults", "moco-skip", *overrides)
    assert [r["step"] for r in records(folder) if r["gradient_norm"] is None] == [3]
    for name in ("memory", "momentum"):
        before, after, later = (tensors(folder, name, step) for step in (2, 3, 4))
        learned = [k for k in before if "running" not in k and "num_batches" not in k]
        assert all(torch.equal(before[k], after[k]) for k in learned)
        assert not all(torch.equal(after[k], later[k]) for k in learned)
