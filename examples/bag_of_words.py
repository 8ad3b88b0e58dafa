"""A text tower of your own: the mean of word embeddings, which sees no order of words."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vlp.encoders.base import PooledTextTower, TextTowerSpec
from vlp.weights import reading
from vlp.weights.run import read_run


@dataclass(frozen=True)
class BagOfWords(TextTowerSpec):
    vocab_size: int = 30_522
    width: int = 128
    max_length: int = 64
    weights: str | None = None  # a run folder

    def build(self, load_weights: bool = True) -> BagOfWordsTower:
        tower = BagOfWordsTower(self)
        if load_weights and self.weights:
            tower.report = reading.load(tower, read_run(self.weights, "text"))
        return tower


class BagOfWordsTower(PooledTextTower):
    def __init__(self, spec: BagOfWords):
        super().__init__()
        self.width, self.vocab_size, self.max_length = spec.width, spec.vocab_size, spec.max_length
        self.words = nn.Embedding(spec.vocab_size, spec.width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        real = attention_mask[:, :, None]  # (B, L, 1)
        total = (self.words(input_ids) * real).sum(1, keepdim=True)  # (B, L, D) -> (B, 1, D)
        return total / real.sum(1, keepdim=True).clamp(min=1)
