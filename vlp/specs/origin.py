"""Origin of a run or a result: the command that was typed, and the commit of vlp that ran it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

from vlp import __version__

COMMAND = "VLP_COMMAND"  # environment variable by which a command passes itself on to the processes that it starts
CHECKOUT = Path(__file__).resolve().parents[2]


def command_line() -> list[str]:
    """Return the command that started this process as a user types it, e.g. ``vlp ablate CONFIG`` in each of its runs."""
    if passed_on := os.environ.get(COMMAND):
        return shlex.split(passed_on)
    program, *arguments = sys.argv
    is_vlp = Path(program).name == "vlp" or Path(program).parts[-2:] == ("vlp", "cli.py")
    return ["vlp", *arguments] if is_vlp else ["python", program, *arguments]


@cache
def commit() -> str:
    """Return the git commit of vlp's checkout, with ``+changes`` if vlp or configs differ from it. Empty if there is none.

    An installed vlp has no commit, also if it is installed inside a checkout of another project.
    """
    top, _, head = _git("rev-parse", "--show-toplevel", "HEAD").partition("\n")
    if not head or Path(top) != CHECKOUT:
        return ""
    return head + ("+changes" if _git("status", "--porcelain", "--", "vlp", "configs") else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):  # git is not installed, or the file system hangs
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def origin() -> dict[str, str | list[str]]:
    """Return the entries of starts.jsonl and of results that say how they were made."""
    return {"command": command_line(), "vlp": __version__, "commit": commit()}
