"""Peak memory of `vlp data pack` on a file of millions of lines, which must not become a list in memory.

All but a few of the lines name images that do not exist, so that the measure takes minutes and no disk. For the memory of
the command such a line is the more expensive one: it becomes a pair, and also an entry of quarantine.jsonl.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from benchmarks.common import main

SIZES = {"lines": 5_000_000, "images": (5_000_000, 1_000_000)}
SMALL = {"lines": 50, "images": (50, 20)}
GOAL_MB = 500
PROGRAM = """
import re, resource, sys
from vlp.cli import main
code = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)
print(code, peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def measure(lines: int, images: tuple[int, ...]) -> dict:
    """Measure one file of captions of different images, and one in which the captions of an image are far from each other."""
    return {"lines": lines, "goal_mb": GOAL_MB} | {f"{count} images": pack(lines, count) for count in images}


def pack(lines: int, images: int) -> dict:
    """Pack ``lines`` lines about ``images`` images in a process of its own and return its peak, and that of its workers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.new("RGB", (8, 8)).save(folder / "image-0.png")
        with open(folder / "all.jsonl", "w") as file:
            for n in range(lines):
                caption = f"a caption of an ordinary length, number {n}"
                file.write(json.dumps({"image": f"image-{n % images}.png", "caption": caption}) + "\n")
        began = time.monotonic()
        command = ["data", "pack", folder / "all.jsonl", folder / "out", "--shard-samples", 10_000, "--workers", 1]
        words = [sys.executable, "-c", PROGRAM, *map(str, command)]
        printed = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        code, own, workers = map(int, printed[-1].split())
        manifest = json.loads((folder / "out" / "manifest.json").read_text())
        assert code == 0 and manifest["samples"] + manifest["left_out"] == images
    return {
        "peak_mb": round(own * 1024 / 1e6),
        "peak_of_a_worker_mb": round(workers * 1024 / 1e6),
        "seconds": round(time.monotonic() - began),
    }


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
