"""Memory of the ranks of 5,000 pictures and 25,000 captions, both ways, and what the whole matrix of scores would take."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import torch

from vlp.tasks.metrics import ranks

IMAGES, CAPTIONS, WIDTH, THREADS = 5_000, 25_000, 512, 1


def measure() -> dict:
    """In a process of its own: the peak is that of the process."""
    torch.set_num_threads(THREADS)
    before, began = resident_mib("VmRSS"), time.process_time()
    torch.manual_seed(0)
    images, texts = torch.randn(IMAGES, WIDTH), torch.randn(CAPTIONS, WIDTH)
    image_ids = torch.arange(IMAGES)
    text_ids = image_ids.repeat_interleave(CAPTIONS // IMAGES)
    i2t = ranks(images, texts, image_ids, text_ids)
    t2i = ranks(texts, images, text_ids, image_ids)
    return {
        "images": len(i2t),
        "captions": len(t2i),
        "peak_growth_mib": round(resident_mib("VmHWM") - before, 1),
        "whole_matrix_mib": round(IMAGES * CAPTIONS * 4 / 2**20, 1),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def resident_mib(field: str) -> float:
    """Of this process: VmRSS now, VmHWM at its peak (Linux)."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024


if __name__ == "__main__":
    print(json.dumps(measure()))
