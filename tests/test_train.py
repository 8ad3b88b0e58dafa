"""The training loop: the changes and the log of a step, and its handling of losses that are not finite."""

import json
import math
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import torch

from tests.conftest import TOY, toy_overrides
from tests.processes import command_line, losses, records, resume, run, samples, tensors, train
from vlp.optim.schedule import Schedule
from vlp.specs.origin import commit
from vlp.weights.checkpoints import all_steps, read_state

FAULTY = TOY.with_name("toy_faults.py")
ALL_CHECKPOINTS = ("save.every=1", "save.keep=100")
ENGINES = {"single": {"world": 1}, "ddp": {"world": 2}, "zero2": {"world": 2, "engine": "zero2"}}
ENGINES |= {engine: {"world": 2, "engine": engine} for engine in ("zero3", "fsdp2")}
SLOW = [pytest.param(engine, marks=pytest.mark.slow) for engine in ("zero2", "zero3", "fsdp2")]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def plain(world, output) -> Path:
    """A run of 12 steps in one process, with an average and every checkpoint."""
    train(*toy_overrides(world, output), *ALL_CHECKPOINTS, "train.ema_decay=0.8", "log.tensorboard=true", "name=plain")
    return output / "plain"


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_log_has_every_number_of_every_step(plain):
    lines = records(plain)
    assert len(lines) == 12
    for line in lines:
        assert {"loss", "loss/itc", "temperature", "gradient_norm", "epoch", "seconds", "memory_mib"} <= line.keys()
        assert line["loss"] == line["loss/itc"] and math.isfinite(line["gradient_norm"])
        assert line["lr"] == pytest.approx(1e-3 * Schedule(warmup_steps=2).factor(line["step"] - 1, 12))
        assert line["samples_per_second"] == pytest.approx(8 / line["seconds"]) and 0 <= line["data_wait"] <= 1
        assert line["epoch"] == line["step"] * 8 / 50
        assert ("geometry/alignment" in line) == (line["step"] % 2 == 0)
    assert {"geometry/uniformity_image", "geometry/uniformity_text", "geometry/modality_gap"} <= lines[1].keys()
    assert list((plain / "tensorboard").glob("events.*"))
    (start,) = map(json.loads, (plain / "starts.jsonl").read_text().splitlines())
    assert start["processes"] == start["threads"] == 1 and start["engine"] == "single" and start["step"] == 0
    result = json.loads((plain / "eval" / "retrieval.json").read_text())
    for record in (start, result):
        assert record["command"] and record["commit"] == commit()


def test_logged_temperature_is_that_of_the_model(plain):
    for line in records(plain):
        assert line["temperature"] == pytest.approx(tensors(plain, "model", line["step"])["temperature"].item())


def test_average_equals_the_recurrence_over_the_weights_after_every_step(plain):
    expected = None
    for step in range(1, 13):
        weights = {k: v.double() for k, v in tensors(plain, "model", step).items()}
        average = tensors(plain, "average", step)
        if expected is not None:
            expected = {k: 0.8 * expected[k] + 0.2 * weights[k] for k in weights}
            for k in expected:
                torch.testing.assert_close(average[k].double(), expected[k], rtol=1e-5, atol=1e-7)
        expected = {k: v.double() for k, v in average.items()}


def test_averaged_weights_are_evaluated(plain):
    from vlp.files import file_hash

    result = json.loads((plain / "eval" / "retrieval.json").read_text())
    assert result["checkpoint_sha256"] == file_hash(plain / "checkpoints" / "step-00000012" / "average.safetensors")
    assert result["step"] == 12 and result["n"] == {"images": 50, "captions": 100} and result["protocol"]


def test_only_trainable_parameters_change(world, output):
    arguments = (
        *toy_overrides(world, output),
        *ALL_CHECKPOINTS,
        "train.frozen=text.,image_projection",
        "train.random_frozen=true",
        "train.steps=3",
    )
    train(*arguments, "name=frozen")
    first, last = (tensors(output / "frozen", "model", step) for step in (1, 3))
    for name in first:
        frozen = name.startswith(("text.", "image_projection"))
        assert torch.equal(first[name], last[name]) == frozen or "attention.self.key.bias" in name, name
    optimizer = tensors(output / "frozen", "optimizer")
    assert not any("/text." in name for name in optimizer) and any("/image." in name for name in optimizer)


def test_activation_checkpointing_does_not_change_the_losses(world, output, plain):
    train(*toy_overrides(world, output), "train.activation_checkpointing=full", "name=recomputed")
    assert losses(output / "recomputed") == pytest.approx(losses(plain), abs=1e-6)


def test_average_does_not_change_the_weights(world, output, plain):
    train(*toy_overrides(world, output), "name=no-average")
    assert losses(output / "no-average") == losses(plain)
    assert same(tensors(output / "no-average", "model"), tensors(plain, "model"))


def test_run_is_a_function_of_its_seed(world, output, plain):
    for name, seed in (("seed-1", 1), ("seed-1-again", 1)):
        train(*toy_overrides(world, output), f"seed={seed}", f"name={name}", "train.steps=3")
    assert losses(output / "seed-1") == losses(output / "seed-1-again") != losses(plain)[:3]
    assert samples(output / "seed-1") == samples(output / "seed-1-again") != samples(plain)[:3]


def steps_with(folder: Path, key: str) -> list[int]:
    return [n for n, batch in enumerate(samples(folder), 1) if key in batch]


@pytest.mark.parametrize("engine", ["single", "ddp", *SLOW])
@pytest.mark.parametrize("fault", ["nan", "gradient"])
def test_nonfinite_step_stops_all_processes_and_names_its_samples(world, output, plain, engine, fault):
    key = samples(plain)[6][5]  # a sample of step 7, which the second of two processes reads
    before = steps_with(plain, key)[0]
    folder = output / f"stop-{engine}-{fault}"
    arguments = [*toy_overrides(world, output), f"objectives.{fault}.key={key}", f"name={folder.name}", "save.every=2"]
    done = run("train", FAULTY, *arguments, **ENGINES[engine])
    assert done.codes == [2] * len(done.codes), done.errors
    for error in done.errors:
        (message,) = [line for line in error.splitlines() if line.startswith("vlp: ")]
        assert message.startswith(f"vlp: step {before}: ") and "not finite" in message and "Traceback" not in error
    (report,) = map(json.loads, (folder / "nonfinite.jsonl").read_text().splitlines())
    assert report["step"] == before and sorted(report["samples"]) == sorted(samples(plain)[before - 1])
    newest = all_steps(folder / "checkpoints")[0]
    assert read_state(newest)["step"] == (before - 1) // 2 * 2
    assert all(t.isfinite().all() for t in tensors(folder, "model").values())
    assert len(losses(folder)) == before - 1


@pytest.mark.parametrize("engine", ["single", "ddp", *SLOW])
@pytest.mark.parametrize("fault", ["nan", "gradient"])
def test_skipped_step_is_counted_and_does_not_change_the_weights(world, output, plain, engine, fault):
    if "zero" in engine and fault == "gradient":
        pytest.skip("DeepSpeed has stepped when the gradient norm is known, so such a run always stops")
    key = samples(plain)[6][5]
    bad = steps_with(plain, key)
    assert 0 < len(bad) < 4
    folder = output / f"skip-{engine}-{fault}"
    arguments = (f"objectives.{fault}.key={key}", "train.nonfinite=skip", "train.ema_decay=0.8", f"name={folder.name}")
    done = run("train", FAULTY, *toy_overrides(world, output), *ALL_CHECKPOINTS, *arguments, **ENGINES[engine])
    assert not any(done.codes), done.errors
    assert [n for n, line in enumerate(records(folder), 1) if line["gradient_norm"] is None] == bad
    assert read_state(all_steps(folder / "checkpoints")[0])["skipped"] == len(bad)
    for step in range(2, 13):
        for name in ("model", "optimizer", "average"):
            unchanged = same(tensors(folder, name, step - 1), tensors(folder, name, step))
            assert unchanged == (step in bad), (step, name)
    # the samples of later batches do not depend on the skipped step
    assert samples(folder) == samples(plain)


@pytest.mark.parametrize("world_size", [1, 2])
def test_refusal_of_any_micro_batch_of_any_process_is_named(world, output, plain, world_size):
    """The last micro-batch of the main process is not the only one that a loss may refuse."""
    key = samples(plain)[0][world_size - 1]  # first micro-batch of the first or of the second process
    refusing = (f"objectives.refuses.key={key}", "train.accumulation=4", f"name=refusal-{world_size}")
    done = run("train", FAULTY, *toy_overrides(world, output), *refusing, world=world_size)
    (line,) = [line for line in done.errors[0].splitlines() if line.startswith("vlp: ")]
    assert line.startswith(f"vlp: step 1: row {key} is not finite; its 8 samples are in")


def test_diverged_training_ends_with_one_line(world, output):
    done = run("train", TOY, *toy_overrides(world, output), "optim.lr=1e18", "train.clip_norm=none", "name=diverged")
    assert done.codes == [2]
    assert done.errors[0].splitlines()[-1].startswith("vlp: step ")
    report = json.loads((output / "diverged" / "nonfinite.jsonl").read_text().splitlines()[0])
    assert len(report["samples"]) == 8


def crashes_in_evaluation(arguments: list[str]) -> int:
    from vlp.tasks import embeddings

    def encode_texts(*_):
        raise RuntimeError("a programming error")

    embeddings.encode_texts = encode_texts
    return command_line(arguments)


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_programming_error_ends_the_process_with_its_traceback(world, output, plain, where):
    """It ends at once: data workers that wait for more work do not delay it."""
    arguments = [*toy_overrides(world, output), f"name=crash-{where}", "data.workers=2"]
    if where == "step":
        done = run("train", FAULTY, *arguments, f"objectives.crash.key={samples(plain)[3][0]}")
    else:
        done = run("train", TOY, *arguments, "evaluate.retrieval.batch_size=4", function=crashes_in_evaluation)
    assert done.codes == [1] and "RuntimeError: a programming error" in done.errors[0]


def with_undecodable_images(world: Path, folder: Path, dead: set[str]) -> Path:
    """Return a copy of the shards in which the images of some samples cannot be decoded."""
    folder.mkdir()
    for path in sorted((world / "shards").glob("*.tar")):
        with tarfile.open(path) as old, tarfile.open(folder / path.name, "w") as new:
            for info in old:
                data = old.extractfile(info).read()
                stem, _, extension = info.name.partition(".")
                if stem in dead and extension != "json":
                    data = data[: len(data) // 2]
                info.size = len(data)
                new.addfile(info, BytesIO(data))
    return folder


def test_bad_samples_are_recorded_once_and_too_many_stop_the_run(world, output, tmp_path):
    dead = {"0007", "0031"}
    shards = with_undecodable_images(world, tmp_path / "shards", dead)
    arguments = [*toy_overrides(world, output), f"data.train={shards}", "train.steps=14"]
    done = run("train", TOY, *arguments, "name=too-bad")
    assert done.codes == [2]
    last = done.errors[0].splitlines()[-1]
    assert last.startswith("vlp: 1 samples are bad") and "data.max_bad_fraction=0.01 of 50" in last
    train(*arguments, "name=some-bad", "data.max_bad_fraction=0.04", world=2)
    folder = output / "some-bad"
    shutil.rmtree(folder / "checkpoints" / "step-00000014")
    resume(folder)
    found = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(b["key"] for b in found) == sorted(dead)
    assert all(b["shard"] and b["reason"] for b in found)
    assert not any(key.split("/")[-1] in dead for batch in samples(folder) for key in batch)


def test_checkpoint_with_the_best_metric_is_kept(world, output):
    folder = output / "best"
    train(*toy_overrides(world, output), "evaluate_every=2", "save.keep=1", "save.every=2", f"name={folder.name}")
    values = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    assert [v["step"] for v in values] == [2, 4, 6, 8, 10, 12]
    best = max(values, key=lambda v: v["retrieval/mean_recall"])
    kept = json.loads((folder / "checkpoints" / "best.json").read_text())
    assert kept == {"step": best["step"], "metric": "retrieval/mean_recall", "value": best["retrieval/mean_recall"]}
    assert {p.name for p in all_steps(folder / "checkpoints")} == {f"step-{s:08d}" for s in (best["step"], 12)}


def test_epochs_are_rounded_up_to_whole_steps(world, output):
    train(*toy_overrides(world, output), "train.steps=none", "train.epochs=1.5", "name=epochs")
    assert len(losses(output / "epochs")) == math.ceil(1.5 * 50 / 8)


def test_two_processes_evaluate_the_running_means_of_the_checkpoint(world, output):
    """Running means of BatchNorm differ between processes. Those of the main process are saved and evaluated."""
    arguments = [
        *toy_overrides(world, output),
        "model.image.name=test_byobnet",
        "data.batch_size=12",
        "train.steps=6",
        "evaluate.retrieval.batch_size=5",
    ]
    train(*arguments, "name=norms", world=2)
    result = output / "norms" / "eval" / "retrieval.json"
    during = json.loads(result.read_text())
    done = run("eval", output / "norms", "retrieval", "resamples=20", "examples=2")
    assert done.codes == [0], done.errors
    after = json.loads(result.read_text())
    assert during["metrics"] == after["metrics"] and during["details"] == after["details"]


def test_both_processes_end_if_the_checkpoint_cannot_be_saved(world, output):
    from tests.training.test_checkpoint import has_little_room

    arguments = [*toy_overrides(world, output), "name=no-room"]
    done = run("train", TOY, *arguments, function=has_little_room, world=2)
    assert done.codes[0] == 2 and done.codes[1] != 0  # ended by the launcher
