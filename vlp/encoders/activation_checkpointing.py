"""Activations that the backward pass makes again instead of finding them kept.

"cheap" keeps what matrix products and attention gave and makes everything between them again: norms, activation functions,
residual sums. Of a ViT's block that is a third less memory for no measurable time. "full" keeps each block's input alone,
and pays for a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = Literal["none", "cheap", "full"]

# Operations whose results "cheap" keeps, by name, since not every build of torch has all of them. Batched products (bmm)
# are not among them: they are attention where torch has no fused kernel (on a CPU, with biases that take a gradient), and
# the scores take more memory than it takes time to compute them again.
SAVED = {"aten::mm", "aten::addmm", "aten::convolution", "aten::_scaled_dot_product_flash_attention_for_cpu"}
SAVED |= {f"aten::_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")}


def checkpointed(part: Callable[..., Any], how: Checkpointing, *given, **named) -> Any:
    """``part(*given, **named)``, of which only that is kept for the backward pass that ``how`` says."""
    if how == "none" or not torch.is_grad_enabled():
        return part(*given, **named)
    if how == "cheap":
        part = partial(_uncached, part)
        named["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(part, *given, use_reentrant=False, **named)


def _uncached(part: Callable[..., Any], *given, **named) -> Any:
    """Autocast keeps a weight's bfloat16 copy for its next use, so that a second pass makes none. The backward pass then would,
    and "cheap" counts operations: both times they must be the same."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return part(*given, **named)
    finally:
        torch.set_autocast_cache_enabled(cached)


def _policy(context, operation, *given, **named) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation.name() in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_blocks(blocks: Iterable[nn.Module], how: Checkpointing) -> None:
    """From now on the blocks run as ``how`` says."""
    for block in blocks:
        vars(block).pop("forward", None)
        if how != "none":
            block.forward = partial(checkpointed, block.forward, how)
