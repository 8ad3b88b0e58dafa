"""Training in one process, with DDP, with ZeRO and with FSDP2 gives the same losses, also if the engine changes on resume. A
launch that would silently run something else is refused."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, TOY, command, environment, toy_overrides, vlp
from tests.processes import (
    command_line,
    free_port,
    losses,
    records,
    resume,
    run,
    samples,
    start,
    tensors,
    train,
    wait_for_step,
)
from vlp.weights.checkpoints import all_steps

ENGINES = {"single": {"world": 1}, "ddp": {"world": 2}}
ENGINES |= {engine: {"world": 2, "engine": engine} for engine in ("zero1", "zero2", "zero3")}
ENGINES |= {"fsdp2": {"world": 2, "engine": "fsdp2"}, "fsdp2-of-one": {"world": 1, "engine": "fsdp2"}}
# Dropout differs between processes, so it is off. Clipping is on: the first gradient norms are above 1.
SAME = ("model.text.dropout=0.0", "train.clip_norm=0.5", "train.ema_decay=0.9", "train.steps=20", "save.every=8")
STOP = 11


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def folder_of(output: Path, engine: str, more: tuple = ()) -> Path:
    return output / "-".join((engine, *more)).replace("=", "")


@pytest.fixture(scope="module")
def trained(world, output):
    """Return a function of engine and overrides that returns the folder of a run without interruption."""

    def get(engine: str, *more: str) -> Path:
        folder = folder_of(output, engine, more)
        if not folder.exists():
            train(*toy_overrides(world, output), *SAME, *more, f"name={folder.name}", **ENGINES[engine])
        return folder

    return get


@pytest.fixture(scope="module")
def stopped(world, output):
    """Return a function of engine and name that returns a new copy of a run that was stopped after step ``STOP``."""
    kept = {}

    def get(engine: str, name: str) -> Path:
        if engine not in kept:
            kept[engine] = output / f"stopped-{engine}"
            arguments = (*toy_overrides(world, output), *SAME, f"name={kept[engine].name}")
            running = start("train", TOY, *arguments, **ENGINES[engine])
            wait_for_step(running, kept[engine], STOP)
            running.signal(signal.SIGTERM)
            done = running.wait()
            assert not any(done.codes), done.errors
            assert STOP <= len(losses(kept[engine])) < 20
        return Path(shutil.copytree(kept[engine], output / name))

    return get


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("train.accumulation=2",)], ids=["plain", "accumulation"])
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_losses_of_twenty_steps_equal_those_of_one_process(trained, engine, more):
    one, two = trained("single", *more), trained(engine, *more)
    assert len(losses(one)) == 20
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    norms = [[r["gradient_norm"] for r in records(folder)] for folder in (one, two)]
    assert max(norms[0]) > 0.5  # so clipping has an effect
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)
    temperatures = [[r["temperature"] for r in records(folder)] for folder in (one, two)]
    assert temperatures[1] == pytest.approx(temperatures[0], rel=1e-5)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_evaluations_between_steps_do_not_change_the_next_steps(trained, engine):
    """The passes of an evaluation differ between the processes: the one with fewer images has fewer."""
    folder = trained(engine, "evaluate_every=9")
    assert len((folder / "eval.jsonl").read_text().splitlines()) == 3
    assert losses(folder) == pytest.approx(losses(trained("single")), abs=1e-5)


def test_micro_batches_do_not_share_negatives(trained):
    """Accumulation therefore changes the loss, and the test above compares it with itself."""
    losses_of_8, losses_of_4 = losses(trained("single")), losses(trained("single", "train.accumulation=2"))
    assert losses_of_4[0] < losses_of_8[0] - 0.3  # about log 4 instead of log 8


@pytest.mark.parametrize("engine", ["single", "fsdp2", "zero2", "zero3"])
def test_bfloat16_losses_are_close_to_float32(trained, engine):
    exact, rounded = losses(trained("single")), losses(trained(engine, "train.precision=bf16"))
    assert exact != rounded
    assert rounded == pytest.approx(exact, abs=0.05)


@pytest.mark.slow
def test_resumed_zero2_run_equals_one_without_interruption(trained, stopped):
    whole, folder = trained("zero2"), stopped("zero2", "zero2-to-zero2")
    resume(folder, **ENGINES["zero2"])
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-6)
    for name in ("model", "average"):
        expected, found = tensors(whole, name), tensors(folder, name)
        assert all(torch.allclose(found[k], expected[k], atol=1e-6) for k in expected)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_killed_run_with_sharded_weights_continues_to_the_same_bits(world, output, trained, engine):
    whole, folder = trained(engine), output / f"killed-{engine}"
    running = start("train", TOY, *toy_overrides(world, output), *SAME, f"name={folder.name}", **ENGINES[engine])
    wait_for_step(running, folder, STOP)
    running.kill()
    resume(folder, **ENGINES[engine])
    assert losses(folder) == losses(whole)
    for name in ("model", "optimizer", "average"):
        expected, found = tensors(whole, name), tensors(folder, name)
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.slow
def test_run_continues_over_a_chain_of_engines(world, output, trained):
    """Same samples in each step, losses and moments to float32 rounding, however the state was sharded before."""
    whole, folder = trained("single"), output / "chain"
    arguments = (*toy_overrides(world, output), *SAME, f"name={folder.name}")
    chain = ("ddp", "fsdp2-of-one", "zero3", "fsdp2", "single")
    for number, engine in enumerate(chain, start=1):
        # each engine takes four steps of the schedule of all twenty
        how = ENGINES[engine] | {"function": stops_after(4 * number)}
        done = run("train", *(("--resume", folder) if number > 1 else (TOY, *arguments)), **how)
        assert not any(done.codes), done.errors
        assert len(losses(folder)) == 4 * number
    assert samples(folder) == samples(whole)
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-5)
    for name in ("model", "optimizer", "average"):
        expected, found = tensors(whole, name), tensors(folder, name)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[k], expected[k], atol=1e-5, rtol=1e-3) for k in expected), name


class stops_after:
    """`command_line` that is asked to stop as soon as it has taken ``step`` steps. Other processes can import it."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, arguments: list[str]) -> int:
        from vlp.train import Trainer

        agree = Trainer.agree

        def agree_to_stop(trainer, losses, bad, interrupted):
            if trainer.run.state.step == self.step - 1:
                signal.raise_signal(signal.SIGTERM)
            return agree(trainer, losses, bad, interrupted)

        Trainer.agree = agree_to_stop
        return command_line(arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "before, after",
    [("zero2", "ddp"), ("zero2", "single"), ("ddp", "zero2"), ("single", "zero2"), ("fsdp2", "single")]
    + [("zero3", "ddp"), ("zero2", "zero3")],
)
def test_checkpoint_of_one_engine_is_resumed_by_another(trained, stopped, before, after):
    folder = stopped(before, f"{before}-to-{after}")
    resume(folder, **ENGINES[after])
    assert losses(folder) == pytest.approx(losses(trained("single")), abs=1e-5)


def launched(name: str) -> tuple[str, ...]:
    return ("--config_file", str(ROOT / "launch" / name), "--main_process_port", str(free_port()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, engine",
    [("cpu1.yaml", "single")]
    + [(f"{engine}_cpu2.yaml", engine) for engine in ("ddp", "zero1", "zero2", "zero3", "fsdp2")],
)
def test_accelerate_launch_with_the_files_of_launch(world, output, trained, launcher, engine):
    """The command that users type. The other tests set the environment of the launcher themselves."""
    engine_name = "deepspeed" if "zero" in engine else engine
    arguments = [*toy_overrides(world, output), *SAME, f"name=launched-{engine}", f"train.engine={engine_name}"]
    done = vlp("train", TOY, *arguments, f"train.processes={ENGINES[engine]['world']}", launch=launched(launcher))
    assert done.returncode == 0, done.stderr
    expected = losses(trained(engine))
    assert losses(output / f"launched-{engine}") == (
        pytest.approx(expected, abs=1e-6) if "zero" in engine else expected
    )


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_on_all_processes(world, output):
    """The launcher forwards the signal and waits. Its own exit code and traceback are accelerate's."""
    folder = output / "launcher"
    arguments = [*toy_overrides(world, output), "train.steps=2000", f"name={folder.name}"]
    with open(output / "launcher.err", "w") as err:
        launcher = subprocess.Popen(
            command("train", TOY, *arguments, launch=launched("ddp_cpu2.yaml")), env=environment(), cwd=ROOT, stderr=err
        )
    end = time.monotonic() + 120
    while not (folder / "log.jsonl").exists() or len(records(folder)) < 4:
        assert launcher.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    os.kill(launcher.pid, signal.SIGTERM)
    launcher.wait(60)
    stopped = len(losses(folder))
    assert 4 <= stopped < 2000
    assert f"stopped at step {stopped} and saved" in (output / "launcher.err").read_text()
    assert all_steps(folder / "checkpoints")[0].name == f"step-{stopped:08d}"


# Environments that accelerate sets up for commands with which it silently runs something else (recorded from it)
SILENTLY_WRONG = {
    "--cpu --num_processes 2": (
        {"world": 1, "environment": {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}},
        (),
        "starts a single one",
    ),
    "--use_deepspeed with ACCELERATE_USE_CPU": (
        {"world": 2, "engine": "zero2", "environment": {"ACCELERATE_USE_CPU": "true"}},
        (),
        "DeepSpeed was asked for but does not run",
    ),
    "--use_fsdp": ({"world": 2, "environment": {"ACCELERATE_USE_FSDP": "true"}}, (), "asks for FSDP version 1"),
    "--use_fsdp with ACCELERATE_USE_CPU": (
        {"world": 2, "environment": {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"}},
        (),
        "asks for FSDP version 1",
    ),
    "two processes announced, one started": ({"world": 1}, ("train.processes=2",), "train.processes is 2 but 1 run"),
    "one process announced, two started": ({"world": 2}, ("train.processes=1",), "train.processes is 1 but 2 run"),
    "ZeRO announced, DDP started": (
        {"world": 2},
        ("train.engine=deepspeed",),
        "train.engine is 'deepspeed' but 'ddp' runs",
    ),
    "weights of FSDP2 offloaded": (
        {"world": 2, "engine": "fsdp2", "environment": {"FSDP_OFFLOAD_PARAMS": "true"}},
        (),
        "FSDP_OFFLOAD_PARAMS has no effect",
    ),
    "gradient caching under FSDP2": (
        {"world": 2, "engine": "fsdp2"},
        ("train.grad_cache=true", "train.accumulation=2"),
        "train.grad_cache=true differentiates with respect to whole weights",
    ),
    "compilation under FSDP2": ({"world": 2, "engine": "fsdp2"}, ("train.compile=true",), "train.compile compiles"),
    "gradient caching under ZeRO-3": (
        {"world": 2, "engine": "zero3"},
        ("train.grad_cache=true", "train.accumulation=2"),
        "which ZeRO-3 has only during a pass",
    ),
    "batch that cannot be split": (
        {"world": 2},
        ("data.batch_size=6", "train.accumulation=2"),
        "a micro-batch of 3",
    ),
    "LAMB under ZeRO": ({"world": 2, "engine": "zero2"}, (), "Lamb needs whole parameters"),
    "skipping half a ZeRO step": (
        {"world": 2, "engine": "zero2"},
        ("train.nonfinite=skip", "train.accumulation=2"),
        "needs train.accumulation=1",
    ),
}


@pytest.mark.parametrize("case", SILENTLY_WRONG)
def test_launch_that_would_run_something_else_is_refused_in_one_line(world, tmp_path, case):
    how, overrides, message = SILENTLY_WRONG[case]
    toy = TOY.with_name("toy_lamb.py") if "LAMB" in case else TOY
    done = run("train", toy, *toy_overrides(world, tmp_path), *overrides, **how)
    assert done.codes == [2] * how["world"], done.errors
    for error in done.errors:
        messages = [line for line in error.splitlines() if line.startswith("vlp: ")]
        assert len(messages) == 1 and message in messages[0] and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
