"""``vlp``: the command line. A user's mistake ends with one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import errno
import os
import sys

from vlp import __version__
from vlp.commands import (
    ablate,
    completion,
    configs,
    data,
    doctor,
    evaluate,
    gradcam,
    plan,
    report,
    runs,
    serve,
    show,
    train,
)
from vlp.data.workers import why_a_worker_ended
from vlp.errors import UserError
from vlp.specs.origin import commit

# in the order of `vlp --help`
COMMANDS = (train, evaluate, gradcam, ablate, runs, report, serve, show, configs, data, plan, doctor, completion)
# errors of a full, read-only or forbidden disk, which any write can meet
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code.

    Args:
        arguments: Words after ``vlp``. The default is ``sys.argv[1:]``.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers tokenize in parallel already
    try:
        options = build_parser().parse_args(arguments)
        return options.run(options)
    except UserError as e:
        print(f"vlp: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    except OSError as e:
        if e.errno == errno.ENAMETOOLONG:
            print(f"vlp: {str(e.filename)[:80]}...: {e.strerror}; give a shorter path", file=sys.stderr)
            return 2
        if e.errno not in DISK_ERRORS:
            raise
        where = f"{e.filename}: " if e.filename else ""
        print(f"vlp: {where}{e.strerror}; free some space, or choose a folder that you can write to", file=sys.stderr)
        return 2
    except RuntimeError as e:
        if (reason := why_a_worker_ended(e)) is None:
            raise
        print(f"vlp: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vlp: interrupted", file=sys.stderr)
        return 130


class Version(argparse.Action):
    """Print the version, and the commit of a checkout, which needs a call of git."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        print(f"vlp {__version__}" + (f", commit {found}" if (found := commit()) else ""))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlp",
        description="Vision-language pre-training.",
        epilog="example: vlp train configs/align/demo.py; vlp COMMAND --help has an example of each command",
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and the commit, and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
