"""Results of evaluations as people's folders, names and habits make them: identity, names, damaged and hostile files."""

import http.server
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cases.inputs import refused, write_lines
from tests.cases.inputs import run as vlp
from tests.conftest import TOY, draw_pairs, toy_overrides
from tests.processes import train
from vlp.commands import evaluate
from vlp.config import load_json
from vlp.data.preparing.pack import pack
from vlp.errors import UserError
from vlp.loading import run as loading
from vlp.report.results import read_results
from vlp.specs.json import dump
from vlp.tasks.base import Result
from vlp.tasks.metrics import Interval
from vlp.tasks.naming import check_task_names, data_name, result_name
from vlp.tasks.retrieval import Retrieval
from vlp.tasks.zero_shot import ZeroShot
from vlp.weights import checkpoints


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    train(*toy_overrides(world, output), "train.steps=2", "save.every=1", "data.workers=0")
    return output / "toy"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A run of its own, which a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """``coco/shards`` and ``flickr30k/shards``: images that no run was trained on, four each."""
    folder = tmp_path_factory.mktemp("sets")
    pairs = draw_pairs(folder / "pictures", 66)  # the world has the first 50
    for name, part in (("coco", pairs[50:54]), ("flickr30k", pairs[54:58])):
        pack(part, folder / name / "shards")
    for name, part in (("val", pairs[58:62]), ("test", pairs[62:])):
        pack(part, folder / "split" / name)
    return folder


def result(run: Path, name: str) -> dict:
    return json.loads((run / "eval" / f"{name}.json").read_text())


def names(run: Path) -> set[str]:
    return {path.stem for path in (run / "eval").glob("*.json")}


def rewrite(path: Path, change) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


# --- identity -----------------------------------------------------------------------------------------------------------


def test_eval_results_overwritten(run, sets, capfd):
    """Two data sets whose folders have one name are two results, and neither is said to have been trained on."""
    for name in ("coco", "flickr30k", "coco", "flickr30k"):
        code, out, _ = vlp(capfd, "eval", run, "retrieval", f"data={sets / name / 'shards'}", "resamples=5")
        assert code == 0 and f"protocol: {name}-shards-unstated@run" in out
    kept = names(run) - {"retrieval"}
    first, second = sorted(kept, key=len)
    assert first == "retrieval-shards" and second.startswith("retrieval-shards-")
    assert {Path(result(run, name)["data"]).parent.name for name in kept} == {"coco", "flickr30k"}
    assert second.endswith(result(run, second)["data_id"][:8])


def test_data_that_moved_keep_their_result(run, sets, tmp_path, capfd):
    for folder in ("coco", "again"):
        shutil.copytree(sets / "coco" / "shards", tmp_path / folder / "shards")
        assert vlp(capfd, "eval", run, "retrieval", f"data={tmp_path / folder / 'shards'}", "resamples=5")[0] == 0
    assert names(run) == {"retrieval", "retrieval-shards"}
    assert "again" in result(run, "retrieval-shards")["data"]


def test_folders_of_images_with_one_name_are_two_results(run, tmp_path, capfd):
    """Also where they have the same file names, classes and sizes."""
    for name, offset in (("a", 0), ("b", 20)):
        for n, pair in enumerate(draw_pairs(tmp_path / "pictures", 40)[offset : offset + 4]):
            target = tmp_path / name / "images" / f"class_{n % 2}" / f"{n}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(Path(pair.image).read_bytes())
        given = (f"data={tmp_path / name / 'images'}", "resamples=5", "prompts=photo", "allow_contamination=true")
        assert vlp(capfd, "eval", run, "zero-shot", *given)[0] == 0
    assert len(names(run)) == 3


def test_relative_data_elsewhere(world, sets, tmp_path, capfd, monkeypatch):
    """A relative path that names other data where the run is evaluated is not the data that it was trained on."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    shutil.copytree(world / "shards", here / "w" / "shards")
    shutil.copytree(sets / "coco" / "shards", elsewhere / "w" / "shards")
    monkeypatch.chdir(here)
    own = [f"data.tokenizer={world / 'tokenizer'}", f"output={tmp_path}", "train.steps=1", "data.workers=0"]
    assert vlp(capfd, "train", TOY, "data.train=w/shards", "data.val=w/shards", *own)[0] == 0
    run = tmp_path / "toy"
    assert "fine-tuned" in result(run, "retrieval")["name"] and result(run, "retrieval")["trained_on"] == 50
    monkeypatch.chdir(elsewhere)
    code, out, _ = vlp(capfd, "eval", run, "retrieval", "data=w/shards", "resamples=5")
    assert code == 0 and "w-shards-unstated@toy" in out and "images trained on" not in out
    assert result(run, "retrieval-shards")["trained_on"] is None
    assert vlp(capfd, "eval", run)[0] == 0  # the run's own task, whose data.val is relative, too
    assert result(run, "retrieval")["trained_on"] == 50 and len(names(run)) == 3
    monkeypatch.chdir(tmp_path)
    assert f"relative to {tmp_path}" in refused(capfd, "eval", run)


def test_splits_have_their_own_labels(run, sets, tmp_path, capfd):
    for split in ("val", "test"):
        assert vlp(capfd, "eval", run, "retrieval", f"data={sets / 'split' / split}", "resamples=5")[0] == 0
    assert {result(run, name)["name"] for name in names(run) - {"retrieval"}} == {
        "split-val-unstated@run",
        "split-test-unstated@run",
    }
    rows = [{"image": f"{n}.png", "label": n % 2, "split": ("val", "test")[n // 2]} for n in range(4)]
    write_lines(tmp_path / "labels.jsonl", rows)
    for n, pair in enumerate(draw_pairs(tmp_path / "pictures", 54)[50:]):
        (tmp_path / f"{n}.png").write_bytes(Path(pair.image).read_bytes())
    for split in ("val", "test"):
        given = (f"data={tmp_path}", f"split={split}", "prompts=photo", "resamples=5")
        assert vlp(capfd, "eval", run, "zero-shot", *given)[0] == 0
    assert vlp(capfd, "report", run, "--output", tmp_path / "out")[0] == 0
    html = (tmp_path / "out" / "report.html").read_text()
    assert f"zero-shot: {tmp_path}, split val" in html and f"zero-shot: {tmp_path}, split test" in html
    ids = {result(run, name)["data_id"] for name in names(run)}
    assert len(ids) == len(names(run)) == 5


def test_a_setting_and_values_that_change_nothing_make_no_second_result(run, capfd):
    for given in (["setting=fine-tuned"], ["setting=zero-shot", "ks=1,5,10"], ["examples=2"]):
        assert vlp(capfd, "eval", run, "retrieval", *given)[0] == 0
    assert names(run) == {"retrieval"} and "zero-shot" not in result(run, "retrieval")["name"]
    # one that an earlier version of vlp kept apart is one in the reports
    shutil.copy(run / "eval" / "retrieval.json", run / "eval" / "retrieval-setting=zero-shot.json")
    rewrite(run / "eval" / "retrieval-setting=zero-shot.json", lambda r: r | {"time": "2999", "name": "newer"})
    assert [r["name"] for r in read_results(run)] == ["newer"]


def test_results_of_other_data_at_one_location_have_two_tables(run, sets, tmp_path, capfd):
    """As of runs that were evaluated in two folders on a relative path."""
    assert vlp(capfd, "eval", run, "retrieval", f"data={sets / 'coco' / 'shards'}", "resamples=5")[0] == 0
    runs = []
    for n, identity in enumerate(("1" * 64, "2" * 64, "1" * 64, "")):
        folder = tmp_path / f"run{n}"
        (folder / "eval").mkdir(parents=True)
        data = {"data": "elsewhere" if n == 2 else "w/shards", "data_id": identity, "name": "w-shards"}
        (folder / "eval" / "x.json").write_text(json.dumps(result(run, "retrieval-shards") | data))
        runs.append(folder)
    assert vlp(capfd, "report", *runs, "--output", tmp_path / "out")[0] == 0
    html = (tmp_path / "out" / "report.html").read_text()
    titles = [title for title in ("(11111111)</h2>", "(22222222)</h2>") if title in html]
    assert len(titles) == 2 and html.count("<h2>retrieval: ") == 3  # the one without an identity is of either


@pytest.mark.parametrize(
    ("location", "short", "name"),
    [
        ("/d/coco/shards", "shards", "coco-shards"),
        ("/d/coco/shards/val", "shards-val", "coco-shards-val"),
        ("/d/nlvr2/test.jsonl", "test.jsonl", "nlvr2-test.jsonl"),
        ("/d/a/shards::/d/b/shards/{000..4}.tar", "shards", "a-shards+b-shards"),
        ("s3://bucket/coco/val", "coco-val", "coco-val"),
        ("/", "data", "data"),
    ],
)
def test_data_name(location, short, name):
    from vlp.tasks.naming import GENERIC

    assert (data_name(location), data_name(location, GENERIC)) == (short, name)


def test_names_of_files_fit_into_a_file_system(tmp_path):
    for text in ("x" * 300, "\u540d" * 300, "\U0001f600" * 300, "\ud800" * 300, "../" * 300):
        name = result_name("zero-shot", ZeroShot(), [f"names={text}", f"data={text.replace(chr(0xD800), 'a')}"])
        (tmp_path / f".{name}.json.1234567.tmp").write_text("")
        assert "/" not in name


# --- contamination ------------------------------------------------------------------------------------------------------


def test_reports_say_that_images_were_trained_on(run, tmp_path, capfd):
    assert result(run, "retrieval")["trained_on"] == 50
    assert vlp(capfd, "report", run)[0] == 0
    sentence = "<strong>50 of its images are training images, so this is not a held-out result.</strong>"
    assert sentence in (run / "report.html").read_text()
    assert vlp(capfd, "report", run, "--output", tmp_path / "out")[0] == 0
    assert "<td>50 images, 100 captions</td><td>50</td>" in (tmp_path / "out" / "report.html").read_text()
    for trained_on, text, cell in (
        (0, "None of its images are among the training images.", "0"),
        (None, "Whether it has training images is not known.", "?"),
    ):
        rewrite(run / "eval" / "retrieval.json", lambda r, n=trained_on: r | {"trained_on": n})
        assert vlp(capfd, "report", run)[0] == 0 and vlp(capfd, "report", run, "--output", tmp_path / "out")[0] == 0
        assert text in (run / "report.html").read_text()
        assert f"<td>{cell}</td>" in (tmp_path / "out" / "report.html").read_text()


# --- what a stranger's run folder may do --------------------------------------------------------------------------------


def alter_experiment(run: Path, **changes) -> None:
    experiment = load_json(run / "experiment.json")
    (run / "experiment.json").write_text(dump(replace(experiment, **changes)))


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "", ".hidden", "x" * 101, "a\nb", "a\0b", "\ud800"])
def test_a_task_name_that_is_a_path_is_refused(run, tmp_path, capfd, name):
    with pytest.raises(UserError, match="evaluate has the name"):
        check_task_names({name: None})
    alter_experiment(
        run, evaluate={name: Retrieval()}, save=replace(load_json(run / "experiment.json").save, best=None)
    )
    before = sorted(tmp_path.rglob("*"))
    for command in (["eval", run], ["eval", run, "retrieval"], ["train", "--resume", run]):
        assert "evaluate has the name" in refused(capfd, *command)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_submission_in_an_experiment_is_refused(run, tmp_path, capfd):
    from vlp.tasks.captioning import CaptionQuality

    target = tmp_path / "new" / "written.json"
    alter_experiment(
        run,
        evaluate={"captions": CaptionQuality(submission=str(target))},
        save=replace(load_json(run / "experiment.json").save, best=None),
    )
    for command in (["eval", run], ["eval", run, "captions"], ["train", "--resume", run]):
        assert "evaluate.captions.submission is a path in the experiment" in refused(capfd, *command)
    assert not target.parent.exists()


def test_a_refused_submission_leaves_no_folder(run, tmp_path, capfd):
    given = [{"image": "a.png", "text": "?", "answers": ["x"]}]  # without a question_id
    (tmp_path / "a.png").write_bytes(b"")
    data = write_lines(tmp_path / "x.jsonl", given)
    target = tmp_path / "new" / "folder" / "r.json"
    line = refused(capfd, "eval", run, "vqa", f"data={data}", f"submission={target}")
    assert "a submission needs question_id" in line and not (tmp_path / "new").exists()


class Server(http.server.BaseHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        self.send_response(404)
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_a_report_fetches_nothing_and_writes_nothing_elsewhere(run, sets, tmp_path, capfd):
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    unindexed = tmp_path / "unindexed"
    unindexed.mkdir()
    shutil.copy(next((sets / "coco" / "shards").glob("*.tar")), unindexed / "0.tar")
    wrong = {"line": "1", "text": "?", "prediction": "a", "truth": "b", "images": ["0.png"]}
    original = result(run, "retrieval")
    locations = [
        f"{url}/x.tar",
        f"{sets}::{url}/x.tar",
        f"simplecache::{url}/x.tar",
        f"{{{url}/a.tar,b}}",
        str(unindexed),
    ]
    locations += ["memory://x.tar", f"filecache::{url}/x"]
    for n, location in enumerate(locations):
        details = original["details"] | {"images": location, "wrong": [wrong]}
        changed = original | {"data": location, "data_id": str(n), "details": details}
        (run / "eval" / f"evil{n}.json").write_text(json.dumps(changed))
    assert vlp(capfd, "report", run)[0] == 0 and vlp(capfd, "report", run, "--output", tmp_path / "out")[0] == 0
    server.shutdown()
    assert Server.asked == [] and [path.name for path in unindexed.iterdir()] == ["0.tar"]
    assert (run / "report.html").read_text().count('alt="result ') == 2 * 5  # only those of the run's own evaluation


def test_brackets_are_not_markup(run, tmp_path, capfd, monkeypatch):
    """In a location, in the names of classes, of metrics and of the run."""
    shown = Result("p", "sh[/]x", {"[bold]images": 3}, {"accuracy_[red]": Interval(0.5, 0.4, 0.6)}, task="[/]t")
    monkeypatch.setenv("COLUMNS", "200")
    evaluate.show(shown, 1, "abc", tmp_path / "[/]")
    out = capfd.readouterr().out
    assert all(text in out for text in ("[/]t on sh[/]x", "[bold]images", "accuracy_[red]", "written to"))
    shards = shutil.copytree(load_json(run / "experiment.json").data.val, tmp_path / "sh[/]x")
    code, out, _ = vlp(capfd, "eval", run, "retrieval", f"data={shards}", "allow_contamination=true")
    assert code == 0 and "sh[/]x" in "".join(out.split())  # a long title is wrapped
    assert "[/red]" in refused(capfd, "eval", run, "retrieval", "data=[/red]")
    from vlp.tasks.progress import progress_bar

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("a[/]b [red]c") as progress:
        progress(1, 2)
    assert "a[/]b [red]c" in capfd.readouterr().err


# --- damaged files ------------------------------------------------------------------------------------------------------

DAMAGED = {
    "empty": b"",
    "cut": b'{"task": "retrieval", "metr',
    "binary": bytes(range(256)),
    "list": b"[1, 2]",
    "number": b"1" * 5000,
    "deep": b"[" * 100_000,
    "null": b"null",
    "other types": json.dumps({"task": 5, "n": [], "metrics": {"a": 3}, "time": {}}).encode(),
    "surrogates": b'{"task": "\\ud800"}',
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_result_is_left_out_and_named(run, tmp_path, capfd, damage):
    (run / "eval" / "bad.json").write_bytes(DAMAGED[damage])
    (run / "eval" / "folder.json").mkdir()
    for options in ([], ["--output", tmp_path / "out"]):
        code, out, error = vlp(capfd, "report", run, *options)
        assert code == 0 and error.count("\n") == 2 and f"{run}/eval/bad.json is not a readable result" in error
        html = ((tmp_path / "out" if options else run) / "report.html").read_text()
        assert "bad.json is not a readable result" in html and "mean recall" in html
    (run / "eval" / "retrieval.json").write_bytes(DAMAGED[damage])
    assert vlp(capfd, "eval", run)[0] == 0 and result(run, "retrieval")["n"]["images"] == 50  # evaluated again


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", ["log.jsonl", "eval.jsonl", "starts.jsonl", "quarantine.jsonl"])
def test_damaged_lines_are_left_out(run, capfd, name, damage):
    with open(run / name, "ab") as file:
        file.write(
            DAMAGED[damage] + b'\n{"step": "x", "command": 5}\n{"step": 3, "loss": [], "command": [1], "machine": 2}\n'
        )
    code, _, error = vlp(capfd, "report", run)
    assert code == 0 and "Traceback" not in error


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_experiment_is_one_line(run, tmp_path, capfd, damage):
    (run / "experiment.json").write_bytes(DAMAGED[damage])
    before = sorted(tmp_path.rglob("*"))
    for command in (["report", run], ["eval", run], ["eval", run, "retrieval"], ["gradcam", run]):
        assert "experiment" in refused(capfd, *command)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:.*best.json is damaged")
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_best_is_named_and_the_last_checkpoint_taken(run, capfd, damage):
    best = run / "checkpoints" / "best.json"
    best.write_bytes(DAMAGED[damage])
    assert "best.json is damaged" in refused(capfd, "eval", run, "--checkpoint", "best")
    with pytest.warns(UserWarning, match="best.json is damaged; taking the last checkpoint"):
        assert loading.select_checkpoint(run / "checkpoints", None).name == "step-00000002"
    for step in (-1, 10**23, 7, "2", None, 1.5):
        best.write_text(json.dumps({"step": step, "metric": "retrieval/mean_recall", "value": 0.5}))
        code, _, error = (
            vlp(capfd, "eval", run, "resamples=0") if step is None else (2, "", refused_or_done(capfd, run))
        )
        assert "Traceback" not in error


def refused_or_done(capfd, run: Path) -> str:
    code, _, error = vlp(capfd, "eval", run)
    assert code in (0, 2), error
    return error


def test_odd_numbers_and_names_are_drawn_or_left_out(run, tmp_path, capfd):
    for n, value in enumerate(("NaN", "Infinity", "1e999", "1" + "0" * 23, '"x"', "null", "[]", "true")):
        text = (run / "eval" / "retrieval.json").read_text()
        at = text.index('"value": ') + len('"value": ')
        (run / "eval" / f"odd{n}.json").write_text(text[:at] + value + text[text.index(",", at) :])
    long, money = "n" * 300, "$\\frac{x$ _y ^2 \\ud800"
    rewrite(
        run / "eval" / "retrieval.json",
        lambda r: r | {"metrics": {f"i2t_r@{name}": next(iter(r["metrics"].values())) for name in (long, money, "$")}},
    )
    with open(run / "log.jsonl", "a") as file:
        for loss in ("NaN", "1e300", "-1e999", "1" + "0" * 400, "true"):
            file.write(
                f'{{"step": 3, "loss": {loss}, "lr": {loss}, "geometry/{money[:4]}$": 1.0}}\n'.replace("\\", "/")
            )
        file.write(f'{{"step": {10**23}, "loss": 1.0}}\n')
    experiment = load_json(run / "experiment.json")
    (run / "experiment.json").write_text(dump(replace(experiment, name=f"_{long}$[/]<b>")))
    other = Path(shutil.copytree(run, tmp_path / "$_{x"))
    for command in (["report", run], ["report", run, other, "--output", tmp_path / "out"]):
        code, out, error = vlp(capfd, *command)
        assert code == 0 and "Traceback" not in error, error
    assert "&lt;b&gt;" in (run / "report.html").read_text()


def test_half_written_runs(run, tmp_path, capfd):
    for name in ("eval", "checkpoints", "tokenizer"):
        shutil.rmtree(run / name)
    for name in ("starts.jsonl", "eval.jsonl", "data.json"):
        (run / name).unlink()
    assert vlp(capfd, "report", run)[0] == 0
    (run / "log.jsonl").write_text('{"step": 1, "lo')
    assert "has no step in its log yet" in refused(capfd, "report", run)
    (run / "experiment.json").unlink()
    assert "is not a run" in refused(capfd, "report", run)
    assert "no folder" in refused(capfd, "report", tmp_path / ("x" * 300))
    assert "no folder" in refused(capfd, "report", run, tmp_path / "y")
    assert "too long" in refused(capfd, "eval", tmp_path / ("x" * 300), "retrieval")


# --- a training next to an evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["damage", "read", "recorded_hashes"])
def test_a_checkpoint_that_a_training_removes_meanwhile_is_replaced_by_the_newer_one(run, at, monkeypatch):
    """With save.keep=1, at any of the reads."""
    folder = run / "checkpoints"
    (folder / "best.json").unlink(missing_ok=True)
    new, old = checkpoints.all_steps(folder)
    new.rename(folder / "hidden")
    original, calls = getattr(checkpoints, at), []

    def replaced(path: Path, *rest):
        if not calls:
            calls.append(path)
            (folder / "hidden").rename(new)
            shutil.rmtree(old)
        return original(path, *rest)

    monkeypatch.setattr(checkpoints, at, replaced)
    weights = loading.read_weights(folder, None)
    assert calls == [old] and weights.path == new
    monkeypatch.undo()
    with pytest.raises(UserError, match="no checkpoint step-00000001; there are steps 2"):
        loading.read_weights(folder, "1")
    (new / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="was altered"):
        loading.read_weights(folder, None)


def test_a_folder_that_changes_for_ever_is_given_up(run, monkeypatch):
    folder, calls = run / "checkpoints", []

    def vanishing(path: Path) -> str:
        calls.append(path)
        (folder / f"step-{len(calls) + 10:08d}").mkdir()
        return "it is missing"

    monkeypatch.setattr(checkpoints, "damage", vanishing)
    with pytest.raises(UserError, match="replaced faster than they are read; raise the run's save.keep"):
        loading.read_weights(folder, None)
    assert len(calls) >= loading.TRIES


# --- words --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["retreival"], "there is no task 'retreival'; did you mean 'retrieval'?"),
        (["zeroshot"], "there is no task 'zeroshot'; did you mean 'zero-shot'?"),
        (["own-retrievall"], "did you mean 'own-retrieval'?"),
        (["retrieval", "bach_size=3"], "retrieval has no option 'bach_size'; did you mean 'batch_size'?"),
        (["retrieval", "tokeniser=x"], "retrieval has no option 'tokeniser'; did you mean 'tokenizer'?"),
        (["own-retreival.batch_size=3"], "has no task 'own-retreival' to set; did you mean 'own-retrieval'?"),
        (["own-retrieval.bach_size=3"], "did you mean 'batch_size'?"),
        (["alow_contamination=true"], "did you mean 'allow_contamination'?"),
        (["~/nowhere.py:Mine"], "no file ~/nowhere.py"),
    ],
)
def test_misspelt_names_are_suggested(run, capfd, given, line):
    experiment = load_json(run / "experiment.json")
    alter_experiment(run, evaluate={"own-retrieval": Retrieval()}, save=replace(experiment.save, best=None))
    assert line in refused(capfd, "eval", run, *given)


def test_a_task_in_the_home_folder(run, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "home_task.py").write_text(
        "from dataclasses import dataclass\nfrom vlp.tasks.base import Task\n\n\n@dataclass(frozen=True)\n"
        'class Mine(Task):\n    """Say hello.\n\n    Args:\n        count: How often.\n    """\n\n    count: int = 3\n'
    )
    with pytest.raises(SystemExit) as stopped:
        vlp(capfd, "eval", run, "~/home_task.py:Mine", "--help")
    assert stopped.value.code == 0 and "count=3\n      How often." in capfd.readouterr().out


def test_help_of_a_run_with_a_users_own_classes(run, capfd):
    """It needs no code, so that it neither asks for it nor runs it."""
    rewrite(run / "experiment.json", lambda e: e | {"objectives": {"own": {"type": "mine.losses:Own", "weight": 2}}})
    with pytest.raises(SystemExit) as stopped:
        vlp(capfd, "eval", run, "retrieval", "--help")
    out = capfd.readouterr().out
    assert stopped.value.code == 0 and "resamples=20\n" in out and "Bootstrap resamples" in out
    rewrite(run / "experiment.json", lambda e: e | {"evaluate": {"mine": {"type": "mine.tasks:Own", "depth": 7}}})
    with pytest.raises(SystemExit) as stopped:
        vlp(capfd, "eval", run, "mine", "--help")
    assert stopped.value.code == 0 and "mine.tasks:Own" in (out := capfd.readouterr().out) and "depth=7" in out
