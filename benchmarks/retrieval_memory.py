"""Memory of the ranks of 5,000 pictures and 25,000 captions, both ways, and what the whole matrix of scores would take."""

from __future__ import annotations

import time

import torch

from benchmarks.common import main, resident_mib
from vlp.tasks.metrics import ranks

THREADS = 1
SIZES = {"images": 5_000, "captions": 25_000, "width": 512}
SMALL = {"images": 50, "captions": 250, "width": 16}


def measure(images: int, captions: int, width: int) -> dict:
    """In a process of its own: the peak is that of the process."""
    torch.set_num_threads(THREADS)
    before, began = resident_mib("VmRSS"), time.process_time()
    torch.manual_seed(0)
    x, y = torch.randn(images, width), torch.randn(captions, width)
    image_ids = torch.arange(images)
    text_ids = image_ids.repeat_interleave(captions // images)
    i2t = ranks(x, y, image_ids, text_ids)
    t2i = ranks(y, x, text_ids, image_ids)
    return {
        "images": len(i2t),
        "captions": len(t2i),
        "peak_growth_mib": round(resident_mib("VmHWM") - before, 1),
        "whole_matrix_mib": round(images * captions * 4 / 2**20, 1),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
