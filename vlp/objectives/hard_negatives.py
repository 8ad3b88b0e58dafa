"""Hard negatives: sample rows that are easily mistaken for a row, and collect their encodings from wherever they are.

B rows of a bundle, M candidate rows, N tokens, D width, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.distributed import gather, world_size
from vlp.encoders.ragged import bound_lengths
from vlp.forward import Bundle, Gathered
from vlp.losses.inputs import in_float32
from vlp.types import Encoded


@torch.no_grad()
@in_float32
def detached_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Compute (B, M) cosines of (B, E) and (M, E) embeddings of unit norm, without gradient."""
    return a @ b.T


@torch.no_grad()
def sample_hard_negatives(
    similarity: Tensor, candidates: Tensor, epsilon: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Sample one candidate per row, with probability proportional to ``softmax(similarity) + epsilon`` over candidates.

    Takes the largest score after adding Gumbel noise, for all rows at once and without a host-device sync. Scores stay
    logarithms, so that candidates are sampled in the right proportion even if all probabilities underflow in float32.

    Args:
        similarity: (B, M) already divided by the temperature.
        candidates: (B, M) bool. The result of a row without a candidate is meaningless.
        epsilon: Above 0, dissimilar candidates are sampled as well (BLIP's is 1e-4).
        generator: On the device of the scores; None uses the default generator.

    Returns:
        (B,) int64.
    """
    scores = similarity.float().masked_fill(~candidates, -torch.inf)  # (B, M)
    if epsilon:
        scores = (scores.softmax(1) + epsilon).log()
    gumbel = -torch.empty_like(scores).exponential_(generator=generator).log()
    return (scores + gumbel).masked_fill(~candidates, -torch.inf).argmax(1)


def draw_hard(similarity: Tensor, share: float) -> Tensor:
    """Draw which rows sample their negative by similarity, each with probability ``share``, without a host-device sync.

    Args:
        similarity: (n, M).
        share: From 0 to 1. At 0 and 1 no random numbers are drawn.

    Returns:
        (n,) bool.
    """
    if share in (0, 1):
        return torch.full((len(similarity),), bool(share), device=similarity.device)
    return torch.rand(len(similarity), device=similarity.device) < share


def gather_encodings(
    candidates: Gathered, encoded: Callable[[Bundle], Encoded], rows: Tensor, longest: int | None
) -> Encoded:
    """Collect encodings of rows that other micro-batches or processes may have computed, with gradient.

    Only the tokens that fusion reads are collected, `Encoded.fusible`, padded to ``longest``.

    Args:
        candidates: The rows that can be drawn.
        encoded: Selects the encodings of a bundle: ``lambda bundle: bundle.text``.
        rows: (n,) int64 positions among the candidates.
        longest: N, at least that of the encodings of every process. None finds the largest, at the cost of one host-device
            sync.

    Returns:
        n rows.
    """
    own = max(encoded(bundle).fusible.shape[1] for bundle in candidates.bundles)
    if candidates.scope == "local" or world_size() == 1:
        longest = own
    elif longest is None:
        longest = int(gather(torch.tensor([own], device=rows.device)).max())

    def tokens(bundle: Bundle) -> Tensor:
        x = encoded(bundle).fusible
        return F.pad(x, (0, 0, 0, longest - x.shape[1]))  # (B, longest, D)

    def mask(bundle: Bundle) -> Tensor:
        x = encoded(bundle).mask.byte()  # not every backend sends bools
        return F.pad(x, (0, longest - x.shape[1]))

    fusible = candidates.gather(tokens)[rows]  # (n, longest, D)
    early_fusion = any(encoded(bundle).inputs is not None for bundle in candidates.bundles)
    return Encoded(
        fusible,
        bound_lengths(candidates.gather(mask)[rows].bool(), np.full(len(rows), longest)),
        candidates.gather(lambda bundle: encoded(bundle).embed)[rows],
        fusible if early_fusion else None,
    )
