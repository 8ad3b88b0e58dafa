"""One tower with a head: what the single-modality methods train.

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
    """An image or a text tower, and what is put on its pooled token for training.

    Args:
        head: "none"; "linear" (instance discrimination, MoCo v1); "mlp" = linear, ReLU, linear (MoCo v2, SimCLR);
            "tanh" = linear, tanh, as wide as the tower (SimCSE).
        head_norm: a BatchNorm behind each linear layer of an "mlp" (SimCLR's published code).
        hidden_size: of an "mlp"; None = the tower's width.
        embed_size: E; None = the tower's width.
        classes: number of outputs of a linear classifier on the pooled token; None = there is none.
        mlm: a head that predicts masked tokens of the text, tied to the word embeddings; from the folder of the text
            tower's weights where that has one.
        mim: what a head predicts of masked patches: a spec of `vlp.encoders.patch_targets`; None = there is none.
    """

    image: ImageTowerSpec | None = None
    text: TextTowerSpec | None = None
    head: Literal["none", "linear", "mlp", "tanh"] = "none"
    head_norm: bool = False
    hidden_size: int | None = None
    embed_size: int | None = setting(None, least=1)
    classes: int | None = None
    mlm: bool = False
    mim: Any = None

    def resolved(self) -> Single:
        """The same model with all sizes and normalisation filled in: `build(load_weights=False)` needs no weights then."""
        return replace(self, image=self.image and self.image.resolved(), text=self.text and self.text.resolved())

    def build(self, load_weights: bool = True) -> SingleTower:
        """The model.

        Args:
            load_weights: False = leave the tower random: a checkpoint follows.

        Raises:
            UserError: unless there is exactly one tower, or where the head cannot have the asked sizes.
        """
        if (self.image is None) == (self.text is None):
            raise UserError("a single tower takes image or text, one of them; vlp.models.dual has both")
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
        # a bias in front of a norm does nothing, and the last norm has no shift, as published
        last = nn.BatchNorm1d(embed)
        last.register_parameter("bias", None)
        first = [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        return nn.Sequential(*first, nn.Linear(hidden, embed, bias=False), last)
    if spec.head == "mlp":
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, embed))
    return nn.Identity()


class SingleTower(Model):
    """A tower and its heads; ``image`` or ``text`` is None.

    `Encoded.tokens` begins with the tower's pooled state, which evaluations use; `Encoded.embed` comes from the head.

    Args:
        spec: of the heads; the tower is given.
        tower: see `vlp.encoders.base`.
        load_weights: see `Single.build`.
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
        """What images must look like; None for a text tower."""
        return self.image and self.image.preprocess

    @property
    def reports(self) -> dict[str, LoadReport | None]:
        """What loading its weights did to each part; None where none were loaded."""
        heads = {} if self.mlm is None else {"mlm": self.mlm.report}
        return {"image" if self.text is None else "text": self.tower.report, **heads}

    @property
    def can_predict_tokens(self) -> bool:
        return self.mlm is not None

    @property
    def can_predict_patches(self) -> bool:
        return self.mim is not None

    @property
    def num_classes(self) -> int | None:
        return None if self.classifier is None else self.classifier.out_features

    def encode_image(self, image: Tensor) -> Encoded:
        """(B, 3, H, W) float32, normalised as `preprocess` says."""
        tokens = self.image(image)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return encoded_by_head(tokens, mask, self.head(tokens[:, 0]))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """(B, L) int64 and bool, padded on the right."""
        tokens = self.text(input_ids, attention_mask)
        return encoded_by_head(tokens, self.text.token_mask(attention_mask), self.head(tokens[:, 0]))

    def classify(self, f: Encodings) -> Tensor:
        """(B, C) logits of the classes, from the tower's pooled state."""
        return self.classifier((f.image if self.text is None else f.text).tokens[:, 0])

    def masked_text(self, f: Encodings, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Logits of what stood at masked places of the texts of ``f``.

        Args:
            f: of which the attention mask is taken.
            input_ids: (B, L) int64, masked.
            positions: (M,) int64 in the flattened (B * L), of real tokens.

        Returns:
            (M, V).
        """
        tokens = self.text(input_ids, f.batch.attention_mask)
        # behind a pooled token put in front; and a tower may have cut padding that all rows share
        tokens = tokens[:, self.text.token_mask(f.batch.attention_mask).shape[1] - input_ids.shape[1] :]
        row, column = positions // input_ids.shape[1], positions % input_ids.shape[1]
        return self.mlm(tokens[row, column], self.text.get_input_embeddings())

    def masked_image(self, f: Encodings, positions: Tensor) -> Tensor:
        """What ``mim.targets`` are predicted to be where patches of the pictures of ``f`` are masked.

        Args:
            positions: (M,) int64 masked patches, in the flattened (B * P).

        Returns:
            (M, outputs).
        """
        height, width = self.mim.grid
        masked = torch.zeros(len(f.batch) * height * width, dtype=torch.bool, device=positions.device)
        masked[positions] = True
        states = self.image.forward_masked(f.batch.image, masked.view(len(f.batch), -1), self.mim.mask_token)
        return self.mim(states.flatten(0, 1)[positions])

    def embed_text(self, pooled: Tensor) -> Tensor:
        return l2_normalize(self.head(pooled))

    def layer_ids(self) -> dict[str, int]:
        """Parameter name to depth, for layer-wise learning rates; the heads are the top."""
        name = "image" if self.text is None else "text"
        ids = {f"{name}.{parameter}": depth for parameter, depth in self.tower.layer_ids().items()}
        top = max(ids.values()) + 1
        return {parameter: ids.get(parameter, top) for parameter, _ in self.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are no weights: what the tower names."""
        name = "image" if self.text is None else "text"
        return {f"{name}.{parameter}" for parameter in self.tower.no_weight_decay()}

    def set_activation_checkpointing(self, how: Checkpointing) -> None:
        """Recompute the tower's activations in the backward instead of keeping them; UserError where it cannot."""
        self.tower.set_activation_checkpointing(how)
