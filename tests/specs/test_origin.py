"""Runs and results name the command that was typed and the commit of vlp."""

import subprocess

import pytest

from vlp.specs import origin


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository in the place of vlp's, with one committed file. Return a function that runs git in it."""

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    (tmp_path / "vlp").mkdir()
    (tmp_path / "vlp" / "a.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(origin, "CHECKOUT", tmp_path.resolve())
    origin.commit.cache_clear()
    yield git
    origin.commit.cache_clear()


def test_clean_checkout_has_its_commit(checkout):
    assert origin.commit() == checkout("rev-parse", "HEAD")


@pytest.mark.parametrize("path", ["vlp/a.py", "vlp/new.py", "configs/new.py"])
def test_changed_and_new_files_of_vlp_and_configs_are_marked(checkout, tmp_path, path):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text("a = 2\n")
    assert origin.commit() == checkout("rev-parse", "HEAD") + "+changes"


def test_other_files_are_not_marked(checkout, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "notes.txt").write_text("a")
    assert origin.commit() == checkout("rev-parse", "HEAD")


def test_package_inside_the_checkout_of_another_project_has_no_commit(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(origin, "CHECKOUT", tmp_path.resolve() / "vlp")
    assert origin.commit() == ""


def test_machine_without_git_has_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert origin.commit() == ""


@pytest.mark.parametrize(
    ("argv", "typed"),
    [
        (["/usr/bin/vlp", "eval", "runs/a"], ["vlp", "eval", "runs/a"]),
        (["/x/vlp/cli.py", "train", "c.py"], ["vlp", "train", "c.py"]),  # also python -m vlp.train
        (["examples/own.py", "--fast"], ["python", "examples/own.py", "--fast"]),
    ],
)
def test_command_is_that_of_the_user(monkeypatch, argv, typed):
    monkeypatch.setattr("sys.argv", argv)
    assert origin.command_line() == typed


def test_processes_of_a_command_name_that_command(monkeypatch):
    monkeypatch.setenv(origin.COMMAND, "vlp ablate 'a b.py' seeds=0,1")
    assert origin.command_line() == ["vlp", "ablate", "a b.py", "seeds=0,1"]
