"""The command line answers at once: its help loads no package that takes seconds to import. Every help has an example."""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT
from tests.docs.blocks import check_command
from vlp import __version__
from vlp.cli import build_parser, main
from vlp.specs.origin import commit

HEAVY = ("torch", "numpy", "transformers", "timm", "open_clip", "accelerate", "rich", "matplotlib", "PIL")


def parsers(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the words of each command and the epilog of its help, from ``vlp`` down to ``vlp data pack``."""
    yield words, parser.epilog or ""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from parsers(inner, (*words, name))


EPILOGS = dict(parsers(build_parser()))


def loaded_by(code: str, names: str) -> tuple[str, list[str]]:
    """Return the output of a Python program, and the modules of ``names`` (an expression) that it has loaded at its end."""
    ending = f"import atexit, sys; atexit.register(lambda: print('loaded', *({names})))\n"
    done = subprocess.run([sys.executable, "-c", ending + code], cwd=ROOT, capture_output=True, text=True, check=True)
    output, _, last = done.stdout.rstrip("\n").rpartition("loaded")
    return output, last.split()


@pytest.mark.parametrize("words", EPILOGS, ids=" ".join)
def test_help_imports_no_heavy_package(words):
    code = f"from vlp.cli import main; main({[*words, '--help']!r})"
    # vlp eval lists the tasks by their names, without importing them
    output, loaded = loaded_by(code, f"name for name in {HEAVY!r} if name in sys.modules")
    assert output.startswith("usage: vlp") and loaded == []


def test_import_of_vlp_loads_no_other_package():
    _, loaded = loaded_by(
        "import vlp",
        "name for name, module in sys.modules.items() if 'site-packages' in str(vars(module).get('__file__'))",
    )
    _, of_vlp = loaded_by("import vlp", "name for name in sys.modules if name.split('.')[0] == 'vlp'")
    assert of_vlp == ["vlp"]
    assert {name.split(".")[0] for name in loaded} <= plain_packages()


def plain_packages() -> set[str]:
    """Return the packages outside of the standard library that a Python process without vlp loads, e.g. by .pth files."""
    _, loaded = loaded_by(
        "", "name for name, m in sys.modules.items() if 'site-packages' in str(vars(m).get('__file__'))"
    )
    return {name.split(".")[0] for name in loaded}


def test_help_loads_at_most_36_modules_of_vlp():
    _, loaded = loaded_by(
        "from vlp.cli import main; main(['--help'])", "name for name in sys.modules if name.split('.')[0] == 'vlp'"
    )
    assert "vlp.cli" in loaded and len(loaded) <= 36, loaded


@pytest.mark.parametrize("words", EPILOGS, ids=" ".join)
def test_help_has_an_example_that_parses_on_one_line(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert (found := re.match(r"example: (vlp [^;]*[^; ])(?:;|$)", EPILOGS[words])), EPILOGS[words]
    assert shlex.split(found[1])[1 : 1 + len(words)] == list(words)
    assert len(found[0]) <= 78  # argparse would wrap it on a terminal of 80 columns
    check_command(found[1])


def test_version_has_the_commit(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    expected = f"vlp {__version__}, commit {commit()}" if commit() else f"vlp {__version__}"
    assert capsys.readouterr().out == expected + "\n"


COMMANDS = (
    "train",
    "eval",
    "gradcam",
    "ablate",
    "runs",
    "report",
    "serve",
    "show",
    "configs",
    "data",
    "plan",
    "doctor",
    "completion",
)
ACTIONS = ("pack", "check", "stats", "tokenizer", "demo", "annotations", "answers", "dedup", "triples", "paraphrase")


def test_every_command_is_listed(capsys):
    for arguments, names in ((["--help"], COMMANDS), (["data", "--help"], (*ACTIONS, "world"))):
        with pytest.raises(SystemExit):
            build_parser().parse_args(arguments)
        shown = re.findall(r"^ {4}(\S+)", capsys.readouterr().out, flags=re.MULTILINE)
        assert shown == list(names)
