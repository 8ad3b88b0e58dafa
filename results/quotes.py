"""Compare the numbers that configs, README and docs quote from a record with the record."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from results.page import PAGE, ROOT, section
from results.record import Record
from vlp.commands.configs import read_sections

IN_DOCSTRING = re.compile(r"\(results: ([\w.-]+)\)")
IN_MARKDOWN = re.compile(r"\[([^\]]*)\]\([\w./]*results\.md#([\w.-]+)\)")
COMMAND = re.compile(r"`[^`]*`|\((?:vlp|python|make) [^)]*\)")
# not a part of a name such as R@1 or Flickr8k
NUMBER = re.compile(r"(?<![\w@.,/=-])-?\d(?:[\d,]*\d)?(?:\.\d+)?(?:e-?\d+)?(?![\w@])")


@dataclass(frozen=True)
class Quote:
    """Numbers of a text that refer to a record.

    Args:
        path: File of the text.
        name: Name of the record.
        numbers: Numbers as written: in a docstring from the start of the section or from the reference before, on a
            Markdown page those of the link.
    """

    path: Path
    name: str
    numbers: tuple[str, ...]


def find_quotes() -> list[Quote]:
    """Return the quotes of all docstrings of configs, of README and of docs."""
    configs = sorted((ROOT / "configs").rglob("*.py"))
    pages = [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").glob("*.md")) if path != ROOT / PAGE)]
    return [quote for path in configs for quote in of_config(path)] + [q for path in pages for q in of_page(path)]


def of_config(path: Path) -> Iterator[Quote]:
    """Return the quotes of the docstrings of a config and of its functions."""
    tree = ast.parse(path.read_text())
    for node in [tree, *(node for node in tree.body if isinstance(node, ast.FunctionDef))]:
        for lines in read_sections(ast.get_docstring(node) or "").values():
            text, start = " ".join(lines), 0
            for found in IN_DOCSTRING.finditer(text):
                yield Quote(path, found[1], _numbers(text[start : found.start()]))
                start = found.end()


def of_page(path: Path) -> Iterator[Quote]:
    """Return the quotes of a Markdown page, e.g. ``[32.4 %](results.md#demo)``."""
    for text, name in IN_MARKDOWN.findall(path.read_text()):
        yield Quote(path, name, _numbers(text))


def _numbers(text: str) -> tuple[str, ...]:
    return tuple(NUMBER.findall(COMMAND.sub("", text)))


def mistakes(quote: Quote, records: dict[str, Record]) -> list[str]:
    """Return a line for each number that the record does not have, also rounded to the decimals of the quote."""
    where = quote.path.relative_to(ROOT)
    if quote.name not in records:
        return [f"{where} quotes a record {quote.name}, which does not exist"]
    recorded = [_value(number) for number in NUMBER.findall(section(quote.name, records[quote.name]))]
    return [f"{where} quotes {number} from {quote.name}" for number in quote.numbers if not _has(recorded, number)]


def _has(recorded: list[float], quoted: str) -> bool:
    decimals = len(quoted.partition(".")[2])
    return any(value == _value(quoted) or (decimals and f"{value:.{decimals}f}" == quoted) for value in recorded)


def _value(number: str) -> float:
    return float(number.replace(",", ""))
