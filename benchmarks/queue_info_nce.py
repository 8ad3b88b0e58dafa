"""InfoNCE with MoCo's queue against its bare matrix products: ``python -m benchmarks.queue_info_nce``.

The products are the logits, the gradient of the queries (both among 256 keys and 65,536 queue rows) and the gradient of
the 256 keys; the queue gets none. The ratio is of CPU times, the best of some rounds in which the forms take turns.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from benchmarks.common import main
from vlp.losses.softmax import info_nce
from vlp.losses.tiled import queue_info_nce, tiled_info_nce

SCALE, THREADS = 1 / 0.07, 1
SIZES = {"rows": 256, "queue_rows": 65_536, "width": 128, "rounds": 9}
SMALL = {"rows": 8, "queue_rows": 100, "width": 16, "rounds": 2}


def measure(rows: int, queue_rows: int, width: int, rounds: int) -> dict:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    queries, keys = (F.normalize(torch.randn(rows, width), dim=1).requires_grad_() for _ in range(2))
    queue, scale = F.normalize(torch.randn(queue_rows, width), dim=1), torch.tensor(SCALE, requires_grad=True)
    ids, queue_ids = torch.arange(rows), torch.arange(rows, rows + queue_rows)
    every_key, every_id = torch.cat([keys.detach(), queue]), torch.cat([ids, queue_ids])
    grad = torch.rand(rows, rows + queue_rows)

    def products():
        query, key = queries.detach(), keys.detach()
        return query @ every_key.T, grad @ every_key, grad[:, :rows].T @ key

    def whole(loss):
        return lambda: loss(queries, torch.cat([keys, queue]), scale, ids, every_id)

    forms = {
        "queue_info_nce": lambda: queue_info_nce(queries, keys, queue, scale, ids, ids, queue_ids),
        "tiled_info_nce": whole(tiled_info_nce),
        "info_nce": whole(info_nce),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("products", *forms)}
    for _ in range(rounds):
        began = time.process_time()
        products()
        seconds["products"].append(time.process_time() - began)
        for name, loss in forms.items():
            began = time.process_time()
            torch.autograd.grad(loss(), (queries, keys, scale))
            seconds[name].append(time.process_time() - began)
    best = {name: min(values) for name, values in seconds.items()}
    return {
        "queries": rows,
        "queue": queue_rows,
        "width": width,
        "threads": THREADS,
        "products_ms": round(1000 * best["products"], 1),
        "ratio": round(best["queue_info_nce"] / best["products"], 3),
        "goal": 1.3,
        "ratio_tiled_info_nce": round(best["tiled_info_nce"] / best["products"], 3),
        "ratio_info_nce": round(best["info_nce"] / best["products"], 3),
    }


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
