"""vlp: vision-language pre-training research in one loop.

``vlp.load`` opens a trained model. The data flow, from a shard to an optimizer step, is drawn in README.md ("How it fits
together").
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlp.loading.api import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"

# On a CPU, the threads of torch spin while they wait for each other. If another process takes one of their cores, all of them
# burn theirs until that thread is back, and a step takes several times as long. With this setting they spin only for the
# short gaps between two operations, and then sleep. It is read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")


def __getattr__(name: str) -> Any:
    """Import `vlp.loading.api.load` on first use, so that ``import vlp`` does not import torch."""
    if name == "load":
        from vlp.loading.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
