"""`vlp show` prints the experiment that would be trained."""

import json

import pytest

from tests.conftest import ROOT, TOY
from tests.fixtures.toy import config as toy
from vlp.cli import main
from vlp.specs.json import dump, from_plain
from vlp.specs.overrides import override

STAGES = ROOT / "tests" / "fixtures" / "toy_stages.py"


def test_json_is_what_a_run_folder_stores(capsys):
    assert main(["show", str(TOY), "optim.lr=0.5", "--json"]) == 0
    shown = capsys.readouterr().out
    assert shown == dump(override(toy(), ["optim.lr=0.5"]).resolved()) + "\n"
    assert from_plain(json.loads(shown)).optim.lr == 0.5


def test_text_has_the_values_that_were_given(capsys):
    assert main(["show", f"{TOY}:config", "optim.lr=0.5"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Experiment(\n    name='toy',\n") and "lr=0.5," in shown and "# default: " in shown


def test_stages_are_shown_with_their_overrides(capsys):
    assert main(["show", str(STAGES), "stages.1.seed=5", "name=x"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Stages(\n    name='x',") and shown.count("seed=5,") == 1


def test_weights_that_are_missing_are_said_and_the_config_is_shown_as_written(capsys, tmp_path):
    path = tmp_path / "vlp_test_missing.py"
    path.write_text(TOY.read_text().replace("config=SIZES, dropout=0.1", "weights='nowhere'"))
    assert main(["show", str(path)]) == 0
    out, error = capsys.readouterr()
    assert "weights='nowhere'" in out and "not resolved: no such file or folder: nowhere" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"{TOY}:tiny"], "does not define tiny(); it has config"),
        ([str(TOY), "optim.rl=1"], "did you mean 'lr'?"),
        (["nowhere.py"], "no config file nowhere.py"),
    ],
)
def test_mistake_is_one_line(capsys, arguments, message):
    assert main(["show", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
