"""Copies of runs in stores: complete, resumable bit for bit, and no reason for a training to end."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from tests.conftest import TOY, toy_overrides
from tests.processes import command_line, losses, resume, run, tensors, train
from vlp.data.reading import locations
from vlp.errors import UserError
from vlp.training import checkpoint, store
from vlp.training.store import RunCopy, check_url, fetch_run, steps_in
from vlp.weights import checkpoints


@pytest.fixture
def memory():
    """Return the URL of an empty folder in memory."""
    MemoryFileSystem.store.clear()
    yield "memory://bucket/runs"
    MemoryFileSystem.store.clear()


def make_run(folder: Path, steps: tuple[int, ...] = (3, 6), time: str = "now") -> Path:
    (folder / "eval").mkdir(parents=True)
    (folder / "experiment.json").write_text("{}")
    (folder / "train.lock").write_text("process 1")
    (folder / "eval" / "retrieval.json").write_text("{}")
    (folder / "starts.jsonl").write_text(json.dumps({"step": 0, "time": time}) + "\n")
    for step in steps:
        add_checkpoint(folder, step)
    return folder


def add_checkpoint(folder: Path, step: int) -> None:
    with open(folder / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": step}) + "\n")
    checkpoint.save(folder / "checkpoints", step, {"model": {"w": torch.full((5,), float(step))}}, {"step": step})


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fail(*args, **kwargs):
    raise OSError("the store is down")


def test_copy_is_fetched_with_its_newest_and_best_checkpoints(tmp_path, memory):
    folder = make_run(tmp_path / "here" / "mine", (3, 6, 9))
    checkpoint.mark_best(folder / "checkpoints", 3, "retrieval/mean_recall", 0.5)
    lines = []
    copy = RunCopy(folder, memory, lines.append)
    copy.check()
    copy.update()
    fetched = fetch_run(f"{memory}/mine/", tmp_path / "there")
    assert fetched == tmp_path / "there" / "mine" and lines == []
    expected = files_of(folder)
    del expected["train.lock"]
    assert files_of(fetched) == {k: v for k, v in expected.items() if "step-00000006" not in k}
    assert not [p for p in fetched.parent.iterdir() if p.name.endswith(".tmp")]


def test_old_checkpoints_are_removed_from_the_copy(tmp_path, memory):
    folder = make_run(tmp_path / "mine")
    copy = RunCopy(folder, memory, print)
    copy.update()
    add_checkpoint(folder, 9)
    checkpoint.prune(folder / "checkpoints", 2, 9)
    copy.update()
    assert steps_in(copy.store.names()) == (["step-00000009", "step-00000006"], ["step-00000006", "step-00000009"])


def test_checkpoint_whose_copy_ended_early_is_passed_over_and_copied_again(tmp_path, memory, monkeypatch):
    """The manifest comes last, so that nothing short of all files counts as a checkpoint."""
    folder, lines = make_run(tmp_path / "mine", (3,)), []
    copy = RunCopy(folder, memory, lines.append)
    copy.update()
    add_checkpoint(folder, 6)
    uploads, upload = [], store.Store.upload

    def ends(self, path, name):
        uploads.append(name)
        if len(uploads) > 1:
            fail()
        upload(self, path, name)

    with monkeypatch.context() as patched:
        patched.setattr(store.Store, "upload", ends)
        copy.update()
        copy.update()
    assert steps_in(copy.store.names()) == (["step-00000003"], ["step-00000003", "step-00000006"])
    assert len(lines) == 1 and "the store is down" in lines[0] and "Training goes on" in lines[0]
    fetched = fetch_run(f"{memory}/mine", tmp_path / "early")
    assert [p.name for p in checkpoints.all_steps(fetched / "checkpoints")] == ["step-00000003"]
    (fetched / "notes.txt").write_text("kept")
    copy.update()
    assert steps_in(copy.store.names())[0] == ["step-00000006", "step-00000003"] and "again" in lines[1]
    assert fetch_run(f"{memory}/mine", tmp_path / "early") == fetched  # which was behind
    assert checkpoints.newest_whole(fetched / "checkpoints").name == "step-00000006"
    assert (fetched / "log.jsonl").read_bytes() == (folder / "log.jsonl").read_bytes()
    assert (fetched / "notes.txt").read_text() == "kept" and not (fetched / "train.lock").exists()


def test_damaged_checkpoint_of_a_store_is_passed_over(tmp_path, memory):
    RunCopy(make_run(tmp_path / "mine"), memory, print).update()
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/runs/mine/checkpoints/step-00000006/model.safetensors", b"other")
    with pytest.warns(UserWarning, match="damaged checkpoint in memory://bucket/runs/mine: step-00000006"):
        fetched = fetch_run(f"{memory}/mine", tmp_path / "there")
    assert [p.name for p in checkpoints.all_steps(fetched / "checkpoints")] == ["step-00000003"]
    fs.rm("/bucket/runs/mine/checkpoints", recursive=True)
    with pytest.raises(UserError, match="has no complete checkpoint"):
        fetch_run(f"{memory}/mine", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere" / "mine").exists()


def test_refused_fetch_writes_nothing(memory, tmp_path):
    with pytest.raises(UserError, match="is not a run"):
        fetch_run(f"{memory}/nothing", tmp_path / "there")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", ".hidden", ""])
def test_manifest_of_a_store_names_no_path_outside_its_folder(tmp_path, memory, name):
    RunCopy(make_run(tmp_path / "mine", (3,)), memory, print).update()
    fs, root = fsspec.filesystem("memory"), "/bucket/runs/mine/checkpoints/step-00000003"
    fs.pipe_file(f"{root}/manifest.json", json.dumps({"step": 3, "sha256": {name: "0"}}).encode())
    with pytest.warns(UserWarning, match="its manifest names"), pytest.raises(UserError, match="no complete"):
        fetch_run(f"{memory}/mine", tmp_path / "there")


class Flaky(MemoryFileSystem):
    """A store of which every third call fails."""

    calls = 0
    cachable = False

    def _call(self, name, *args, **kwargs):
        Flaky.calls += 1
        if Flaky.calls % 3 == 0:
            fail()
        return getattr(super(), name)(*args, **kwargs)

    def put_file(self, *args, **kwargs):
        return self._call("put_file", *args, **kwargs)

    def pipe_file(self, *args, **kwargs):
        return self._call("pipe_file", *args, **kwargs)

    def cat_file(self, *args, **kwargs):
        return self._call("cat_file", *args, **kwargs)

    def get_file(self, *args, **kwargs):
        return self._call("get_file", *args, **kwargs)

    def info(self, *args, **kwargs):
        return self._call("info", *args, **kwargs)


def test_store_that_fails_at_every_third_call_gets_the_whole_copy(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(locations, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(store.fsspec.core, "url_to_fs", lambda url: (Flaky(), "/bucket/runs/mine"))
    folder, lines = make_run(tmp_path / "here" / "mine"), []
    copy = RunCopy(folder, memory, lines.append)
    copy.check()
    copy.update()
    fetched = fetch_run(f"{memory}/mine", tmp_path / "there")
    assert Flaky.calls > 20 and lines == []
    newest = "checkpoints/step-00000006/model.safetensors"
    assert files_of(fetched)[newest] == files_of(folder)[newest]


@pytest.mark.parametrize(
    "url, message",
    [
        ("ftp://host/runs", "nothing can be stored at ftp://"),
        ("https://host/runs", "nothing can be stored at https://"),
        ("simplecache::s3://bucket/runs", "is not the URL of a folder"),
        ("s3://bucket::memory://x", "is not the URL of a folder"),
        ("s3://", "names no bucket"),
        ("s3:///", "names no bucket"),
        ("s3:/bucket/runs", "neither a folder nor a URL"),
        ("", "neither a folder nor a URL"),
        ("runs\0", "is not the URL of a folder"),
        ("s3://me:secret@bucket/runs", "has a password"),
        ("s3://me:sec/ret@bucket/runs", "has a password"),
        ("gs://bucket/runs?token=secret", "has a password"),
    ],
)
def test_url_at_which_no_run_can_be_stored_is_refused_without_its_password(url, message):
    with pytest.raises(UserError, match=message) as error:
        check_url(url, "save.copy_to")
    assert "secret" not in str(error.value) and "ret@" not in str(error.value) and "\n" not in str(error.value)


def test_url_of_a_container_of_azure_is_no_password():
    assert check_url("ABFS://container@account.dfs.core.windows.net/runs/", "save.copy_to").startswith(
        "abfs://container@"
    )


@pytest.mark.parametrize("inside", ["", "mine", "mine/checkpoints/copies"])
def test_copy_of_a_run_into_itself_is_refused(tmp_path, inside):
    folder = make_run(tmp_path / "mine")
    with pytest.raises(UserError, match="into itself"):
        RunCopy(folder, f"file://{tmp_path / inside}", print).check()


def test_copy_of_another_run_or_of_a_later_step_is_not_overwritten(tmp_path, memory):
    folder = make_run(tmp_path / "mine")
    RunCopy(folder, memory, print).update()
    RunCopy(folder, memory, print).check()  # the same run
    other = make_run(tmp_path / "other" / "mine", (), time="later")
    with pytest.raises(UserError, match="already holds another run"):
        RunCopy(other, memory, print).check()
    with pytest.raises(UserError, match="already holds another run"):
        fetch_run(f"{memory}/mine", tmp_path / "other")
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    with pytest.raises(UserError, match="is ahead of .*step-00000006; continue it with --resume memory://"):
        RunCopy(folder, memory, print).check()


def test_missing_package_of_a_store_is_named(monkeypatch):
    def url_to_fs(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(store.fsspec.core, "url_to_fs", url_to_fs)
    with pytest.raises(UserError, match=r"pip install 'vlp\[s3\]'"):
        RunCopy(Path("mine"), "s3://bucket/runs", print)


def refused(*arguments: object, **how) -> str:
    """Run a command that must end with exit code 2 and one line; return the line."""
    done = run("train", *arguments, **how)
    assert done.codes == [2], done.errors
    assert "Traceback" not in done.errors[0]
    return done.errors[0].splitlines()[-1]


def test_store_that_cannot_be_written_is_refused_before_the_run_exists(world, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(TOY, *toy_overrides(world, tmp_path), "name=mine", f"save.copy_to={tmp_path}/file/copies")
    assert line.startswith("vlp: cannot write ") and "leave out save.copy_to" in line
    assert not (tmp_path / "mine").exists()


def test_password_of_a_store_is_stored_nowhere(world, tmp_path):
    line = refused(TOY, *toy_overrides(world, tmp_path), "name=mine", "save.copy_to=s3://me:secret@bucket/runs")
    assert "has a password" in line and "secret" not in line
    assert not (tmp_path / "mine").exists()


def dies_in_the_second_copy(arguments: list[str]) -> int:
    upload, calls = store.Store.upload, []

    def counted(self, path, name):
        calls.append(name)
        if len(calls) == 5:  # three files a checkpoint
            os.kill(os.getpid(), signal.SIGKILL)
        upload(self, path, name)

    store.Store.upload = counted
    return command_line(arguments)


def test_run_whose_machine_is_lost_resumes_from_its_copy_bitwise(world, tmp_path):
    train(*toy_overrides(world, tmp_path), "name=whole")
    url = f"file://{tmp_path}/store"
    arguments = (*toy_overrides(world, tmp_path), "name=mine", f"save.copy_to={url}")
    assert run("train", TOY, *arguments, function=dies_in_the_second_copy).codes == [-signal.SIGKILL]
    shutil.rmtree(tmp_path / "mine")
    there = tmp_path / "there"
    done = run("train", "--resume", f"{url}/mine", f"output={there}")
    assert done.codes == [0], done.errors
    assert "resumed at step 3 from step-00000003" in done.errors[0]
    assert losses(there / "mine") == losses(tmp_path / "whole")
    for name in ("model", "optimizer"):
        expected, own = tensors(tmp_path / "whole", name), tensors(there / "mine", name)
        assert all(torch.equal(own[key], tensor) for key, tensor in expected.items())
    # and it was copied back, with the last evaluation
    copied = tmp_path / "store" / "mine"
    for name in ("log.jsonl", "eval.jsonl", "experiment.json", "checkpoints/best.json"):
        assert (copied / name).read_bytes() == (there / "mine" / name).read_bytes()
    assert checkpoints.newest_whole(copied / "checkpoints").name == "step-00000012"


def test_two_processes_fetch_once_and_copy_once(world, tmp_path):
    url = f"file://{tmp_path}/store"
    arguments = (*toy_overrides(world, tmp_path), "name=mine", f"save.copy_to={url}", "train.steps=6")
    assert run("train", TOY, *arguments, world=2).codes == [0, 0]
    shutil.rmtree(tmp_path / "mine")
    done = run("train", "--resume", f"{url}/mine", f"output={tmp_path}/there", "train.steps=9", world=2)
    assert done.codes == [0, 0], done.errors
    assert checkpoints.newest_whole(tmp_path / "store/mine/checkpoints").name == "step-00000009"


def test_experiment_of_somebody_else_causes_no_uploads(world, tmp_path):
    """Neither resuming a run folder nor starting from an experiment.json copies, unless the URL is named again."""
    url = f"{tmp_path}/store"
    train(*toy_overrides(world, tmp_path), "name=mine", f"save.copy_to={url}", "train.steps=3")
    shutil.rmtree(url)
    done = resume(tmp_path / "mine", "train.steps=6")
    assert f"save.copy_to={url!r} of the experiment.json is not used" in done.errors[0] and not Path(url).exists()
    text = json.loads((tmp_path / "mine" / "experiment.json").read_text())
    text["save"]["copy_to"] = url
    (tmp_path / "sent.json").write_text(json.dumps(text))
    assert run("train", tmp_path / "sent.json", "name=own").codes == [0]
    assert not Path(url).exists()
    resume(tmp_path / "mine", "train.steps=9", f"save.copy_to={url}")
    assert checkpoints.newest_whole(Path(url) / "mine" / "checkpoints").name == "step-00000009"


def has_no_store(arguments: list[str]) -> int:
    """Run `command_line` with a store that is unreachable from the first checkpoint on."""
    store.Store.upload = fail
    return command_line(arguments)


def test_unreachable_store_is_one_line_and_does_not_end_the_training(world, tmp_path):
    arguments = (*toy_overrides(world, tmp_path), "name=mine", f"save.copy_to={tmp_path}/store")
    done = run("train", TOY, *arguments, function=has_no_store)
    assert done.codes == [0] and len(losses(tmp_path / "mine")) == 12
    assert done.errors[0].count("cannot copy the run to") == 1 and "Traceback" not in done.errors[0]
    assert not list((tmp_path / "store").rglob("manifest.json"))


class Slow(LocalFileSystem):
    def put_file(self, *args, **kwargs):
        time.sleep(0.3)
        return super().put_file(*args, **kwargs)


def has_slow_store(arguments: list[str]) -> int:
    store.LocalFileSystem = Slow
    return command_line(arguments)


def test_slow_store_gets_every_file_before_the_run_ends(world, tmp_path):
    arguments = (*toy_overrides(world, tmp_path), "name=mine", f"save.copy_to={tmp_path}/store")
    assert run("train", TOY, *arguments, function=has_slow_store).codes == [0]
    copied, own = (files_of(folder / "mine") for folder in (tmp_path / "store", tmp_path))
    assert copied == own


@pytest.fixture
def s3(monkeypatch):
    """Start a server of S3 without a bucket."""
    reason = "a server of S3 needs pip install 'moto[server]' s3fs"
    pytest.importorskip("s3fs", reason=reason)
    server = pytest.importorskip("moto.server", reason=reason).ThreadedMotoServer(port=0)
    for name, value in (
        ("ACCESS_KEY_ID", "testing"),
        ("SECRET_ACCESS_KEY", "testing"),
        ("DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.get_host_and_port()[1]}")
    yield
    server.stop()


def test_copy_on_a_server_of_s3(tmp_path, s3):
    folder, url = make_run(tmp_path / "here" / "mine"), "s3://bucket/runs"
    with pytest.raises(UserError, match="bucket does not exist; create the bucket"):
        RunCopy(folder, url, print).check()
    fsspec.filesystem("s3").mkdir("s3://bucket")
    copy = RunCopy(folder, url, print)
    copy.check()
    copy.update()
    add_checkpoint(folder, 9)
    checkpoint.prune(folder / "checkpoints", 2, 9)
    copy.update()
    assert steps_in(copy.store.names()) == (["step-00000009", "step-00000006"], ["step-00000006", "step-00000009"])
    assert (
        checkpoints.newest_whole(fetch_run(f"{url}/mine", tmp_path / "there") / "checkpoints").name == "step-00000009"
    )


def in_current_folder(arguments: list[str]) -> int:
    """Run `command_line` in the folder that comes first."""
    os.chdir(arguments[0])
    return command_line(arguments[1:])


def test_eval_fetches_a_run_and_report_asks_for_a_folder(world, tmp_path):
    url = f"file://{tmp_path}/store"
    train(*toy_overrides(world, tmp_path / "here"), "name=mine", f"save.copy_to={url}", "train.steps=3")
    done = run(tmp_path, "eval", f"{url}/mine", "retrieval", "allow_contamination=true", function=in_current_folder)
    assert done.codes == [0], done.errors
    assert list((tmp_path / "runs" / "mine" / "eval").glob("retrieval*.json"))
    done = run("report", f"{url}/mine")
    assert done.codes == [2] and "copy the run to this machine" in done.errors[0] and done.errors[0].count("\n") == 1
