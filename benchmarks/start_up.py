"""CPU time until ``import vlp`` is done, and until ``vlp --help`` has answered."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

from benchmarks.common import main

SIZES = {"repeats": 20}
SMALL = {"repeats": 1}


def measure(repeats: int) -> dict:
    """Return median CPU seconds of a Python process, user and system, less those of an empty one."""
    empty = cpu_seconds(["-c", ""], repeats)
    return {
        "repeats": repeats,
        "empty_process_seconds": round(empty, 3),
        "import_seconds": round(cpu_seconds(["-c", "import vlp"], repeats) - empty, 3),
        "import_goal_seconds": 0.1,
        "help_seconds": round(cpu_seconds(["-m", "vlp.cli", "--help"], repeats) - empty, 3),
        "help_goal_seconds": 0.5,
    }


def cpu_seconds(arguments: list[str], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(times)


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
