"""``python -m results``: render the page. ``python -m results record NAME RUN ...``: make a record first."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from results.page import PAGE, ROOT, read_records, write_page
from results.quotes import find_quotes, mistakes
from results.record import NAME, make_record
from vlp.errors import UserError
from vlp.files import write_atomically


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the command. Return its exit code, 1 if a text quotes a number that its record does not have."""
    options = build_parser().parse_args(arguments)
    os.chdir(root)  # commands and paths of a record start from the checkout
    try:
        if options.command == "record":
            record(options, root)
    except UserError as e:
        print(f"results: {e}", file=sys.stderr)
        return 2
    write_page(root)
    print(f"wrote {PAGE}")
    records = read_records()
    wrong = [line for quote in find_quotes() for line in mistakes(quote, records)]
    for line in wrong:
        print(f"results: {line}; correct the text", file=sys.stderr)
    return 1 if wrong else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m results", description="Render docs/results.md from all records.")
    commands = parser.add_subparsers(dest="command", metavar="record")
    make = commands.add_parser("record", help="make the record of finished runs, and render the page")
    make.add_argument("name", metavar="NAME", help="name of the record, results/NAME.json; an existing one is replaced")
    make.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=lambda path: Path(path).absolute(),
        help="runs of one experiment with different seeds, or the folder of an ablation",
    )
    make.add_argument("--title", default="", help="default: the first sentence of the config's docstring")
    make.add_argument("--metrics", nargs="+", default=(), help="EVALUATION/METRIC (default: of the ablation, or all)")
    make.add_argument(
        "--curves", nargs="+", default=(), help="numbers of eval.jsonl or log.jsonl to draw over the steps"
    )
    make.add_argument("--note", default="", help="remark for the reader: what the numbers do not say")
    make.add_argument(
        "--commands", nargs="+", default=(), metavar="LINE", help="default: those that the runs and evaluations name"
    )
    return parser


def record(options: argparse.Namespace, root: Path) -> None:
    """Write the record.

    Raises:
        UserError: If its name cannot be part of a link, or as `make_record` raises it.
    """
    if not NAME.fullmatch(options.name):
        raise UserError(f"{options.name!r} is not a name; use lower-case letters, digits and . _ -")
    made = make_record(
        options.runs,
        title=options.title,
        metrics=options.metrics,
        curves=options.curves,
        commands=options.commands,
        note=options.note,
        warn=lambda line: print(f"results: {line}", file=sys.stderr),
    )
    write_atomically(root / "results" / f"{options.name}.json", made.dump().encode())
    print(f"wrote results/{options.name}.json")


if __name__ == "__main__":
    sys.exit(main())
