"""Options of the commands that open a run whose experiment has code of the user's own."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlp.errors import UserError


def add_code_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        dest="code_config",
        metavar="CONFIG",
        help="config whose own classes the run is made of, FILE.py or FILE.py:NAME",
    )
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="run the copy of the user's code in RUN/code; only for folders that you trust",
    )


def read_code(options: argparse.Namespace, run: Path):
    """Return the `vlp.specs.user_code.UserCode` that the options name.

    Args:
        options: Parsed options of `add_code_options`.
        run: Folder with the experiment.json that is opened.

    Raises:
        UserError: If both options are given, or the code cannot be imported.
    """
    from vlp.specs.user_code import NO_CODE, code_of_config, code_of_run

    if options.code_config and options.trust_code:
        raise UserError("--config and --trust-code name two sources of the same classes; give one of them")
    if options.code_config:
        return code_of_config(options.code_config)
    return code_of_run(run / "experiment.json") if options.trust_code else NO_CODE
