"""`vlp configs` lists what the docstrings of configs say, without running them."""

from tests.conftest import ROOT
from vlp.cli import main

NOTEBOOK = '''"""A method on small data. It has a second sentence.

Paper:    Somebody et al. 2020: accuracy 1.
Cost:     2 CPU cores,
          an hour.
Commands: vlp data world data/world
          vlp train configs/x.py
Data:     none.
"""

import antigravity_that_does_not_exist


def config() -> Experiment: ...


def large() -> vlp.config.Experiment:
    """The same at the paper's size.

    Cost: 8 GPUs.
    Measured: 3 %
    """


def stages() -> "Stages": ...
def sized(size) -> Experiment: ...
def helper() -> Data: ...
'''


def test_entries_have_the_sections_of_file_and_function(tmp_path, capsys, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text(NOTEBOOK.replace('"Stages"', "Stages"))
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "--folder", str(tmp_path)]) == 0
    first, second, third = capsys.readouterr().out.strip("\n").split("\n\n")
    assert first.splitlines() == [
        "a/x.py",
        "    A method on small data.",
        "    Paper:    Somebody et al. 2020: accuracy 1.",
        "    Cost:     2 CPU cores,",
        "              an hour.",
        "    Command:  vlp data world data/world",
        "              vlp train configs/x.py",
    ]
    assert second.splitlines()[:5] == [
        "a/x.py:large",
        "    The same at the paper's size.",
        "    Paper:    Somebody et al. 2020: accuracy 1.",
        "    Cost:     8 GPUs.",
        "    Measured: 3 %",
    ]
    assert third.startswith("a/x.py:stages\n    A method on small data.")


def test_words_choose_entries(capsys):
    assert main(["configs", "ALBEF", "flickr8k"]) == 0
    entries = capsys.readouterr().out.strip("\n").split("\n\n")
    assert entries and all("albef" in e.lower() and "flickr8k" in e.lower() for e in entries)
    assert main(["configs", "nothing-such"]) == 2
    assert "no config in" in capsys.readouterr().err


def test_every_file_of_configs_is_listed(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["configs"]) == 0
    listed = capsys.readouterr().out.split("\n")
    for path in (ROOT / "configs").rglob("*.py"):
        name = str(path.relative_to(ROOT))
        assert any(line == name or line.startswith(f"{name}:") for line in listed), name


def test_missing_folder_and_broken_file_are_one_line(tmp_path, capsys):
    assert main(["configs", "--folder", str(tmp_path / "nowhere")]) == 2
    (tmp_path / "x.py").write_text("def config(:")
    assert main(["configs", "--folder", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "nowhere" in lines[0] and "invalid syntax" in lines[1]
