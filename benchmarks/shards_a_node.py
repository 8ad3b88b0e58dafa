"""Shards that each node touches, for the same global order on 1, 2, 4 and 8 nodes, with and without canonical readers."""

from __future__ import annotations

import math

from benchmarks.common import main
from vlp.data.order import MixtureOrder, SourceOrder
from vlp.data.stream import Positions

SIZES = {"shards": 852, "samples": 1000, "steps": 200, "batch": 4096, "readers": 64, "nodes": (1, 2, 4, 8)}
SMALL = {"shards": 16, "samples": 10, "steps": 5, "batch": 32, "readers": 8, "nodes": (1, 2)}


def measure(shards: int, samples: int, steps: int, batch: int, readers: int, nodes: tuple[int, ...]) -> dict:
    """Count the shards by walking through the order of the first ``steps`` batches."""
    touched = {}
    for number in (1, readers):
        order = MixtureOrder([SourceOrder([samples] * shards, 0, number)], [None], 0)
        shard_of = [order.locate(position).shard for position in range(steps * batch)]
        touched[f"readers={number}"] = {
            f"{count} nodes": max(_of_node(shard_of, batch, node, count, number) for node in range(count))
            for count in nodes
        }
    share = {f"{count} nodes": math.ceil(shards / count) + 1 for count in nodes}
    return {"shards": shards, "steps": steps, "batch": batch, "most_shards_of_a_node": touched, "goal": share}


def _of_node(shard_of: list[int], batch: int, node: int, nodes: int, readers: int) -> int:
    positions = Positions(0, len(shard_of), batch, node, nodes, readers)
    return len({shard_of[position] for part in positions for position in part})


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
