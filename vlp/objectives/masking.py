"""Random choices of a step: which tokens and which patches are masked.

Draws use torch's generators, which the trainer seeds for each step: that of the CPU for texts, and that of the device for
patches. Nothing causes a host-device sync.

B texts or images, L tokens, V vocabulary, P = h x w patches, M predicted positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vlp.encoders.ragged import upload
from vlp.errors import UserError
from vlp.losses.masked import IGNORED
from vlp.specs.fields import setting
from vlp.types import MaskedIds, Vocabulary, computing_on_host, keep_host_copy, on_host


@dataclass(frozen=True)
class TextMasking:
    """BERT's corruption: some tokens are chosen, and most of these become ``[MASK]`` (Devlin et al. 2019, sec. 3.1).

    Args:
        probability: Share of the tokens that are chosen, special tokens not counted.
        unit: "token" chooses tokens independently; "word" all pieces of a word or none, words independently; "span" runs
            of whole words (SpanBERT, Joshi et al. 2020, sec. 3.1), replaced alike, until the share of a text, rounded up,
            is reached, which truncates the last span.
        mask_share: Share of the chosen tokens that become ``[MASK]``.
        random_share: Share of the chosen tokens that become another token. The rest stay unchanged and are predicted too.
        exclude: Tokens that are never chosen: "special" excludes ``[PAD]``, ``[CLS]``, ``[SEP]`` and other special tokens,
            "first" only padding and the first token, as in ALBEF's code.
        random_from: Tokens that another token is drawn from, evenly: "words" are all that are not special, "all" is the
            whole vocabulary, as published by BERT, ALBEF and others.
        capacity: Share of the (B, L) positions, padding included, that can be predicted. The number of positions is then
            fixed, which compiled heads need. Chosen tokens beyond it are left unchanged. None predicts exactly the chosen
            tokens.
    """

    probability: float = setting(0.15, least=0, most=1)
    unit: Literal["token", "word", "span"] = "token"
    mask_share: float = setting(0.8, least=0, most=1)
    random_share: float = setting(0.1, least=0, most=1)
    exclude: Literal["special", "first"] = "special"
    random_from: Literal["words", "all"] = "words"
    capacity: float | None = setting(None, above=0, most=1)

    def validate(self, name: str) -> None:
        """Raise UserError, naming the fields of ``name``, if more than all chosen tokens are replaced."""
        if (total := self.mask_share + self.random_share) > 1:
            raise UserError(f"{name}.mask_share + random_share is {total:g}; it is a share of the chosen, at most 1")

    @computing_on_host()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        vocabulary: Vocabulary,
        generator: torch.Generator | None = None,
    ) -> MaskedIds:
        """Mask (B, L) int64 ids with their (B, L) bool attention mask.

        The tokens are drawn on the host, so that their number is known there.

        Args:
            generator: On the CPU. None uses the default generator.

        Raises:
            UserError: if the tokenizer has no ``[MASK]``.
        """
        mask_id = vocabulary.mask_id
        if mask_id is None:
            raise UserError("masked language modelling needs a tokenizer with [MASK]; use BERT's, or train one")
        device = input_ids.device
        input_ids, attention_mask = (torch.from_numpy(on_host(x)) for x in (input_ids, attention_mask))
        vocabulary = vocabulary.on_host()
        if self.exclude == "special":
            maskable = attention_mask & ~vocabulary.special[input_ids]
        else:
            maskable = attention_mask.clone()
            maskable[:, 0] = False
        chosen, fate = self._choose(input_ids, maskable, vocabulary, generator)  # (B, L) each
        size = math.ceil((self.capacity or 1) * input_ids.numel())  # largest M
        if self.capacity is not None:
            chosen &= (chosen.flatten().cumsum(0) <= size).view_as(chosen)
        others = self._draw_tokens(input_ids, vocabulary, generator)
        masked = input_ids.masked_fill(chosen & (fate < self.mask_share), mask_id)
        is_random = chosen & (fate >= self.mask_share) & (fate < self.mask_share + self.random_share)
        masked = torch.where(is_random, others, masked)
        if self.capacity is None:
            positions = torch.from_numpy(np.flatnonzero(chosen.numpy()))  # (M,)
            labels = input_ids.flatten()[positions]
        else:
            positions = chosen.flatten().byte().argsort(descending=True, stable=True)[:size]
            filler = ~chosen.flatten()[positions]  # (M,) positions that only fill up
            labels = input_ids.flatten()[positions].masked_fill(filler, IGNORED)
            positions = positions.masked_fill(filler, 0)
        return MaskedIds(*(keep_host_copy(upload(x.numpy(), device), x.numpy()) for x in (masked, positions, labels)))

    def _choose(
        self, input_ids: Tensor, maskable: Tensor, vocabulary: Vocabulary, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Return the (B, L) bool mask of chosen tokens, and (B, L) numbers in [0, 1) that decide on their replacement."""
        word = (~vocabulary.continues[input_ids]).cumsum(1)  # (B, L) number of the word in the text
        if self.unit == "span":
            return choose_spans(maskable, word, self.probability, generator)
        rows, length = maskable.shape
        draws = torch.rand(rows, length + 1, generator=generator, device=maskable.device)
        if self.unit == "word":
            draws = draws.gather(1, word)
        chosen = (draws[:, :length] < self.probability) & maskable
        return chosen, torch.rand(rows, length, generator=generator, device=maskable.device)

    def _draw_tokens(self, input_ids: Tensor, vocabulary: Vocabulary, generator: torch.Generator | None) -> Tensor:
        """Draw (B, L) ids that replace chosen tokens."""
        device = input_ids.device
        if self.random_from == "all":
            return torch.randint(vocabulary.size, input_ids.shape, generator=generator, device=device)
        words = (~vocabulary.special).float()
        return torch.multinomial(words, input_ids.numel(), True, generator=generator).view_as(input_ids)


def choose_spans(
    maskable: Tensor,
    word: Tensor,
    probability: float,
    generator: torch.Generator | None = None,
    geometric: float = 0.2,
    longest: int = 10,
) -> tuple[Tensor, Tensor]:
    """Choose spans of words until ``ceil(probability * n)`` of a text's n maskable tokens are chosen (Joshi et al. 2020).

    A span begins with the word of an evenly drawn token and has l words, ``p(l) ~ (1 - geometric)^(l - 1)`` up to
    ``longest``, 3.8 on average. Tokens of earlier spans begin no span. The last span is truncated at the required number,
    as published. The number of draws is several times what a text needs on average; a few very short texts get fewer
    tokens.

    Args:
        maskable: (B, L) bool.
        word: (B, L) int64 number of the word that a token belongs to.

    Returns:
        (B, L) bool mask of chosen tokens, and (B, L) numbers in [0, 1), equal within a span, that decide on replacements.
    """
    rows, length = maskable.shape
    device = maskable.device
    rounds = math.ceil(probability * length) + 4
    shares = (1 - geometric) ** torch.arange(longest, device=device)
    words = (
        torch.multinomial(shares, rows * rounds, True, generator=generator).view(rows, rounds) + 1
    )  # words of a span
    count = maskable.sum(1, keepdim=True)  # (B, 1)
    number = (torch.rand(rows, rounds, generator=generator, device=device) * count).long()  # among the maskable tokens
    begins = torch.searchsorted(maskable.cumsum(1), number + 1).clamp(max=length - 1)  # (B, rounds) positions
    found = torch.full_like(word, rounds)  # (B, L) round in which a token was first part of a span
    for r in range(rounds):
        begin = begins[:, r : r + 1]
        first, is_free = word.gather(1, begin), found.gather(1, begin) == rounds
        inside = (word >= first) & (word < first + words[:, r : r + 1]) & is_free & maskable
        found = torch.where(inside & (found == rounds), r, found)
    order = found * length + torch.arange(length, device=device)  # by round, then from left to right
    budget = (probability * count - 1e-6).ceil().long()  # 0.15 * 20 = 3.0000001 is 3
    last = order.sort(1).values.gather(1, (budget - 1).clamp(min=0))
    chosen = (order <= last) & (found < rounds) & (budget > 0)
    fates = torch.rand(rows, rounds + 1, generator=generator, device=device)
    return chosen, fates.gather(1, found)


def block_masks(
    count: int,
    grid: tuple[int, int],
    share: float,
    min_patches: int = 16,
    min_aspect: float = 0.3,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    rounds: int = 16,
) -> Tensor:
    """Choose patches to mask, in blocks (BEiT, Bao et al. 2022, algorithm 1).

    Blocks have from ``min_patches`` to as many patches as are still missing, and an aspect ratio between ``min_aspect`` and
    its inverse, evenly in the logarithm, as published. They are placed anywhere until ``share`` of the patches is covered.
    In the published algorithm, the last block makes the number of masked patches differ between images. Here it is
    truncated from below, so that every image has exactly ``round(share * P)``, a number that needs no host-device sync.

    Args:
        count: B.
        grid: (h, w) patches.

    Returns:
        (B, T) int64 numbers of the patches, row by row, ascending.
    """
    height, width = grid
    target = max(1, round(share * height * width))

    def draw() -> Tensor:
        return torch.rand(count, 1, generator=generator, device=device)

    patch = torch.arange(height * width, device=device)
    y, x = patch // width, patch % width
    found = torch.full(
        (count, height * width), rounds, device=device
    )  # (B, P) round in which a block covered the patch
    for r in range(rounds):
        missing = target - (found < rounds).sum(1, keepdim=True)  # (B, 1)
        area = min_patches + draw() * (missing - min_patches).clamp(min=0)
        aspect = (math.log(min_aspect) * (2 * draw() - 1)).exp()
        h = (area * aspect).sqrt().round().clamp(1, height)
        w = (area / aspect).sqrt().round().clamp(1, width)
        top, left = (draw() * (height - h + 1)).floor(), (draw() * (width - w + 1)).floor()
        inside = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)  # (B, P)
        found = torch.where(inside & (found == rounds), r, found)
    # By round, then row by row. If all rounds together cover too few patches, the rest is taken from the top.
    order = found * (height * width) + patch
    return order.topk(target, dim=1, largest=False).indices.sort(1).values
