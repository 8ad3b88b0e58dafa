"""The contract of a tower: the members of an image or text encoder that models, training and evaluation use.

A tower is an `ImageTower` or a `TextTower`; its spec, a frozen dataclass that is stored in ``experiment.json``, is an
`ImageTowerSpec` or a `TextTowerSpec`. A tower of your own subclasses both, and defines the members without a default.
`examples/conv_image.py` and `examples/bag_of_words.py` do so in less than 40 lines each.

B images or texts, H and W pixels, N image tokens, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from vlp.data.preprocess import Preprocess
from vlp.encoders.activation_checkpointing import Checkpointing
from vlp.errors import UserError
from vlp.weights.reading import Grid, LoadReport

if TYPE_CHECKING:
    from typing_extensions import Self


class Tower(nn.Module):
    """Members that image and text towers share.

    | member | default | read by |
    |---|---|---|
    | ``width`` | none | projections and heads: D of the tokens |
    | ``report`` | None | the log: which weights were loaded, None if the tower starts at random |
    | ``layer_ids()`` | one layer | ``train.layer_decay``: depth of each parameter, from 0 |
    | ``no_weight_decay()`` | empty | the optimizer: matrices without weight decay, such as position embeddings |
    | ``set_activation_checkpointing(mode)`` | raises UserError | ``train.activation_checkpointing`` |

    Parameter names are relative to the tower.
    """

    width: int
    report: LoadReport | None = None

    def layer_ids(self) -> dict[str, int]:
        """Return the depth of every parameter by name, 0 for the one next to the input."""
        return {name: 0 for name, _ in self.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay. Those of at most one dimension never have any."""
        return set()

    def set_activation_checkpointing(self, mode: Checkpointing) -> None:
        """Switch activation checkpointing on or off, see `vlp.encoders.activation_checkpointing`.

        Raises:
            UserError: if the tower does not support ``mode``.
        """
        if mode != "none":
            raise UserError(
                f"{type(self).__name__} cannot checkpoint activations; set train.activation_checkpointing to none"
            )


class ImageTower(Tower):
    """An image encoder.

    In addition to the members of `Tower`:

    | member | default | read by |
    |---|---|---|
    | ``forward(image)`` | none | every model: (B, 3, H, W) normalised to (B, N, D), the pooled token first |
    | ``preprocess`` | none | the data: image size, mean, standard deviation, interpolation |
    | ``grid`` | None | Grad-CAM, masked image modelling: (h, w) of the tokens after the pooled one, row by row |
    | ``grid_has_positions`` | True | fusion: False if grid tokens carry no position, as in a CNN; ALBEF then adds some |
    | ``position_grids()`` | empty | loading: position embeddings of a patch grid, resized to the image size |
    | ``can_mask_patches`` | False | masked image modelling: whether `forward_masked` works |
    | ``forward_masked(...)`` | raises UserError | masked image modelling |
    """

    preprocess: Preprocess
    grid: tuple[int, int] | None = None
    grid_has_positions: bool = True
    can_mask_patches: bool = False

    def forward(self, image: Tensor) -> Tensor:
        """Encode images.

        Args:
            image: (B, 3, H, W) float32, normalised as ``preprocess`` says.

        Returns:
            (B, N, D) tokens. Token 0 is the pooled one, which contrastive losses and classifiers read. Fusion attends
            to the others. N is 1 for a tower that has only the pooled token.
        """
        raise NotImplementedError

    def position_grids(self) -> Mapping[str, Grid]:
        """Return the position embeddings that lie on a patch grid, by parameter name."""
        return {}

    def forward_masked(self, image: Tensor, masked: Tensor, mask_token: Tensor) -> Tensor:
        """Encode images with the embeddings of some patches replaced by a mask token (Bao et al. 2022, eq. 2).

        Args:
            image: (B, 3, H, W) normalised.
            masked: (B, h w) bool.
            mask_token: (D,).

        Returns:
            (B, h w, D) final states of the patches.
        """
        raise UserError(f"{type(self).__name__} cannot mask patches; choose a ViT for masked image modelling")


class TextTower(Tower):
    """A text encoder.

    In addition to the members of `Tower`:

    | member | default | read by |
    |---|---|---|
    | ``forward(input_ids, attention_mask)`` | none | every model: (B, L) to (B, N, D), the pooled token first |
    | ``vocab_size`` | none | the check that the tokenizer fits |
    | ``max_length`` | none | the check of ``data.max_length`` |
    | ``returns_token_states`` | True | fusion (ALBEF): token i of the output is the state of input token i |
    | ``token_mask(attention_mask)`` | the mask | models: which output tokens are real |
    | ``get_input_embeddings()`` | None | masked language modelling: the word embeddings that the head is tied to |
    | ``forward_cutoff(...)`` | raises UserError | the Cutoff objective |
    | ``equal_passes`` | False | engines set it where passes communicate: their number must depend on B only |
    """

    vocab_size: int
    max_length: int
    returns_token_states: bool = True
    equal_passes: bool = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode texts.

        Args:
            input_ids: (B, L) int64, padded on the right.
            attention_mask: (B, L) bool, True at real tokens.

        Returns:
            (B, N, D) tokens. Token 0 is the pooled one. Where ``returns_token_states``, it is the state of the first
            input token (``[CLS]``), and N may be smaller than L: padding that all rows share can be dropped.
        """
        raise NotImplementedError

    def token_mask(self, attention_mask: Tensor) -> Tensor:
        """Return which tokens of the output are real, from the (B, L) bool mask of the input."""
        return attention_mask

    def get_input_embeddings(self) -> nn.Embedding | None:
        """Return the word embeddings, or None if the tower has no such table."""
        return None

    def forward_cutoff(self, input_ids: Tensor, attention_mask: Tensor, keep: Tensor) -> Tensor:
        """Encode texts with a part of the embedding layer's output set to zero (Shen et al. 2020).

        Args:
            input_ids: (B, L) int64, padded on the right.
            attention_mask: (B, L) bool.
            keep: (B, L, 1) or (B, 1, W) bool with W the width of the embeddings, False where the output is zeroed.

        Returns:
            As `forward`.
        """
        raise UserError(f"{type(self).__name__} cannot cut its embeddings; choose BertText for the Cutoff objective")


class PooledTextTower(TextTower):
    """A text tower that returns only its pooled token, (B, 1, D)."""

    returns_token_states = False

    def token_mask(self, attention_mask: Tensor) -> Tensor:
        """Return (B, 1), all True."""
        return attention_mask.new_ones(len(attention_mask), 1)


class PatchTower(Protocol):
    """The part of an image encoder with patches that heads for masked patches read."""

    @property
    def width(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def preprocess(self) -> Preprocess: ...


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a text tower's transformer layers, for the fusion and decoder layers that are stacked on top of it.

    Args:
        heads: Attention heads. None if the tower has no such layers: set them in the spec of fusion.
        hidden_size: Of the feed-forward part, or None likewise.
        dropout: Rate, for hidden states and attention alike.
        eps: Of the norms.
        positions: Position embeddings of a decoder. None means as many as the tower's ``max_length``.
        token_types: Token type embeddings of a decoder.
    """

    heads: int | None = None
    hidden_size: int | None = None
    dropout: float = 0.1
    eps: float = 1e-12
    positions: int | None = None
    token_types: int = 2


@dataclass(frozen=True)
class TowerSpec:
    """The description of a tower: a frozen dataclass of numbers, texts, tuples and dicts.

    | member | default | |
    |---|---|---|
    | ``build(load_weights)`` | none | the tower; with ``load_weights=False`` at random, since a checkpoint follows |
    | ``resolved()`` | the same spec | the spec with every size filled in that is otherwise read from weights |

    ``experiment.json`` stores the class by its import path, so it must be in a module, not in the config file itself.
    """

    def resolved(self) -> Self:
        """Return the same spec with all sizes filled in, so that ``build(load_weights=False)`` reads no weights."""
        return self

    def build(self, load_weights: bool = True) -> Tower:
        """Build the tower.

        Args:
            load_weights: False leaves the parameters random even where the spec names weights.

        Raises:
            UserError: if the sizes or the weights do not fit.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ImageTowerSpec(TowerSpec):
    """The description of an image tower, see `TowerSpec`."""

    def build(self, load_weights: bool = True) -> ImageTower:
        raise NotImplementedError


@dataclass(frozen=True)
class TextTowerSpec(TowerSpec):
    """The description of a text tower, see `TowerSpec`.

    In addition to the members of `TowerSpec`:

    | member | default | read by |
    |---|---|---|
    | ``layer_sizes()`` | heads and hidden size unknown | fusion and decoder, where their own spec leaves a size open |
    | ``head_weights()`` | None | masked language modelling: a transformers folder that may have a pre-trained head |
    """

    def build(self, load_weights: bool = True) -> TextTower:
        raise NotImplementedError

    def layer_sizes(self) -> LayerSizes:
        """Return the sizes of the tower's transformer layers."""
        return LayerSizes()

    def head_weights(self) -> str | None:
        """Return the transformers folder with the weights of a vocabulary head, or None to start it at random."""
        return None
