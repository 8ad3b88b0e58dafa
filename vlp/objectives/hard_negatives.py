"""Hard negatives: which other rows a row is mistaken for, and their encodings, wherever these were made.

B rows of this bundle, M rows that can be drawn, N tokens, D width, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.distributed import gather
from vlp.forward import Among, Forward
from vlp.types import Encoded


@torch.no_grad()
def sample_hard_negatives(
    similarity: Tensor, candidates: Tensor, epsilon: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """One candidate a row, with probability proportional to ``softmax(similarity) + epsilon`` over the row's candidates.

    By the largest of scores with Gumbel noise: all rows at once, and nothing waits for the device. The scores stay
    logarithms, so that a row keeps its candidates where all of their probabilities would be 0 in float32.

    Args:
        similarity: (B, M) divided by the temperature already.
        candidates: (B, M) bool; a row may have none, and then its number means nothing.
        epsilon: above 0 the dissimilar ones are drawn, too (BLIP's is 1e-4).
        generator: on the device of the scores; None = torch's own.

    Returns:
        (B,) int64.
    """
    scores = similarity.float().masked_fill(~candidates, -torch.inf)
    if epsilon:
        scores = (scores.softmax(1) + epsilon).log()
    gumbel = -torch.empty_like(scores).exponential_(generator=generator).log()
    return (scores + gumbel).masked_fill(~candidates, -torch.inf).argmax(1)


def take(f: Forward, encoded: Callable[[Forward], Encoded], rows: Tensor, among: Among) -> Encoded:
    """Encodings of rows that may be another micro-batch's or process's, with the gradient back to where they were made.

    Of the tokens what is fused alone, `Encoded.fusible`. Over several processes texts are padded to the longest of all, for which a GPU's host waits once.

    Args:
        encoded: what is wanted of a bundle: ``lambda f: f.text``.
        rows: (n,) int64 as `Forward.gathered` numbers them.
        among: what can be drawn, as `Forward.gathered` takes it.
    """
    longest = torch.tensor(
        [max(encoded(micro_batch).fusible.shape[1] for micro_batch in f.micro_batches)], device=rows.device
    )
    longest = int((gather(longest) if among == "all" else longest).max())

    def tokens(micro_batch: Forward) -> Tensor:
        x = encoded(micro_batch).fusible
        return F.pad(x, (0, 0, 0, longest - x.shape[1]))

    def mask(micro_batch: Forward) -> Tensor:  # as bytes: not every backend sends bools
        x = encoded(micro_batch).mask.byte()
        return F.pad(x, (0, longest - x.shape[1]))

    fusible = f.gathered(tokens, among)[rows]
    return Encoded(
        fusible,
        f.gathered(mask, among)[rows].bool(),
        f.gathered(lambda micro_batch: encoded(micro_batch).embed, among)[rows],
        None if encoded(f).inputs is None else fusible,
    )
