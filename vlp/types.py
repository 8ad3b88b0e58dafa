"""The tensors that travel together.

B batch, N tokens, P image tokens, L text tokens, D width, E embedding, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Batch:
    """What one step of one process sees.

    Args:
        image: (B, 3, H, W) uint8 as it leaves the loader; float32 and normalised once `Preprocess.normalise` has run.
        input_ids: (B, L) int64, padded to the longest row of the batch.
        attention_mask: (B, L) bool, True where there is a token.
        index: (B,) int64; rows with an equal index show the same image and are positives of each other.
        keys: B names ``source/number/key`` (the sample's number within its source) for logs and error messages; they never reach a device.
    """

    image: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    index: Tensor
    keys: Sequence[str] = ()

    def to(self, device: torch.device) -> Batch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in moved.items()})

    def __len__(self) -> int:
        return len(self.index)


@dataclass
class Encoded:
    """One modality after its tower.

    Args:
        tokens: (B, N, D) last hidden states, the pooled token first.
        mask: (B, N) bool, True where there is a token.
        embed: (B, E) unit-norm projection.
    """

    tokens: Tensor
    mask: Tensor
    embed: Tensor

    def __getitem__(self, rows: Tensor) -> Encoded:
        return Encoded(self.tokens[rows], self.mask[rows], self.embed[rows])
