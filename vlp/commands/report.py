"""``vlp report``: write a run's report, or a page that compares several runs."""

from __future__ import annotations

import argparse
import os
import sys

from vlp.errors import UserError
from vlp.files import local_path


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "report",
        help="write RUN/report.html, or a page that compares several runs",
        epilog="example: vlp report runs/demo runs/mine --output runs/comparison",
    )
    parser.add_argument("folders", metavar="RUN", nargs="+")
    parser.add_argument(
        "--output",
        type=local_path,
        metavar="FOLDER",
        help="folder of the page that compares several runs (default: runs/comparison)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from vlp.report.comparison import write_comparison
    from vlp.report.run import write_report

    if remote := next((name for name in options.folders if "://" in name), None):
        raise UserError(f"{remote} is a URL; copy the run to this machine and name its folder")
    folders, notes = [local_path(folder) for folder in options.folders], []
    if len(folders) > 1 or options.output or not os.path.exists(folders[0] / "experiment.json"):
        path = write_comparison(folders, local_path(options.output or "runs/comparison"), notes)
    else:
        path = write_report(folders[0], notes)
    for note in notes:
        print(f"vlp: {note}", file=sys.stderr)
    print(f"wrote {path}")
    return 0
