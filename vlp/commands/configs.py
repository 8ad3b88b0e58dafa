"""``vlp configs``: list the configs that come with vlp, with paper, cost and expected numbers from their docstrings.

The docstring of a config file is its lab notebook. Its first sentence says what the config trains. After it, lines that
begin with a word and a colon start a section, which continues on the indented lines below:

    Paper:    citation, and the numbers that it states
    Data:     what is trained on, and the commands that make it
    As published: what follows the published code or paper where that matters
    Differs:  what does not
    Cost:     time and hardware, here or in the paper
    Measured: numbers, each with the command that printed it, or with (results: NAME) for results/NAME.json
    Command:  what to type

The functions of the file that return an experiment are its variants. The docstring of a function has the same form. Its
sections take the place of the file's, and what it leaves out is as in the file.

Files are read, never run.
"""

from __future__ import annotations

import argparse
import ast
import re
from dataclasses import dataclass
from pathlib import Path

from vlp.errors import UserError
from vlp.files import local_path

KINDS = ("Experiment", "Stages", "Ablation")
LISTED = ("Paper", "Cost", "Measured", "Command")


@dataclass(frozen=True)
class Entry:
    """One config that can be trained.

    Args:
        config: What to give to a command: ``FILE.py`` or ``FILE.py:NAME``.
        summary: First sentence of the docstring.
        sections: Name of a section -> its lines.
    """

    config: str
    summary: str
    sections: dict[str, list[str]]


def add_parser(commands) -> None:
    configs = commands.add_parser(
        "configs",
        help="list the configs that come with vlp: paper, cost, expected numbers",
        epilog="example: vlp configs albef flickr8k",
    )
    configs.add_argument(
        "words", nargs="*", metavar="WORD", help="list only the configs whose entry has all these words"
    )
    configs.add_argument("--folder", type=local_path, help="list the configs of this folder (default: vlp's own)")
    configs.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    folder = options.folder or Path(__file__).resolve().parents[2] / "configs"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; the configs are in the source checkout, give --folder CHECKOUT/configs")
    entries = [entry for path in sorted(folder.rglob("*.py")) for entry in read_entries(path)]
    texts = [to_text(entry) for entry in entries]
    wanted = [text for text in texts if all(word.lower() in text.lower() for word in options.words)]
    if not wanted:
        raise UserError(f"no config in {folder} has {' and '.join(options.words) or 'a function that returns one'}")
    print("\n\n".join(wanted))
    return 0


def read_entries(path: Path) -> list[Entry]:
    """Return the entries of a file: one for each function annotated to return an Experiment, Stages or an Ablation.

    Raises:
        UserError: If the file has a syntax error.
    """
    try:
        tree = ast.parse(path.read_text())
    except SyntaxError as e:
        raise UserError(f"{path}: {e}") from None
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    of_file = ast.get_docstring(tree) or ""
    entries = []
    for node in tree.body:
        returns = (
            ast.unparse(node.returns).rpartition(".")[2] if isinstance(node, ast.FunctionDef) and node.returns else ""
        )
        if returns not in KINDS or node.args.args:
            continue
        own = ast.get_docstring(node) or ""
        summary = read_summary(own or of_file)
        config = str(shown) if node.name == "config" else f"{shown}:{node.name}"
        entries.append(Entry(config, summary, read_sections(of_file) | read_sections(own)))
    return entries


def read_summary(docstring: str) -> str:
    """Return the first sentence of a docstring, or its first paragraph if no sentence ends in it."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[a-z0-9)%][.])\s+(?=[A-Z])", paragraph)[0]


def read_sections(docstring: str) -> dict[str, list[str]]:
    """Return the lines of each section of a docstring by the section's name."""
    sections: dict[str, list[str]] = {}
    name = None
    for line in docstring.splitlines():
        if found := re.match(r"([A-Z][A-Za-z ]*): *(.*)", line):
            name = "Command" if found[1] == "Commands" else found[1]
            sections[name] = [found[2]]
        elif name and line.startswith("  "):
            sections[name].append(line.strip())
        else:
            name = None
    return sections


def to_text(entry: Entry) -> str:
    lines = [entry.config, f"    {entry.summary}"]
    for name in LISTED:
        first, *more = entry.sections.get(name, [""])
        if first or more:
            lines += [f"    {name + ':':<10}{first}", *(f"{'':14}{line}" for line in more)]
    return "\n".join(lines)
