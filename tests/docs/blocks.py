"""Code blocks and inline commands of a Markdown page, and a check of a shell command without running it."""

from __future__ import annotations

import importlib.util
import re
import shlex
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT
from vlp.cli import build_parser
from vlp.commands.evaluate import choose_tasks
from vlp.config import Experiment, load_config
from vlp.loading.load_model import LoadOptions
from vlp.specs.overrides import override
from vlp.sweeps.ablation import Ablation
from vlp.sweeps.stages import Stages

FENCE = re.compile(
    r"(?:<!-- run(?P<run>:[^\n]*)? -->\n(?P<marked>))?^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S
)
COMMANDS = ("vlp", "accelerate", "python", "make", "pip", "sbatch", "cp", "ln")


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Args:
        title: File name of a Python block that is a file.
        run: Whether the page marks the block with ``<!-- run -->``.
        extra: Overrides for its ``vlp train`` commands in the test, from ``<!-- run: KEY=VALUE ... -->``.
    """

    language: str
    text: str
    title: str | None = None
    run: bool = False
    extra: tuple[str, ...] = ()


def read_blocks(page: Path) -> list[Block]:
    blocks = []
    for found in FENCE.finditer(page.read_text()):
        language, _, rest = found["info"].partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        extra = tuple((found["run"] or "").lstrip(":").split())
        blocks.append(Block(language, found["text"], title and title[1], found["marked"] is not None, extra))
    return blocks


def lines_of(text: str) -> list[str]:
    """Return the commands of a shell block, without comments and with continued lines joined."""
    lines = [re.sub(r"(^|\s+)# .*", "", line) for line in text.replace("\\\n", " ").splitlines()]
    return [line.strip() for line in lines if line.strip()]


def inline_commands(page: Path) -> list[str]:
    """Return the commands in backticks that are complete: no placeholder, and more than the name of a command."""
    prose = FENCE.sub("", page.read_text())
    quoted = re.findall(r"`((?:vlp|make|accelerate launch|python -m) [^`]+)`", prose)
    names_only = re.compile(r"vlp( data)? \w+")
    return [text for text in quoted if not names_only.fullmatch(text) and not re.search(r"\b[A-Z]{3,}\b|\[", text)]


def check_command(line: str) -> None:
    """Parse a command, and check the files, configs and settings that it names as far as they are in the repository.

    Raises:
        AssertionError: If the command names what does not exist.
        UserError: If an override does not fit.
        SystemExit: If vlp's parser refuses it.
    """
    program, *arguments = shlex.split(re.sub(r"^([A-Z]+=\S+ )+", "", line))  # without variables that it sets
    assert program in COMMANDS, f"unknown command: {line}"
    if program == "accelerate":
        assert arguments[:2] == ["launch", "--config_file"] and (ROOT / arguments[2]).is_file(), line
        module, *given = arguments[arguments.index("-m") + 1 :]
        assert module in ("vlp.train", "vlp.cli"), line
        check_vlp(["train", *given] if module == "vlp.train" else given)
    elif program == "vlp" and arguments in (["--help"], ["--version"]):
        return  # the parser ends the process
    elif program == "vlp":
        check_vlp(arguments)
    elif program == "python":
        assert arguments[0] == "-m" and importlib.util.find_spec(arguments[1]), line
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.M), line
    elif program == "pip":
        check_pip(arguments)
    elif program == "sbatch":
        assert (ROOT / arguments[0]).is_file(), line
        check_vlp(["train", *arguments[1:]])


def check_pip(arguments: list[str]) -> None:
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= set(settings["options.extras_require"])


def check_vlp(arguments: list[str]) -> None:
    options = build_parser().parse_args(arguments)
    if arguments[0] in ("train", "show", "ablate") and options.config:
        path = options.config.partition(":")[0]
        if (ROOT / path).is_file():
            spec = load_config(str(ROOT / options.config), Experiment, Stages, Ablation)
            spec.overridden(options.overrides) if not isinstance(spec, Experiment) else override(
                spec, options.overrides
            )
        else:  # a config that the page writes or copies
            assert not path.startswith("configs/") or path == "configs/mine.py", path
    elif arguments[0] == "eval" and options.task and ".py:" not in options.task:
        _, for_loading = choose_tasks("a model", options.task, options.overrides)
        override(LoadOptions(), for_loading)
