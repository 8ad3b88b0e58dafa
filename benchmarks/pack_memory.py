"""Peak memory of `vlp data pack` on a file of millions of lines or JSON records, which must not become a list in memory.

All but a few of the lines name images that do not exist, so that the measure takes minutes and no disk. For the memory of
the command such a line is the more expensive one: it becomes a pair, and also an entry of quarantine.jsonl.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from PIL import Image

from benchmarks.common import main

SIZES = {"lines": 5_000_000, "images": 1_000_000}
SMALL = {"lines": 50, "images": 20}
GOAL_MB = 500
CAPTION = "a caption of an ordinary length, number {}"
PROGRAM = """
import re, resource, sys
from vlp.cli import main
code = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)
print(code, peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def measure(lines: int, images: int) -> dict:
    """Measure files of captions of different images, and of fewer images whose captions are far from each other."""
    found: dict = {"lines": lines, "goal_mb": GOAL_MB}
    for form, count in (("lines", lines), ("lines", images), ("list", lines), ("list", images), ("coco", images)):
        found[f"{form}, {count} images"] = pack(lines, count, FORMS[form])
    return found


def write_lines(file: TextIO, lines: int, images: int) -> None:
    for n in range(lines):
        file.write(json.dumps({"image": f"image-{n % images}.png", "caption": CAPTION.format(n)}) + "\n")


def write_list(file: TextIO, lines: int, images: int) -> None:
    records = ({"image": f"image-{n % images}.png", "caption": CAPTION.format(n)} for n in range(lines))
    write_array(file, records)


def write_coco(file: TextIO, lines: int, images: int) -> None:
    file.write('{"info": {}, "images": ')
    write_array(file, ({"id": n, "file_name": f"image-{n}.png", "width": 640} for n in range(images)))
    file.write(', "annotations": ')
    write_array(file, ({"id": n, "image_id": n % images, "caption": CAPTION.format(n)} for n in range(lines)))
    file.write("}")


def write_array(file: TextIO, records: Iterator[dict]) -> None:
    for number, record in enumerate(records):
        file.write(("," if number else "[") + json.dumps(record))
    file.write("]")


FORMS = {"lines": write_lines, "list": write_list, "coco": write_coco}


def pack(lines: int, images: int, write: Callable[[TextIO, int, int], None]) -> dict:
    """Pack ``lines`` captions of ``images`` images in a process of its own and return its peak, and that of its workers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.new("RGB", (8, 8)).save(folder / "image-0.png")
        # JSON in lines and in one document are told apart by their content
        annotations = folder / "all.json"
        with open(annotations, "w") as file:
            write(file, lines, images)
        began = time.monotonic()
        command = ["data", "pack", annotations, folder / "out", "--shard-samples", 10_000, "--workers", 1]
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
