"""What can be told from the text alone: the baseline that a number on pictures with texts is to be read beside.

n texts, V words and pairs of words, C classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST = 2  # texts that have a word, for it to count
MOST = 50_000  # words and pairs


class TextOnly:
    """Multinomial logistic regression on the words of a text, and on pairs of neighbouring words: which it has, not how often.

    Hypotheses of SNLI betray their class so in two of three cases (Gururangan et al. 2018, Poliak et al. 2018).

    Args:
        texts: n.
        labels: n numbers of classes.
        l2: strength of the penalty, over the mean loss; the default was the best of a few on the 536 hypotheses of Flickr8k's val,
            so that the baseline there is rather too good.
        steps: of L-BFGS at most.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[int], classes: int, l2: float = 3e-4, steps: int = 100):
        counts = Counter(word for text in texts for word in words_of(text))
        kept = [word for word, count in counts.most_common(MOST) if count >= LEAST]
        self.place = {word: n for n, word in enumerate(kept)}
        self.weight = torch.zeros(len(kept), classes, requires_grad=True)
        self.bias = torch.zeros(classes, requires_grad=True)
        bags, target = self._bags(texts), torch.tensor(labels)
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(self._logits(bags), target) + l2 / 2 * self.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[int]:
        """The likeliest class of each."""
        return self._logits(self._bags(texts)).argmax(1).tolist()

    def _bags(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The known words of all texts, one after the other, and where each text begins."""
        found = [[self.place[word] for word in words_of(text) if word in self.place] for text in texts]
        begins = torch.tensor([0, *map(len, found[:-1])]).cumsum(0)
        return torch.tensor([n for own in found for n in own], dtype=torch.int64), begins

    def _logits(self, bags: tuple[Tensor, Tensor]) -> Tensor:
        return F.embedding_bag(bags[0], self.weight, bags[1], mode="sum") + self.bias


def words_of(text: str) -> list[str]:
    """Each word and each pair of neighbours once, in a fixed order."""
    words = re.findall(r"\w+", text.lower())
    return list(dict.fromkeys([*words, *map(" ".join, zip(words, words[1:]))]))
