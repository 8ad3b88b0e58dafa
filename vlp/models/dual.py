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
from vlp.models.temperature import LearnedScale, check_temperatures
from vlp.specs.fields import setting
from vlp.types import Encoded
from vlp.weights import reading
from vlp.weights.reading import LoadReport
from vlp.weights.run import read_run


@dataclass(frozen=True)
class Dual(ModelSpec):
    """A dual encoder from an image and a text tower, or from both towers of an open_clip model.

    Args:
        towers: instead of ``image`` and ``text``; brings its own projections, so that ``projection`` is "none".
        projection: "text-to-image" (ALIGN): a linear layer with bias takes the pooled text to the image tower's width,
            the image stays; "both" (CLIP): bias-free linear layers take both to ``embed_size``; "none": widths agree.
        embed_size: E, with projection "both"; None = the image tower's width.
        temperature: initial value; similarities are divided by it. None = temperature, and bias, of open_clip weights.
        temperature_form: learned "temperature" as it is (ALIGN), or "logit_scale", log of its inverse (CLIP, SigLIP).
        temperature_min: smallest value that takes effect; 0.01 is CLIP's largest scale, 100. None = unbounded.
        temperature_max: largest value that takes effect; None = unbounded.
        bias: initial value of a learned number that is added to all logits (SigLIP: -10); None = there is none.
        weights: the folder of a run of a dual encoder of the same sizes, from which all of it starts, projections and
            scalars too; positions are resized to ``image.image_size``.
    """

    image: ImageTowerSpec | None = None
    text: TextTowerSpec | None = None
    towers: OpenClip | None = None
    projection: Literal["text-to-image", "both", "none"] = "text-to-image"
    embed_size: int | None = setting(None, least=1)
    temperature: float | None = 1.0
    temperature_form: Literal["temperature", "logit_scale"] = "temperature"
    temperature_min: float | None = 0.01
    temperature_max: float | None = None
    bias: float | None = None
    weights: str | None = None
    itc = True  # without an annotation: a capability, not a field

    def resolved(self) -> Dual:
        """The same model with all sizes and normalisation filled in: `build(load_weights=False)` needs no weights then.

        A temperature of None stays: it comes from weights, as the trained one will.
        """
        parts = {"image": self.image, "text": self.text, "towers": self.towers}
        return replace(self, **{name: part and part.resolved() for name, part in parts.items()})

    def build(self, load_weights: bool = True) -> DualEncoder:
        """The model.

        Args:
            load_weights: False = leave the towers random: a checkpoint follows.

        Raises:
            UserError: if the towers, or the sizes, do not go together.
        """
        given = [name for name in ("image", "text", "towers") if getattr(self, name)]
        if given not in (["image", "text"], ["towers"]):
            raise UserError(
                f"a dual encoder takes image and text, or towers alone, not {' and '.join(given) or 'none'}"
            )
        if self.towers and self.projection != "none":
            raise UserError(f"open_clip's towers are projected already; set projection='none', not {self.projection!r}")
        check_temperatures(self.temperature, self.temperature_min, self.temperature_max)
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
            raise UserError("temperature None takes it from open_clip weights, and there are none; set a number")
        model = DualEncoder(replace(self, temperature=temperature or 1.0, bias=bias), image, text)
        if load_weights and self.weights:
            model.load(read_run(self.weights))
        return model


class DualEncoder(LearnedScale, Model):
    """Images and texts on one sphere; owns every parameter, the temperature included; losses read `scale` and `bias`.

    Args:
        spec: its projection, temperature and bias; the towers are given.
        image: tower, see `vlp.encoders.base.ImageTower`.
        text: tower, see `vlp.encoders.base.TextTower`.

    Raises:
        UserError: if the widths of the towers and ``spec.projection`` do not go together.
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
        """Takes everything from another dual encoder's ``state``; UserError if it is of other sizes."""
        grids = {f"image.{name}": grid for name, grid in self.image.position_grids().items()}
        self.report = reading.load(self, state, grids=grids)

    @property
    def preprocess(self) -> Preprocess:
        """What images must look like, which is the image tower's."""
        return self.image.preprocess

    @property
    def reports(self) -> dict[str, LoadReport | None]:
        """What loading their weights did to the parts; None where none were loaded."""
        if self.report is not None:
            return {"model": self.report}
        return {"image": self.image.report, "text": self.text.report}

    @property
    def can_contrast(self) -> bool:
        return True

    @property
    def bias(self) -> Tensor | None:
        """(1,) what is added to the logits (SigLIP), or None."""
        return self.logit_bias

    def encode_image(self, image: Tensor) -> Encoded:
        """(B, 3, H, W) float32, normalised as `preprocess` says."""
        tokens = self.image(image)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return encoded_by_head(tokens, mask, self.image_projection(tokens[:, 0]))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """(B, L) int64 and bool, padded on the right."""
        tokens = self.text(input_ids, attention_mask)
        return encoded_by_head(tokens, self.text.token_mask(attention_mask), self.text_projection(tokens[:, 0]))

    def embed_text(self, pooled: Tensor) -> Tensor:
        return l2_normalize(self.text_projection(pooled))

    def layer_ids(self) -> dict[str, int]:
        """Parameter name to depth, for layer-wise learning rates; projections and scalars are the top.

        The towers end at the same depth, right below the top, and the shallower one starts later.
        """
        towers = tower_layer_ids(self.image, self.text)
        top = max(towers.values()) + 1
        return {name: towers.get(name, top) for name, _ in self.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are no weights: what the towers name, and the scalars."""
        towers = {f"image.{name}" for name in self.image.no_weight_decay()}
        towers |= {f"text.{name}" for name in self.text.no_weight_decay()}
        return towers | {name for name in ("temperature", "logit_scale", "logit_bias") if name in self._parameters}

    def set_activation_checkpointing(self, how: Checkpointing) -> None:
        """Recompute the towers' activations in the backward instead of keeping them; UserError where one cannot."""
        self.image.set_activation_checkpointing(how)
        self.text.set_activation_checkpointing(how)


def tower_layer_ids(image: Tower, text: Tower) -> dict[str, int]:
    """Depth of the parameters of ``image`` and ``text``; both end at the same, and the shallower tower starts later."""
    towers = {"image": image.layer_ids(), "text": text.layer_ids()}
    deepest = max(max(ids.values()) for ids in towers.values())
    return {
        f"{tower}.{name}": depth + deepest - max(ids.values())
        for tower, ids in towers.items()
        for name, depth in ids.items()
    }


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
