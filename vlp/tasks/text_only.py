"""Text-only (bag-of-words) baseline for the classification of images with texts.

n texts, V words and word pairs, C classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_TEXTS = 2  # texts that must contain a word
MAX_WORDS = 50_000  # words and word pairs


class TextOnly:
    """Multinomial logistic regression on the words and the pairs of neighbouring words that a text contains.

    It predicts the class of two of three SNLI hypotheses (Gururangan et al. 2018, Poliak et al. 2018).

    Args:
        texts: n texts.
        labels: n class numbers.
        l2: Strength of the penalty, relative to the mean loss. The default was the best of a few values on the 536 hypotheses of
            Flickr8k's val split, so the baseline is rather too strong there.
        steps: Steps of L-BFGS at most.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[int], classes: int, l2: float = 3e-4, steps: int = 100):
        counts = Counter(word for text in texts for word in words_of(text))
        kept = [word for word, count in counts.most_common(MAX_WORDS) if count >= MIN_TEXTS]
        self.number = {word: n for n, word in enumerate(kept)}
        self.weight = torch.zeros(len(kept), classes, requires_grad=True)  # (V, C)
        self.bias = torch.zeros(classes, requires_grad=True)
        bags, target = self._bags(texts), torch.tensor(labels)
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:  # LBFGS enables gradients
            optimizer.zero_grad()
            value = F.cross_entropy(self._logits(bags), target) + l2 / 2 * self.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[int]:
        """Return the most likely class of each text."""
        return self._logits(self._bags(texts)).argmax(1).tolist()

    def _bags(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the numbers of the known words of all texts in one row, and the (n,) positions at which each text begins."""
        found = [[self.number[word] for word in words_of(text) if word in self.number] for text in texts]
        begins = torch.tensor([0, *map(len, found[:-1])]).cumsum(0)
        return torch.tensor([n for own in found for n in own], dtype=torch.int64), begins

    def _logits(self, bags: tuple[Tensor, Tensor]) -> Tensor:
        return F.embedding_bag(bags[0], self.weight, bags[1], mode="sum") + self.bias  # (n, C)


def words_of(text: str) -> list[str]:
    """Return each distinct word and pair of neighbouring words, in a fixed order."""
    words = re.findall(r"\w+", text.lower())
    return list(dict.fromkeys([*words, *map(" ".join, zip(words, words[1:]))]))
