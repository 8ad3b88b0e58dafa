"""One tower with a head, for methods that train a single modality.

B batch, N tokens, L text tokens, D width of the tower, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlp.data.preprocess import Preprocess
from vlp.encoders.activation_checkpointing import Checkpointing
from vlp.encoders.base import ImageTowerSpec, TextTowerSpec, Tower
from vlp.encoders.heads import PatchHead, check_patch_masking, vocabulary_head
from vlp.errors import UserError
from vlp.models.base import Encodings, Model, ModelSpec, encoded_by_head, l2_normalize
from vlp.specs.fields import setting
from vlp.types import Encoded
from vlp.weights.reading import LoadReport


@dataclass(frozen=True)
class Single(ModelSpec):
    """Spec of an image or a text tower with heads.

    Args:
        image: Image tower, or None.
        text: Text tower, or None.
        head: Projection head on the pooled token: "none", "linear" (instance discrimination, MoCo v1), "mlp" for linear,
            ReLU, linear (MoCo v2, SimCLR), "tanh" for linear, tanh, as wide as the tower (SimCSE).
        head_norm: Add a BatchNorm after each linear layer of an "mlp" (SimCLR's published code).
        hidden_size: Hidden width of an "mlp". None takes the width of the tower.
        embed_size: E. None takes the width of the tower.
        classes: C, outputs of a linear classifier on the pooled token. None builds none.
        mlm: A head that predicts masked tokens of the text, tied to the word embeddings. It is loaded from the folder of the
            text tower's weights if that has one.
        mim: Targets of masked patches: a spec of `vlp.encoders.patch_targets`. None builds no such head.
    """

    image: ImageTowerSpec | None = None
    text: TextTowerSpec | None = None
    head: Literal["none", "linear", "mlp", "tanh"] = "none"
    head_norm: bool = False
    hidden_size: int | None = setting(None, least=1)
    embed_size: int | None = setting(None, least=1)
    classes: int | None = setting(None, least=1)
    mlm: bool = False
    mim: Any = None

    def resolved(self) -> Single:
        """Fill in all sizes and normalisation, so that `build(load_weights=False)` reads no weights."""
        return replace(self, image=self.image and self.image.resolved(), text=self.text and self.text.resolved())

    def build(self, load_weights: bool = True) -> SingleTower:
        """Build the model.

        Args:
            load_weights: False leaves the tower random, because a checkpoint is loaded afterwards.

        Raises:
            UserError: unless there is exactly one tower, or if the head cannot have the given sizes.
        """
        if (self.image is None) == (self.text is None):
            raise UserError("a single tower takes either image or text; vlp.models.dual takes both")
        if self.head in ("none", "tanh") and self.embed_size is not None:
            raise UserError(f"embed_size needs head='linear' or 'mlp': head={self.head!r} keeps the tower's width")
        if self.head != "mlp" and (self.head_norm or self.hidden_size is not None):
            raise UserError(f"head_norm and hidden_size are of head='mlp', not of {self.head!r}")
        if (self.mlm and self.text is None) or (self.mim and self.image is None):
            raise UserError(
                "mlm is the head of a text tower and mim that of an image tower; set the other to false or none"
            )
        tower = (self.image or self.text).build(load_weights)
        if self.mim:
            check_patch_masking(tower)
        return SingleTower(self, tower, load_weights)


def _head(spec: Single, width: int) -> nn.Module:
    embed, hidden = spec.embed_size or width, spec.hidden_size or width
    if spec.head == "linear":
        return nn.Linear(width, embed)
    if spec.head == "tanh":
        return nn.Sequential(nn.Linear(width, width), nn.Tanh())
    if spec.head == "mlp" and spec.head_norm:
        # a bias before a norm has no effect; the last norm has no shift, as published
        last = nn.BatchNorm1d(embed)
        last.register_parameter("bias", None)
        first = [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        return nn.Sequential(*first, nn.Linear(hidden, embed, bias=False), last)
    if spec.head == "mlp":
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, embed))
    return nn.Identity()


class SingleTower(Model):
    """A tower and its heads. Either ``image`` or ``text`` is None.

    `Encoded.tokens` begins with the pooled state of the tower, which evaluations read. `Encoded.embed` comes from the head.

    Args:
        spec: Spec of the heads.
        tower: Image or text tower.
        load_weights: Load the weights of heads, see `Single.build`.
    """

    def __init__(self, spec: Single, tower: Tower, load_weights: bool = True):
        super().__init__()
        self.image = tower if spec.image else None
        self.text = tower if spec.text else None
        self.head = _head(spec, tower.width)
        self.embed_size = spec.embed_size or tower.width
        self.classifier = None if spec.classes is None else nn.Linear(tower.width, spec.classes)
        self.mlm = vocabulary_head(spec.text, tower, load_weights) if spec.mlm else None
        self.mim = PatchHead(tower, spec.mim.build(tower, load_weights)) if spec.mim else None

    @property
    def tower(self) -> Tower:
        return self.image if self.text is None else self.text

    @property
    def preprocess(self) -> Preprocess | None:
        return self.image and self.image.preprocess

    @property
    def reports(self) -> dict[str, LoadReport | None]:
        heads = {} if self.mlm is None else {"mlm": self.mlm.report}
        return {"image" if self.text is None else "text": self.tower.report, **heads}

    def encode_image(self, image: Tensor) -> Encoded:
        tokens = self.image(image)  # (B, N, D)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return encoded_by_head(tokens, mask, self.head(tokens[:, 0]))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        tokens = self.text(input_ids, attention_mask)  # (B, N, D)
        return encoded_by_head(tokens, self.text.token_mask(attention_mask), self.head(tokens[:, 0]))

    def classify(self, f: Encodings) -> Tensor:
        return self.classifier((f.image if self.text is None else f.text).tokens[:, 0])

    def masked_text(self, f: Encodings, input_ids: Tensor, positions: Tensor) -> Tensor:
        tokens = self.text(input_ids, f.batch.attention_mask)
        # Some towers prepend a pooled token. A tower may also drop padding that all rows share.
        tokens = tokens[:, self.text.token_mask(f.batch.attention_mask).shape[1] - input_ids.shape[1] :]  # (B, <= L, D)
        row, column = positions // input_ids.shape[1], positions % input_ids.shape[1]
        return self.mlm(tokens[row, column], self.text.get_input_embeddings())

    def masked_image(self, f: Encodings, positions: Tensor) -> Tensor:
        height, width = self.mim.grid
        masked = torch.zeros(len(f.batch) * height * width, dtype=torch.bool, device=positions.device)
        masked[positions] = True
        masked = masked.view(len(f.batch), -1)  # (B, P)
        states = self.image.forward_masked(f.batch.image, masked, self.mim.mask_token)  # (B, P, D)
        return self.mim(states.flatten(0, 1)[positions])

    def embed_text(self, pooled: Tensor) -> Tensor:
        return l2_normalize(self.head(pooled))

    def layer_ids(self) -> dict[str, int]:
        """Return the depth of each parameter by name: the tower, then the heads at the top."""
        name = "image" if self.text is None else "text"
        ids = {f"{name}.{parameter}": depth for parameter, depth in self.tower.layer_ids().items()}
        top = max(ids.values()) + 1
        return {parameter: ids.get(parameter, top) for parameter, _ in self.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay: those of the tower."""
        name = "image" if self.text is None else "text"
        return {f"{name}.{parameter}" for parameter in self.tower.no_weight_decay()}

    def set_activation_checkpointing(self, mode: Checkpointing) -> None:
        """Recompute activations in the backward pass; UserError if the tower cannot."""
        self.tower.set_activation_checkpointing(mode)
