"""Count the places where the host would wait for a GPU, on a CPU, by the operations that read values of tensors."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import ROOT

aten = torch.ops.aten
# Operations that return numbers to the host, or whose shapes depend on values.
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero, aten.masked_select, aten._unique2}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


@contextmanager
def host_reads() -> Iterator[Counter]:
    """Count host-device syncs: line of vlp -> number.

    Only numpy arrays and Python numbers are on the host. A tensor counts as one of the device, even if it is not.
    """
    found: Counter = Counter()
    with watching(lambda: found.update([place()])):
        yield found


@contextmanager
def watching(note: Callable[[], None]) -> Iterator[None]:
    """Call ``note`` for each host-device sync."""

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            packet = function.overloadpacket
            if packet in WAITING or packet in INDEXING and _selects_by_mask(*args):
                note()
            return function(*args, **(kwargs or {}))

    def counted(method: Callable) -> Callable:
        def read(tensor: Tensor, *args, **kwargs):
            note()
            return method(tensor, *args, **kwargs)

        return read

    with (
        patch.object(Tensor, "tolist", counted(Tensor.tolist)),
        patch.object(Tensor, "cpu", counted(Tensor.cpu)),
        Reads(),
    ):
        yield


def _selects_by_mask(tensor: Tensor, indices: list[Tensor | None], values: Tensor | None = None, *_) -> bool:
    """Return whether an index is a mask. Writing a single number by a mask needs no sync."""
    is_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
    return is_mask and (values is None or values.numel() > 1)


def place() -> str:
    """Return the innermost running line of vlp, as FILE:LINE in FUNCTION."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(str(ROOT / "vlp")):
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno} in {frame.name}"
    return "elsewhere"
