"""The dual encoder of ALIGN, CLIP and SigLIP: two towers, projections, and the scale of the similarities.

B batch, L text tokens, D width of a tower, E embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from vlp.data.preprocess import Preprocess
from vlp.encoders.activation_checkpointing import Checkpointing
from vlp.encoders.base import ImageTower, ImageTowerSpec, TextTower, TextTowerSpec, Tower
from vlp.encoders.open_clip import OpenClip
from vlp.errors import UserError
from vlp.models.base import Model, ModelSpec, encoded_by_head, l2_normalize
from vlp.models.temperature import LearnedScale
from vlp.specs.fields import check_limits, setting
from vlp.types import Encoded
from vlp.weights import reading
from vlp.weights.reading import LoadReport
from vlp.weights.run import read_run


@dataclass(frozen=True)
class Dual(ModelSpec):
    """Spec of a dual encoder from an image and a text tower, or from both towers of an open_clip model.

    Args:
        image: Image tower.
        text: Text tower.
        towers: Both towers of an open_clip model, in place of ``image`` and ``text``. They have their own projections, so
            ``projection`` must be "none".
        projection: "text-to-image" (ALIGN) projects the pooled text to the width of the image tower with a linear layer
            with bias. "both" (CLIP) projects both modalities to ``embed_size`` with bias-free linear layers. "none"
            requires equal widths.
        embed_size: E, for projection "both". None takes the width of the image tower.
        temperature: Initial temperature; similarities are divided by it. None takes temperature and bias from open_clip
            weights.
        temperature_form: Learn the "temperature" itself (ALIGN), or "logit_scale", the log of its inverse (CLIP, SigLIP).
        temperature_min: Smallest temperature that takes effect; 0.01 is CLIP's largest scale, 100. None leaves it unbounded.
        temperature_max: Largest temperature that takes effect. None leaves it unbounded.
        bias: Initial value of a learned number that is added to all logits (SigLIP: -10). None adds nothing.
        weights: The folder of a run of a dual encoder of the same sizes. The whole model starts from it, projections and
            scalars included. Positions are resized to ``image.image_size``.
    """

    image: ImageTowerSpec | None = None
    text: TextTowerSpec | None = None
    towers: OpenClip | None = None
    projection: Literal["text-to-image", "both", "none"] = "text-to-image"
    embed_size: int | None = setting(None, least=1)
    temperature: float | None = setting(1.0, above=0)
    temperature_form: Literal["temperature", "logit_scale"] = "temperature"
    temperature_min: float | None = setting(0.01, above=0)
    temperature_max: float | None = setting(None, above=0)
    bias: float | None = None
    weights: str | None = None
    itc = True  # without an annotation: a capability, not a field

    def resolved(self) -> Dual:
        """Fill in all sizes and normalisation, so that `build(load_weights=False)` reads no weights.

        A temperature of None stays: it is read from weights, later from a checkpoint.
        """
        parts = {"image": self.image, "text": self.text, "towers": self.towers}
        return replace(self, **{name: part and part.resolved() for name, part in parts.items()})

    def build(self, load_weights: bool = True) -> DualEncoder:
        """Build the model.

        Args:
            load_weights: False leaves the towers random, because a checkpoint is loaded afterwards.

        Raises:
            UserError: if towers or sizes do not fit together.
        """
        towers = {"image": self.image, "text": self.text, "towers": self.towers}
        given = [name for name, spec in towers.items() if spec]
        if given not in (["image", "text"], ["towers"]):
            raise UserError(f"a dual encoder takes image and text, or only towers, not {' and '.join(given) or 'none'}")
        if self.towers and self.projection != "none":
            raise UserError(
                f"open_clip's towers have projections already; set projection='none', not {self.projection!r}"
            )
        check_limits(self)
        temperature, bias = self.temperature, self.bias
        part_by_part = load_weights and not self.weights
        if self.towers:
            image, text, scale, own_bias = self.towers.build(part_by_part)
            if temperature is None and scale is not None:
                temperature = 1 / scale
                bias = own_bias if None not in (bias, own_bias) else bias
        else:
            image, text = self.image.build(part_by_part), self.text.build(part_by_part)
        if temperature is None and part_by_part:
            raise UserError("temperature=None reads it from open_clip weights, and there are none; set a number")
        model = DualEncoder(replace(self, temperature=temperature or 1.0, bias=bias), image, text)
        if load_weights and self.weights:
            model.load(read_run(self.weights))
        return model


class DualEncoder(LearnedScale, Model):
    """Two towers whose embeddings share a space. Losses read `scale` and `bias`.

    Args:
        spec: Projection, temperature and bias.
        image: Image tower.
        text: Text tower.

    Raises:
        UserError: if the widths of the towers do not fit ``spec.projection``.
    """

    def __init__(self, spec: Dual, image: ImageTower, text: TextTower):
        super().__init__()
        self.image, self.text = image, text
        self.embed_size = _embed_size(spec, image.width, text.width)
        self.image_projection: nn.Module = nn.Identity()
        self.text_projection: nn.Module = nn.Identity()
        if spec.projection == "text-to-image":
            self.text_projection = nn.Linear(text.width, self.embed_size)
            nn.init.xavier_uniform_(self.text_projection.weight)
            nn.init.zeros_(self.text_projection.bias)
        elif spec.projection == "both":
            self.image_projection = nn.Linear(image.width, self.embed_size, bias=False)
            self.text_projection = nn.Linear(text.width, self.embed_size, bias=False)
            for layer in (self.image_projection, self.text_projection):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        self.add_scale(spec.temperature, spec.temperature_min, spec.temperature_max, spec.temperature_form)
        self.logit_bias = None if spec.bias is None else nn.Parameter(torch.tensor([float(spec.bias)]))
        self.report: LoadReport | None = None

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load the state dict of another dual encoder; UserError if the sizes differ."""
        grids = {f"image.{name}": grid for name, grid in self.image.position_grids().items()}
        self.report = reading.load(self, state, ignored=("heads",), grids=grids)

    @property
    def preprocess(self) -> Preprocess:
        return self.image.preprocess

    @property
    def reports(self) -> dict[str, LoadReport | None]:
        if self.report is not None:
            return {"model": self.report}
        return {"image": self.image.report, "text": self.text.report}

    @property
    def can_contrast(self) -> bool:
        return True

    @property
    def bias(self) -> Tensor | None:
        return self.logit_bias

    def encode_image(self, image: Tensor) -> Encoded:
        tokens = self.image(image)  # (B, N, D)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return encoded_by_head(tokens, mask, self.image_projection(tokens[:, 0]))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        tokens = self.text(input_ids, attention_mask)  # (B, N, D)
        return encoded_by_head(tokens, self.text.token_mask(attention_mask), self.text_projection(tokens[:, 0]))

    def embed_text(self, pooled: Tensor) -> Tensor:
        return l2_normalize(self.text_projection(pooled))

    def layer_ids(self) -> dict[str, int]:
        """Return the depth of each parameter by name: the towers, then projections and scalars at the top."""
        towers = tower_layer_ids(self.image, self.text)
        top = max(towers.values()) + 1
        return {name: towers.get(name, top) for name, _ in self.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay: those of the towers, and the scalars."""
        towers = tower_no_weight_decay(self.image, self.text)
        return towers | {name for name in ("temperature", "logit_scale", "logit_bias") if name in self._parameters}

    def set_activation_checkpointing(self, mode: Checkpointing) -> None:
        """Recompute activations in the backward pass; UserError if a tower cannot."""
        self.image.set_activation_checkpointing(mode)
        self.text.set_activation_checkpointing(mode)


def tower_layer_ids(image: Tower, text: Tower) -> dict[str, int]:
    """Return the depth of the parameters of two towers. Both end at the same depth; the shallower one starts later."""
    towers = {"image": image.layer_ids(), "text": text.layer_ids()}
    deepest = max(max(ids.values()) for ids in towers.values())
    return {
        f"{tower}.{name}": depth + deepest - max(ids.values())
        for tower, ids in towers.items()
        for name, depth in ids.items()
    }


def tower_no_weight_decay(image: Tower, text: Tower) -> set[str]:
    """Return the names of the parameters of two towers without weight decay."""
    towers = {"image": image, "text": text}
    return {f"{name}.{parameter}" for name, tower in towers.items() for parameter in tower.no_weight_decay()}


def _embed_size(spec: Dual, image_width: int, text_width: int) -> int:
    if spec.projection == "both":
        return spec.embed_size or image_width
    if spec.projection == "none" and image_width != text_width:
        raise UserError(
            f"the image tower is {image_width} wide, the text tower {text_width}; set projection=text-to-image or both"
        )
    if spec.embed_size not in (None, image_width):
        raise UserError(
            f"embed_size {spec.embed_size} needs projection='both': with {spec.projection!r} embeddings have the image "
            f"tower's width, {image_width}"
        )
    return image_width
