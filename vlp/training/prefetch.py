"""Copies batches to a GPU while it computes the step before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from vlp.data.stream import Loaded


def on_device(micro_batches: Iterator[Loaded], device: torch.device) -> Iterator[Loaded]:
    """Yield the micro-batches on a device, in their order.

    For a GPU the next one is copied on a stream of its own before the current one is yielded. The copy is asynchronous, since
    the loader has pinned the memory.
    """
    if device.type != "cuda":
        for loaded in micro_batches:
            yield replace(loaded, batch=loaded.batch.to(device))
        return
    stream = torch.cuda.Stream(device)

    def copied(loaded: Loaded | None) -> Loaded | None:
        with torch.cuda.stream(stream):
            return loaded and replace(loaded, batch=loaded.batch.to(device))

    def in_use(tensor: torch.Tensor) -> torch.Tensor:
        # the allocator must not give the memory away before the stream that computes has read it
        tensor.record_stream(torch.cuda.current_stream(device))
        return tensor

    upcoming = copied(next(micro_batches, None))
    while upcoming is not None:
        torch.cuda.current_stream(device).wait_stream(stream)
        current = replace(upcoming, batch=upcoming.batch.map(in_use))
        upcoming = copied(next(micro_batches, None))
        yield current
