"""Memory and time of uniformity on 50,000 x 512, forward and backward: ``python -m benchmarks.uniformity_memory``.

Peak growth (MiB) is the peak resident memory of the process minus its resident memory once the embeddings exist: their
gradient (98 MiB), the tile of distances, and the libraries' work space. The whole matrix of distances is what
``torch.pdist`` or ``x @ x.T`` would hold, without what autograd keeps of it.
"""

from __future__ import annotations

import time

import torch

from benchmarks.common import main, resident_mib
from vlp.losses.geometry import uniformity

THREADS = 1
SIZES = {"rows": 50_000, "width": 512}
SMALL = {"rows": 300, "width": 16}


def measure(rows: int, width: int) -> dict:
    """In a process of its own: the peak is that of the process."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    x = torch.randn(rows, width)
    x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True)).requires_grad_()  # in place: no copy raises the peak
    before, cpu = resident_mib("VmRSS"), time.process_time()
    value = uniformity(x)
    value.backward()
    return {
        "shape": [rows, width],
        "threads": THREADS,
        "value": round(value.item(), 5),
        "peak_growth_mb": round(resident_mib("VmHWM") - before, 1),
        "goal_mb": 300,
        "whole_matrix_mb": round(rows**2 * 4 / 2**20),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
