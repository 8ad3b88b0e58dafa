"""Numbers, names and configs beyond reason end in one line, before anything is written."""

import pytest

from tests.cases.inputs import refused, run
from tests.conftest import TOY, toy_overrides

HUGE = 10**23
VALUES = {
    "optim.lr": ("nan", "inf", "1e400", "-1"),
    "optim.weight_decay": ("nan", "inf"),
    "optim.betas": ("nan,0.9", "0.9,inf"),
    "seed": (HUGE, -1, 1 << 64),
    "data.batch_size": (HUGE, 0),
    "data.workers": (HUGE, 10**6),
    "data.max_length": (HUGE, -1, 0),
    "data.max_pixels": (HUGE, -1, 0),
    "data.max_bad_fraction": ("nan", "2"),
    "data.augment.scale": ("nan,nan", "-1,2"),
    "data.train.0.weight": ("nan", "inf", "-1", "0"),
    "data.readers": (0, 3, HUGE),
    "schedule.warmup_steps": (HUGE, -1),
    "schedule.final_fraction": ("nan",),
    "train.steps": (HUGE, -1, 0),
    "train.accumulation": (HUGE, 0),
    "train.clip_norm": ("nan", "inf", "0"),
    "train.layer_decay": ("nan", "-1", "0"),
    "train.lr_scales.text": ("nan",),
    "train.ema_decay": ("nan", "2"),
    "train.threads": (HUGE, 10**5, 0),
    "train.processes": (HUGE, 0, -1),
    "objectives.itc.weight": ("nan", "inf"),
    "objectives.itc.label_smoothing": ("nan", "3"),
    "save.every": (HUGE, 0),
    "save.keep": (HUGE, 0),
    "evaluate_every": (HUGE, -1),
    "evaluate.retrieval.ks": (HUGE, 0),
    "evaluate.retrieval.resamples": (HUGE, -1),
    "log.geometry_every": (HUGE, -1),
    "model.temperature": ("nan", "0", "-1"),
    "model.embed_size": (HUGE, 0),
}


@pytest.mark.parametrize("key", VALUES)
def test_number_beyond_reason_is_refused(world, tmp_path, capfd, key):
    for value in VALUES[key]:
        overrides = [*toy_overrides(world, tmp_path / "runs"), "data.workers=0", "train.steps=2", f"{key}={value}"]
        assert key.split(".")[-1] in refused(capfd, "train", TOY, *overrides), value
        assert not (tmp_path / "runs").exists()


def test_model_that_fits_into_no_memory_is_refused(world, tmp_path, capfd):
    overrides = [*toy_overrides(world, tmp_path / "runs"), f"model.embed_size={10**13}"]
    assert "the model does not fit into memory; lower its sizes" in refused(capfd, "train", TOY, *overrides)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("epochs", ["nan", "inf", "-1", "0"])
def test_epochs_beyond_reason_are_refused(world, tmp_path, capfd, epochs):
    overrides = [*toy_overrides(world, tmp_path / "runs"), "train.steps=none", f"train.epochs={epochs}"]
    assert "train.epochs" in refused(capfd, "train", TOY, *overrides)
    assert not (tmp_path / "runs").exists()


NAMES = ("x" * 300, "é" * 150, "a/b", "..", ".", "../up", "/absolute", "a\0b", "\udcff", "\ud800", "two\nlines", "")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_name_that_is_not_of_a_folder_is_refused(world, tmp_path, capfd, name):
    error = refused(capfd, "train", TOY, *toy_overrides(world, tmp_path / "runs"), f"name={name}")
    assert ("name=" in error or "no path can contain" in error) and len(error) < 400
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 200, "Größe 1", "a.b-c_d,e=f", "日本語"])
def test_any_other_name_is_one(world, tmp_path, capfd, name):
    overrides = [*toy_overrides(world, tmp_path), "train.steps=1", "data.workers=0", f"name={name}"]
    code, _, error = run(capfd, "train", TOY, *overrides)
    assert code == 0, error
    assert (tmp_path / name / "experiment.json").is_file()


@pytest.mark.parametrize("key", ["output", "data.train", "data.val", "data.tokenizer", "model.text.weights"])
@pytest.mark.parametrize("value", ["\0", "a\0b", "\ud800", "x" * 5000], ids=["NUL", "inner", "surrogate", "long"])
def test_path_that_no_file_can_have_is_refused(world, tmp_path, capfd, monkeypatch, key, value):
    monkeypatch.chdir(tmp_path)
    error = refused(capfd, "train", TOY, *toy_overrides(world, tmp_path / "runs"), "data.workers=0", f"{key}={value}")
    assert not (tmp_path / "runs").exists() and len(error) < 12_000


def test_run_is_resumed_from_within_its_folder(world, tmp_path, capfd, monkeypatch):
    overrides = [*toy_overrides(world, tmp_path), "train.steps=2", "data.workers=0", "name=run"]
    assert run(capfd, "train", TOY, *overrides)[0] == 0
    monkeypatch.chdir(tmp_path / "run")
    code, _, error = run(capfd, "train", "--resume", ".")
    assert code == 0 and "already at its last step" in error


CONFIGS = {
    "division": (
        "def config():\n    return 1 / 0",
        "ZeroDivisionError: division by zero (",
        ":2 in config: return 1 / 0)",
    ),
    "key": ("def config():\n    return {}['a']", "KeyError: 'a' (", ":2 in config"),
    "helper": (
        "def inner():\n    return [][3]\n\n\ndef config():\n    return inner()",
        "IndexError: list index out of range (",
        ":2 in inner: return [][3])",
    ),
    "module level": ("x = 1\nundefined\n", "NameError: name 'undefined' is not defined (", ":2 in <module>"),
    "type": ("def config():\n    return 1 + 'a'", "TypeError: unsupported operand type(s)", ":2 in config"),
    "in vlp": (
        "from vlp.config import Data\nimport dataclasses\n\n\ndef config():\n    return dataclasses.replace(3)",
        "TypeError: replace() should be called on dataclass instances (",
        ":6 in config: return dataclasses.replace(3))",
    ),
    "lines": ("def config():\n    raise RuntimeError('one\\ntwo')", "RuntimeError: one two (", ":2 in config"),
    "assertion": ("def config():\n    assert False", "AssertionError", ":2 in config: assert False)"),
    "import": ("def config():\n    import nowhere_at_all", "No module named 'nowhere_at_all'", ":2 in config"),
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("command", ["train", "ablate", "show"])
def test_config_that_raises_is_one_line_with_the_line_of_the_users_code(tmp_path, capfd, command, case):
    text, message, where = CONFIGS[case]
    (tmp_path / "mine.py").write_text(text)
    error = refused(capfd, command, tmp_path / "mine.py")
    assert message in error and f"{tmp_path / 'mine.py'}{where}" in error


@pytest.mark.parametrize("value", ['"itc"', "None", "3", "[]", "print", '{"a": 1}', "ImageTextContrast"])
@pytest.mark.parametrize("field", ["objectives", "evaluate"])
def test_objective_or_task_of_a_wrong_kind_is_refused(world, tmp_path, capfd, field, value):
    text = TOY.read_text() + (
        "\n\nfrom dataclasses import replace\n\nplain = config\n\n\ndef config():\n"
        f"    return replace(plain(), {field}={{'itc': {value}}}, save=Saving())\n"
    )
    (tmp_path / "mine.py").write_text(text)
    error = refused(capfd, "train", tmp_path / "mine.py", *toy_overrides(world, tmp_path / "runs"))
    assert f"{field}.itc" in error or "JSON" in error
    assert not (tmp_path / "runs").exists()
