"""Models with known answers: they encode the colour of an image, and the colour that a text names."""

from __future__ import annotations

import torch
from torch import nn

from tests.conftest import COLOURS
from vlp.config import Data
from vlp.data.augment import Resize
from vlp.data.preprocess import Preprocess
from vlp.models.base import Model
from vlp.tasks.base import EvalModel
from vlp.types import Encoded

NAMES = list(COLOURS)
VALUES = torch.tensor(list(COLOURS.values()), dtype=torch.float32)


class Tokens:
    """Tokenizer whose ids are the number of the colour that a text names, and the length of the text."""

    vocab_size = 100

    def __call__(self, texts: list[str], max_length: int):
        ids = torch.tensor([[next((n for n, c in enumerate(NAMES) if c in t), len(NAMES)), len(t)] for t in texts])
        return ids, torch.ones_like(ids, dtype=torch.bool), 0


class ColourModel(Model):
    """One-hot embeddings of the colour: the one nearest to the image's mean, and the one that the text names."""

    can_contrast = True
    image = text = None
    embed_size = len(NAMES) + 1
    preprocess = Preprocess((8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic")

    def can_encode(self, modality: str) -> bool:
        return True

    def _encoded(self, colours: torch.Tensor) -> Encoded:
        embed = torch.eye(len(NAMES) + 1)[colours]
        return Encoded(embed[:, None], torch.ones(len(embed), 1, dtype=torch.bool), embed)

    def encode_image(self, image: torch.Tensor) -> Encoded:
        mean = image.flatten(2).mean(2) * 255
        return self._encoded((mean[:, None] - VALUES).norm(dim=2).argmin(1))

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Encoded:
        return self._encoded(input_ids[:, 0])


class BlindModel(ColourModel):
    """Every image and text has the same embedding."""

    def encode_image(self, image: torch.Tensor) -> Encoded:
        return self._encoded(torch.zeros(len(image), dtype=torch.int64))

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Encoded:
        return self._encoded(torch.zeros(len(input_ids), dtype=torch.int64))


def eval_model(model: nn.Module, val: str | None = None) -> EvalModel:
    data = Data(train=(), val=val, resize=Resize(mode="squash"), workers=0)
    return EvalModel(model, Tokens(), data, torch.device("cpu"), checkpoint="a fake")
