"""The command line answers at once: its help loads no package that takes seconds to import."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from vlp.cli import build_parser

HEAVY = ("torch", "numpy", "transformers", "timm", "open_clip", "accelerate", "rich", "matplotlib", "PIL")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["data", "pack", "--help"]])
def test_help_imports_no_heavy_package(arguments):
    code = (
        "import sys, atexit\nfrom vlp.cli import main\n"
        f"atexit.register(lambda: print('loaded', [name for name in {HEAVY!r} if name in sys.modules]))\n"
        f"main({arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: vlp") and done.stdout.endswith("loaded []\n")


COMMANDS = ("train", "eval", "gradcam", "ablate", "report", "serve", "show", "configs", "data", "plan", "doctor")
ACTIONS = ("pack", "check", "stats", "tokenizer", "demo", "annotations", "answers", "dedup", "triples", "paraphrase")


def test_every_command_is_listed(capsys):
    for arguments, names in ((["--help"], COMMANDS), (["data", "--help"], (*ACTIONS, "world"))):
        with pytest.raises(SystemExit):
            build_parser().parse_args(arguments)
        shown = re.findall(r"^ {4}(\S+)", capsys.readouterr().out, flags=re.MULTILINE)
        assert shown == list(names)
