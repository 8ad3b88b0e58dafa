"""Settings that would train nothing, or the wrong thing, to the end are found before anything is built or written."""

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.cases.inputs import refused, run
from tests.conftest import TOY, toy_overrides
from tests.fixtures.toy import config as toy
from tests.processes import command_line, resume, train
from tests.processes import run as run_process
from vlp.data.reading.shards import Source
from vlp.errors import UserError
from vlp.objectives.base import Objective
from vlp.objectives.dcl import Dcl
from vlp.objectives.geometry import Uniformity
from vlp.objectives.itc import ImageTextContrast, MomentumContrast, SigmoidContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.mlm import MaskedText
from vlp.objectives.pairwise import NPair, PairContrast, Triplet, Tuplet
from vlp.objectives.sentence import SimCse
from vlp.objectives.simclr import SimClr
from vlp.tasks.base import Result
from vlp.tasks.masked import MaskedPrediction
from vlp.tasks.metrics import Interval
from vlp.training.run import Run
from vlp.training.validation import check_best, check_rows, check_together, validate
from vlp.weights import checkpoints


def arguments(world, output, *more: str) -> list[object]:
    return ["train", TOY, *toy_overrides(world, output), "data.workers=0", "train.steps=2", "name=run", *more]


# --- rows that a loss compares ---------------------------------------------------------------------------------------


def test_contrastive_loss_of_single_pairs_is_refused(world, tmp_path, capfd):
    error = refused(capfd, *arguments(world, tmp_path / "runs", "train.accumulation=8"))
    assert "objectives.itc compares at least 2 samples with each other and sees 1 at once" in error
    assert "(data.batch_size / train.accumulation); raise data.batch_size or lower train.accumulation" in error
    assert not (tmp_path / "runs").exists()
    error = refused(capfd, *arguments(world, tmp_path / "runs", "data.batch_size=1"))
    assert "sees 1 at once (data.batch_size)" in error


def test_gradient_caching_compares_all_micro_batches(world, tmp_path, capfd):
    """Micro-batches of one are fine there: the loss sees all eight rows."""
    code, _, error = run(capfd, *arguments(world, tmp_path, "train.accumulation=8", "train.grad_cache=true"))
    assert code == 0, error
    assert all(json.loads(line)["loss"] > 0.5 for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines())


COMPARE = [ImageTextContrast(), SigmoidContrast(), SimClr(), SimCse(), Dcl(), Uniformity(), Triplet(), PairContrast()]


@pytest.mark.parametrize(
    "objective", [*COMPARE, Tuplet(), NPair(), ImageTextMatching()], ids=lambda o: type(o).__name__
)
def test_losses_that_compare_rows_need_two(objective):
    one = replace(toy(), objectives={"o": objective}, data=replace(toy().data, batch_size=1))
    with pytest.raises(UserError, match="objectives.o compares at least 2 samples"):
        check_rows(one, 1)
    check_rows(replace(one, data=replace(one.data, batch_size=2)), 1)


def test_losses_with_a_queue_or_of_single_rows_need_one():
    for objective in (MomentumContrast(), MaskedText()):
        check_rows(replace(toy(), objectives={"o": objective}, data=replace(toy().data, batch_size=1)), 1)


def test_rows_of_all_processes_count_unless_the_loss_sees_its_own_only():
    experiment = replace(toy(), data=replace(toy().data, batch_size=2))
    check_rows(experiment, 2)  # one row on each of two processes, gathered
    check_rows(replace(experiment, objectives={"itm": ImageTextMatching(candidates="global")}), 2)
    with pytest.raises(UserError, match="objectives.itm .* sees 1 at once .data.batch_size / 2 processes."):
        check_rows(replace(experiment, objectives={"itm": ImageTextMatching()}), 2)


# --- frozen, warm-up ---------------------------------------------------------------------------------------------------


# --- related samples in the same batch -------------------------------------------------------------------------------


def related(*together: int, batch_size: int, accumulation: int = 1, readers: int = 1):
    experiment = toy()
    sources = tuple(Source("shards", together=samples) for samples in together)
    data = replace(experiment.data, train=sources, batch_size=batch_size, readers=readers)
    return replace(experiment, data=data, train=replace(experiment.train, accumulation=accumulation))


def test_related_samples_must_divide_the_micro_batch(world, tmp_path, capfd):
    error = refused(capfd, *arguments(world, tmp_path / "runs", "data.train.0.together=3"))
    assert "data.train keep 3 samples together, which does not divide the 8 samples of a micro-batch" in error
    assert "make data.batch_size a multiple of 3" in error
    error = refused(capfd, *arguments(world, tmp_path / "runs", "data.train.0.together=4", "train.accumulation=4"))
    assert "make data.batch_size a multiple of 16" in error
    error = refused(capfd, *arguments(world, tmp_path / "runs", "data.train.0.together=4"))  # 50 samples
    assert "together=4 of " in error and "does not divide its 50 samples" in error
    assert not (tmp_path / "runs").exists()


def test_related_samples_of_several_sources_and_processes_must_divide_the_micro_batch():
    check_together(related(2, 3, batch_size=24), 4)
    with pytest.raises(UserError, match=r"6 samples together, .* the 4 samples .*/ 6 processes\); .* multiple of 36$"):
        check_together(related(2, 3, batch_size=24), 6)
    validate(related(2, batch_size=16, readers=4))
    with pytest.raises(UserError, match="data.readers=16 does not divide the micro-batch of 8 groups of 2 samples"):
        validate(related(2, batch_size=16, readers=16))


@pytest.mark.parametrize("prefix", ["text.", "text", "image,text.model"])
def test_frozen_random_tower_is_refused_unless_it_is_asked_for(world, tmp_path, capfd, prefix):
    error = refused(capfd, *arguments(world, tmp_path / "runs", f"train.frozen={prefix}"))
    part = prefix.partition(",")[0].strip(".")
    assert f"train.frozen freezes {part}, whose weights are random; load weights" in error
    assert not (tmp_path / "runs").exists()


def test_frozen_random_tower_may_be_a_control_and_is_resumed(world, tmp_path, capfd):
    code, _, error = run(capfd, *arguments(world, tmp_path, "train.frozen=text.", "train.random_frozen=true"))
    assert code == 0, error
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert run(capfd, "train", "--resume", tmp_path / "run")[0] == 0


def test_frozen_tower_with_weights_is_trained_around(world, tmp_path, capfd):
    run(capfd, *arguments(world, tmp_path, "name=first"))
    weights = f"model.text.weights={tmp_path / 'first'}"
    code, _, error = run(capfd, *arguments(world, tmp_path, "train.frozen=text.", weights, "model.text.config=none"))
    assert code == 0, error
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")


def test_warm_up_beyond_the_run_is_noted_at_its_start(world, tmp_path, capfd):
    code, _, error = run(capfd, *arguments(world, tmp_path, "schedule.warmup_steps=20"))
    assert code == 0
    note = (
        "the warm-up of 20 steps (schedule.warmup_steps) is longer than the run of 2: the learning rate ends at 0.0001"
    )
    assert error.splitlines()[1] == f"{note} and never reaches optim.lr=0.001"
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["lr"] == pytest.approx(0.0001)
    code, _, error = run(capfd, *arguments(world, tmp_path, "schedule.warmup_steps=2", "name=equal"))
    assert code == 0 and "warm-up" not in error


# --- the best checkpoint -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "best, message",
    [
        ("retrieval/mean_recal", "retrieval has no metric 'mean_recal'; did you mean 'mean_recall'?"),
        ("retrieval/i2t_r@2", "retrieval has no metric 'i2t_r@2'; did you mean"),
        ("retrieval/", "retrieval has no metric ''"),
        ("retrieval", "retrieval has no metric ''"),
        ("retrival/mean_recall", "names no task of evaluate (retrieval)"),
    ],
)
def test_unknown_metric_of_the_best_checkpoint_is_refused(world, tmp_path, capfd, best, message):
    assert message in refused(capfd, *arguments(world, tmp_path / "runs", f"save.best={best}"))
    assert not (tmp_path / "runs").exists()


def test_every_metric_of_an_evaluation_may_select(world, tmp_path, capfd):
    """The declared names are those of a result."""
    assert run(capfd, *arguments(world, tmp_path))[0] == 0
    measured = json.loads((tmp_path / "run" / "eval" / "retrieval.json").read_text())["metrics"]
    task = toy().evaluate["retrieval"]
    assert set(task.metric_names()) == measured.keys()
    for name in measured:
        check_best(replace(toy(), save=replace(toy().save, best=f"retrieval/{name}")))


@pytest.mark.parametrize("metric, best", [("accuracy", [1, 1, 3]), ("perplexity", [1, 2, 2])])
def test_best_is_the_highest_value_or_the_lowest_of_a_perplexity(tmp_path, metric, best):
    saving = replace(toy().save, best=f"masked/{metric}")
    experiment = replace(toy(), name="run", output=str(tmp_path), save=saving, evaluate={"masked": MaskedPrediction()})
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    found = []
    for step, value in enumerate((0.5, 0.4, 0.6), 1):
        result = Result("p", "d", {}, {metric: Interval(value, 0, 1)}, lower_is_better=MaskedPrediction.lower_is_better)
        state = type("State", (), {"step": step})
        Run._mark_best(
            type("Run", (), {"experiment": experiment, "folder": experiment.folder, "state": state}), {"masked": result}
        )
        found.append(checkpoints.best(tmp_path / "run" / "checkpoints")["step"])
    assert found == best


def killed_between(arguments: list[str]) -> int:
    """Kill the process after the first evaluation has been written to one of the two files, before the other."""
    from vlp.training.run_writer import RunWriter

    both, order = [], {"mark": Run._mark_best, "log": RunWriter.log_evaluation}

    def step(name):
        def write(self, *given):
            if both:
                os._exit(9)
            both.append(name)
            order[name](self, *given)

        return write

    Run._mark_best, RunWriter.log_evaluation = step("mark"), step("log")
    return command_line(arguments)


def test_kill_between_the_two_records_of_an_evaluation_does_not_lose_the_best_checkpoint(world, tmp_path):
    overrides = [*toy_overrides(world, tmp_path), "evaluate_every=3", "data.workers=0", "train.steps=9", "save.keep=1"]
    train(*overrides, "name=whole")
    done = run_process("train", TOY, *overrides, "name=run", function=killed_between)
    assert done.codes == [9]
    resume(tmp_path / "run")
    best = [checkpoints.best(tmp_path / name / "checkpoints") for name in ("whole", "run")]
    assert best[0] == best[1] and best[0] is not None
    assert checkpoints.damage(checkpoints.best_path(tmp_path / "run" / "checkpoints")) is None
    lines = [(tmp_path / name / "eval.jsonl").read_text() for name in ("whole", "run")]
    assert lines[0] == lines[1] and lines[0].count("\n") == 3


# --- what experiment.json would give back differently --------------------------------------------------------------------


@dataclass(frozen=True)
class WithNumbers(Objective):
    names: dict[int, float] = None


def test_value_that_could_not_be_resumed_is_refused_at_the_start():
    with pytest.raises(UserError, match="could not be resumed"):
        validate(replace(toy(), objectives={"o": WithNumbers(names={1: 0.5})}))


def test_odd_best_json_of_another_metric_does_not_count(tmp_path):
    folder = Path(tmp_path) / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "best.json").write_text(json.dumps({"step": 1, "metric": "vqa/accuracy", "value": 0.9}))
    experiment = replace(toy(), name="run", output=str(tmp_path))
    result = Result("p", "d", {}, {"mean_recall": Interval(0.2, 0, 1)})
    stand_in = type(
        "Run", (), {"experiment": experiment, "folder": experiment.folder, "state": type("S", (), {"step": 2})}
    )
    Run._mark_best(stand_in, {"retrieval": result})
    assert checkpoints.best(folder) == {"step": 2, "metric": "retrieval/mean_recall", "value": 0.2}
