"""A transformer with modality experts: one encoder of images, of texts, and of both together (VLMo, Bao et al. 2022).

B images, A texts, n rows, h x w patches, P = 1 + h w tokens of an image, L tokens of a text, W tokens of the longest text, S packed
tokens, M selected tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from vlp.data.preprocess import Interpolation, Preprocess, Triple
from vlp.encoders.activation_checkpointing import Checkpointing, checkpointed
from vlp.encoders.initialisation import Init, init_std
from vlp.encoders.mome_layer import Expert, MomeLayer
from vlp.encoders.ragged import OutputPositions, RaggedBatch
from vlp.encoders.relative_position import RelativePositions
from vlp.encoders.text import layer_ids
from vlp.errors import UserError
from vlp.specs.fields import check_limits, setting


@dataclass(frozen=True)
class Mome:
    """A multiway transformer, by default with the sizes of VLMo base. See `BASE`, `BASE_PLUS`, `LARGE`, `SMALL`, `TINY`.

    Args:
        width: D.
        layers: Number of layers.
        heads: Attention heads.
        hidden_size: Of the feed-forward experts. None is 4 D.
        vl_from: First layer in which the vision-language expert processes both modalities of a pair. Below it each modality
            has its own expert.
        experts: The experts of the model. "vl" needs the other two.
        layer_scale: Initial factor of the residual branches. None leaves it out.
        drop_path: Largest rate at which a row skips a residual branch, growing linearly with depth.
        text_dropout: Rate, on the embeddings of texts. The published code uses ``drop_path``.
        image_size: In pixels, one number or (H, W).
        patch_size: Side of a patch in pixels.
        image_kinds: Number of embeddings that tell the images of a sample apart. NLVR2 has two.
        vocab_size: V.
        max_text_length: Number of text positions.
        positions: "relative" adds biases by distance to the scores of each head of each layer, "absolute" adds embeddings.
        mean: Of the pixels, per channel.
        std: Of the pixels, per channel.
        interpolation: For resizing images.
        init: Rule for random weights, see `vlp.encoders.initialisation`. "width" suits narrow layers.
    """

    width: int = setting(768, least=1)
    layers: int = setting(12, least=1)
    heads: int = setting(12, least=1)
    hidden_size: int | None = setting(None, least=1)
    vl_from: int = 10
    experts: tuple[Expert, ...] = ("image", "text", "vl")
    layer_scale: float | None = 0.1
    drop_path: float = setting(0.1, least=0, below=1)
    text_dropout: float = setting(0.1, least=0, below=1)
    image_size: int | tuple[int, int] = 224
    patch_size: int = setting(16, least=1)
    image_kinds: int = setting(1, least=1)
    vocab_size: int = setting(30_522, least=1)
    max_text_length: int = setting(196, least=2)
    positions: Literal["relative", "absolute"] = "relative"
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)
    interpolation: Interpolation = "bicubic"
    init: Init = "published"

    def resolved(self) -> Mome:
        """Return the same spec with both sides of the images and the hidden size filled in."""
        return replace(
            self, image_size=tuple(to_2tuple(self.image_size)), hidden_size=self.hidden_size or 4 * self.width
        )

    def check(self) -> None:
        """Raise UserError for sizes that do not go together."""
        check_limits(self)
        size = to_2tuple(self.image_size)
        if "image" in self.experts and any(side % self.patch_size or side < self.patch_size for side in size):
            raise UserError(
                f"image_size {size[0]} x {size[1]} is not a multiple of patch_size {self.patch_size}; set it to one"
            )
        if self.width % self.heads:
            raise UserError(f"{self.heads} heads do not divide the width {self.width}; set heads to a divisor of it")
        if not self.experts or set(self.experts) - {"image", "text", "vl"}:
            raise UserError(f"experts are image, text and vl, not {self.experts}")
        if "vl" in self.experts:
            if len(set(self.experts)) < 3:
                raise UserError(f"the vl expert needs image and text, too; experts are {self.experts}")
            if not 0 <= self.vl_from < self.layers:
                raise UserError(f"vl_from is {self.vl_from}; with {self.layers} layers it is 0 to {self.layers - 1}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, (h, w)."""
        height, width = to_2tuple(self.image_size)
        return height // self.patch_size, width // self.patch_size


BASE = Mome()
BASE_PLUS = Mome(544, 24, 16, vl_from=21, layer_scale=None, max_text_length=40, positions="absolute")
LARGE = Mome(1024, 24, 16, vl_from=21)
SMALL = Mome(256, 6, 4, vl_from=4, drop_path=0.0, text_dropout=0.0, image_size=128, max_text_length=64)
TINY = replace(SMALL, width=192, heads=3, image_size=96)


class ImageEmbedding(nn.Module):
    """Patch embeddings, with a class token in front.

    Args:
        spec: Resolved.
    """

    def __init__(self, spec: Mome):
        super().__init__()
        self.size: tuple[int, int] = spec.image_size
        self.patches = nn.Conv2d(3, spec.width, spec.patch_size, spec.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(spec.width))
        self.kind = nn.Embedding(spec.image_kinds, spec.width)
        absolute = spec.positions == "absolute"
        self.positions = nn.Parameter(torch.zeros(1 + spec.grid[0] * spec.grid[1], spec.width)) if absolute else None

    def forward(
        self, image: Tensor, kind: int = 0, masked: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """Embed images.

        Args:
            image: (B, 3, H, W) normalised.
            kind: Number of the image within its sample.
            masked: (B, h w) bool, the patches to replace by ``mask_token``. None replaces none.
            mask_token: (D,).

        Returns:
            (B, P, D).

        Raises:
            ValueError: if the images have another size.
        """
        if tuple(image.shape[-2:]) != tuple(self.size):
            raise ValueError(f"images of {tuple(image.shape[-2:])} pixels; this encoder takes {tuple(self.size)}")
        patches = self.patches(image).flatten(2).mT  # (B, D, h, w) -> (B, h w, D)
        if masked is not None:
            patches = torch.where(masked[:, :, None], mask_token.to(patches.dtype), patches)
        tokens = torch.cat([self.cls_token.to(patches.dtype).expand(len(image), 1, -1), patches], 1)  # (B, P, D)
        if self.positions is not None:
            tokens = tokens + self.positions
        return tokens + self.kind.weight[kind]


class TextEmbedding(nn.Module):
    """BERT's embeddings: words, token type, and absolute positions if there are any, then norm and dropout.

    Args:
        spec: Resolved.
    """

    def __init__(self, spec: Mome):
        super().__init__()
        self.max_length, absolute = spec.max_text_length, spec.positions == "absolute"
        self.words = nn.Embedding(spec.vocab_size, spec.width)
        self.token_types = nn.Embedding(2, spec.width)  # only the first is used, as in BERT for a single sentence
        self.positions = nn.Embedding(spec.max_text_length, spec.width) if absolute else None
        self.norm = nn.LayerNorm(spec.width, eps=1e-12)
        self.dropout = nn.Dropout(spec.text_dropout)
        self.kind = nn.Parameter(torch.zeros(spec.width))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return (A, L, D) embeddings of (A, L) int64 ids.

        Raises:
            ValueError: if L exceeds ``max_length``.
        """
        length = input_ids.shape[1]
        if length > self.max_length:
            raise ValueError(f"texts of {length} tokens; this encoder has positions for {self.max_length}")
        tokens = self.words(input_ids) + self.token_types.weight[0]
        if self.positions is not None:
            tokens = tokens + self.positions.weight[:length]
        return self.dropout(self.norm(tokens)) + self.kind


class MomeEncoder(nn.Module):
    """Embeddings, layers and a final norm.

    Args:
        spec: Sizes and experts.
        alone: Modalities that go through all layers without the other one, and so have their expert in every layer.
        together: Whether there are sequences of a text and an image.

    Raises:
        UserError: if the sizes do not go together.
    """

    def __init__(self, spec: Mome, alone: Sequence[Expert], together: bool):
        super().__init__()
        spec.check()
        spec = spec.resolved()
        self.width, self.grid, self.vl_from = spec.width, spec.grid, spec.vl_from
        self.alone, self.joint = tuple(alone), "vl" in spec.experts
        self.vocab_size, self.max_length = spec.vocab_size, spec.max_text_length
        self.preprocess = Preprocess(spec.image_size, spec.mean, spec.std, spec.interpolation)
        self.image = ImageEmbedding(spec) if "image" in spec.experts else None
        self.text = TextEmbedding(spec) if "text" in spec.experts else None
        self.positions = None
        if spec.positions == "relative":
            grid = spec.grid if self.image is not None else None
            length = spec.max_text_length if self.text is not None else None
            self.positions = RelativePositions(spec.layers, spec.heads, grid, length, together)
        self.layers = nn.ModuleList(
            MomeLayer(
                spec.width,
                spec.heads,
                spec.hidden_size,
                1e-6,
                self._experts(spec, number),
                spec.layer_scale,
                spec.drop_path * number / max(1, spec.layers - 1),
            )
            for number in range(spec.layers)
        )
        self.norm = nn.LayerNorm(spec.width, eps=1e-6)
        self.checkpointing: Checkpointing = "none"
        std = init_std(spec.init, spec.width)
        self.apply(partial(_initialise, std=std))
        for parameter in (
            p for n, p in self.named_parameters() if n in ("image.cls_token", "image.positions", "text.kind")
        ):
            nn.init.trunc_normal_(parameter, std=std)

    def _experts(self, spec: Mome, layer: int) -> list[Expert]:
        if not self.joint:
            return [name for name in ("image", "text") if name in spec.experts]
        if layer < spec.vl_from:
            return ["image", "text"]
        return [*self.alone, "vl"]

    def forward(
        self,
        batch: RaggedBatch,
        text: Tensor | None = None,
        image: Tensor | None = None,
        joint: bool = False,
        outputs: OutputPositions | None = None,
    ) -> Tensor:
        """Apply all layers to embedded texts, images, or pairs.

        Args:
            batch: n texts, images or pairs.
            text: (n, L, D), or None.
            image: (n, P, D), or None.
            joint: Whether the top layers use the vision-language expert.
            outputs: The tokens to compute outputs of. None computes all.

        Returns:
            (S, D) or (M, D), after the final norm.
        """
        states = self.pack(batch, text, image)
        return self.norm(self.run_layers(states, batch, 0, len(self.layers), joint, outputs))

    def pack(self, batch: RaggedBatch, text: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        """Pack (n, L, D) texts and (n, P, D) images to (S, D) tokens."""
        parts = [] if text is None else [text[:, : batch.width]]
        return batch.pack(torch.cat([*parts, *([] if image is None else [image])], 1))

    def run_layers(
        self,
        states: Tensor,
        batch: RaggedBatch,
        first: int,
        last: int,
        joint: bool,
        outputs: OutputPositions | None = None,
    ) -> Tensor:
        """Apply the layers from ``first`` up to and without ``last`` to (S, D) states.

        Returns:
            (S, D), or (M, D) of ``outputs``, before the final norm.
        """
        biases = self.positions and self.positions(batch.width, batch.patches > 0)
        for number in range(first, last):
            layer, bias = self.layers[number], biases and biases[number]
            with_vl = joint and number >= self.vl_from
            inputs = (states, batch, bias, with_vl, outputs if number == last - 1 else None)
            states = checkpointed(layer, self.checkpointing, *inputs)
        return states

    def layer_ids(self) -> dict[str, int]:
        """Return each parameter's depth: embeddings and positions 0, layers 1 to L, final norm L + 1."""
        return layer_ids(self, r"layers\.(\d+)\.", last=["norm."])

    def no_weight_decay(self) -> set[str]:
        """Return the names of positions, kinds, token types, the class token, norms and biases."""
        named = ("image.kind", "image.positions", "text.token_types", "text.positions", "positions.")
        return {n for n, p in self.named_parameters() if p.ndim == 1 or n.startswith(named)}

    def set_activation_checkpointing(self, mode: Checkpointing) -> None:
        """Switch activation checkpointing of the layers."""
        self.checkpointing = mode


def _initialise(module: nn.Module, std: float) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
