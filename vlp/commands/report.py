"""``vlp report``: write a run's report, or a page that compares several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlp.files import local_path


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "report", help="write RUN/report.html, or a page that compares several runs: vlp report runs/*"
    )
    parser.add_argument("folders", metavar="RUN", nargs="+", type=local_path)
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

    if len(options.folders) > 1 or options.output or not (options.folders[0] / "experiment.json").exists():
        path = write_comparison(options.folders, options.output or Path("runs/comparison"))
    else:
        path = write_report(options.folders[0])
    print(f"wrote {path}")
    return 0
