"""Fusion encoder: BERT layers in which texts also attend to the tokens of an image (ALBEF, Li et al. 2021, sec. 3.1).

Images are long and texts short, so most of the work is to project image tokens to keys and values. `FusionEncoder.project` does
that once per image, and every text that is fused with the image reads them in place. Linear layers process real tokens only.

B images, A texts, n pairs, P image tokens, L text tokens, D width, h heads, T text tokens of all pairs, M selected tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.encoders.activation_checkpointing import Checkpointing, checkpointed
from vlp.encoders.base import TextTowerSpec
from vlp.encoders.fusion_layer import Attend, FusionLayer
from vlp.encoders.initialisation import Init, init_std
from vlp.encoders.ragged import RaggedBatch
from vlp.encoders.text import BertText, read_encoder
from vlp.errors import UserError
from vlp.specs.fields import check_limits, setting
from vlp.weights import reading
from vlp.weights.bert import BERT_LAYER
from vlp.weights.reading import LoadReport
from vlp.weights.run import is_run, read_run

if TYPE_CHECKING:
    from typing_extensions import Self

CROSS = ("cross_attention", "cross_norm")
Outputs = Tensor | Literal["first"] | None
"""The outputs to compute: None for all, "first" for the first token of each pair, (M,) int64 for some tokens."""


@dataclass(frozen=True)
class Fusion:
    """Cross-attention layers on top of a text tower.

    Args:
        layers: Number of layers.
        weights: A BERT folder, ``pip:PACKAGE/folder`` or a run folder. Self-attention and feed-forward start from its layers,
            beginning with ``first_layer``. BERT has no cross-attention: that starts at random. None starts all at random.
        first_layer: ALBEF's text tower takes layers 0 to 5 of BERT, its fusion layers 6 to 11.
        images: Images per text. Each layer is repeated that many times in a row, once for each image, and the repetitions
            share the keys and values of images. ALBEF has 2 for NLVR2 and calls the repetitions twins.
        heads: Attention heads. None takes those of the weights, or else of the text tower.
        hidden_size: Of the feed-forward part, or None likewise.
        dropout: Rate, for hidden states and attention alike, or None likewise.
        eps: Of the norms, or None likewise.
        pack: Linear layers process real tokens only. False processes all L positions.
        init: Rule for random weights, see `vlp.encoders.initialisation`. "width" suits narrow layers.
    """

    layers: int = setting(6, least=1)
    weights: str | None = None
    first_layer: int = setting(6, least=0)
    images: int = setting(1, least=1)
    heads: int | None = setting(None, least=1)
    hidden_size: int | None = setting(None, least=1)
    dropout: float | None = setting(None, least=0, below=1)
    eps: float | None = setting(None, above=0)
    pack: bool = True
    init: Init = "published"

    def resolved(self, text: TextTowerSpec) -> Self:
        """Return the same spec with all sizes filled in, from ``weights`` or else from the text tower. Reads no weights.

        Raises:
            UserError: if the text tower has no layers whose sizes fusion could take.
        """
        given = {"heads": self.heads, "hidden_size": self.hidden_size, "dropout": self.dropout, "eps": self.eps}
        missing = [name for name, value in given.items() if value is None]
        if not missing:
            return self
        source = text
        if self.weights:
            source = BertText(self.weights, dropout=text.dropout if isinstance(text, BertText) else None)
        sizes = source.layer_sizes()
        found = {"heads": sizes.heads, "hidden_size": sizes.hidden_size, "dropout": sizes.dropout, "eps": sizes.eps}
        if unknown := [name for name in missing if found[name] is None]:
            raise UserError(
                f"the text tower ({type(source).__name__}) has no {' and '.join(unknown)} for fusion to take; set them "
                "in model.fusion"
            )
        return replace(self, **{name: found[name] for name in missing})

    def build(self, width: int, image_width: int, load_weights: bool = True) -> FusionEncoder:
        """Build the module of a `resolved` spec.

        Args:
            width: D of the text tower.
            image_width: Width of the image tower.
            load_weights: False leaves the parameters random even where ``weights`` is set.

        Raises:
            UserError: if the sizes do not go together, or the weights do not fit.
        """
        self.check(width)
        model = FusionEncoder(self, width, image_width)
        if load_weights and self.weights:
            model.report = self.load(model.layers, self.read_layers(self.read_weights()), CROSS)
        return model

    def check(self, width: int) -> None:
        """Raise UserError if layers of this width are impossible."""
        check_limits(self)
        if width % self.heads:
            raise UserError(
                f"fusion with {self.heads} heads on a text tower of width {width}; take heads that divide the width"
            )

    def read_weights(self) -> dict[str, Tensor]:
        """Return the tensors of ``weights`` by BERT's names."""
        return read_run(self.weights, "text.model") if is_run(self.weights) else read_encoder(self.weights, "bert")

    def read_layers(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the layers from ``first_layer`` on by the names of `FusionLayer`, numbered from 0."""
        layers = {}
        for number in range(self.layers * self.images):
            for theirs, ours in BERT_LAYER.items():
                old = f"encoder.layer.{self.first_layer + number // self.images}.{theirs}."
                layers |= {f"{number}.{ours}.{k.removeprefix(old)}": v for k, v in state.items() if k.startswith(old)}
        return layers

    def load(self, layers: nn.ModuleList, state: Mapping[str, Tensor], new: Collection[str]) -> LoadReport:
        """Load the state of the layers, in which the parts ``new`` may be missing.

        Raises:
            UserError: if the state does not fit.
        """
        names = [f"{number}.{name}" for number in range(len(layers)) for name in new]
        try:
            return reading.load(layers, state, new=names)
        except UserError as error:
            last = self.first_layer + self.layers - 1
            raise UserError(f"fusion from layers {self.first_layer} to {last} of {self.weights}: {error}") from error


@dataclass(frozen=True)
class CrossAttentionCache:
    """Keys and values of B images, or of B texts, for the cross-attention of every layer.

    Args:
        keys: (B, P, D) for each layer.
        values: (B, P, D) for each layer.
        mask: (B, P) bool of the real tokens. None if all are, as in images.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys[0])

    def __getitem__(self, rows: Tensor | slice) -> CrossAttentionCache:
        mask = None if self.mask is None else self.mask[rows]
        return CrossAttentionCache(tuple(k[rows] for k in self.keys), tuple(v[rows] for v in self.values), mask)

    def layer(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Return the keys and values of a layer."""
        return self.keys[number], self.values[number]


@dataclass(frozen=True)
class ImageTokens:
    """Image tokens that were not projected: cheaper than `CrossAttentionCache` for a single pass of short texts.

    The result is the same. With 13 tokens per text and 257 per image it takes a third of the operations.

    Args:
        tokens: (B, P, image width).
    """

    tokens: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def layer(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Return the tokens, and None: a layer then projects its queries instead."""
        return self.tokens, None


@dataclass(frozen=True)
class AlternatingImages:
    """Several images per text: the first layer attends to the first image, the second to the second, and so on in turn.

    Args:
        images: One cache per image of a text, of B rows each.
    """

    images: tuple[CrossAttentionCache, ...]

    def __len__(self) -> int:
        return len(self.images[0])

    def layer(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Return the keys and values of a layer."""
        return self.images[number % len(self.images)].layer(number)


class FusionEncoder(nn.Module):
    """The layers in which texts attend to images.

    Args:
        spec: Resolved.
        width: D of the texts.
        image_width: Width of the image tokens.
    """

    def __init__(self, spec: Fusion, width: int, image_width: int):
        super().__init__()
        sizes = (spec.heads, spec.hidden_size, spec.dropout, spec.eps)
        twins = [image_width] + [None] * (spec.images - 1)  # only the first of the twins projects images
        self.layers = nn.ModuleList(FusionLayer(width, source, *sizes) for _ in range(spec.layers) for source in twins)
        self.pack, self.images = spec.pack, spec.images
        self.checkpointing: Checkpointing = "none"
        self.report: LoadReport | None = None
        for module in self.modules():
            if isinstance(module, nn.Linear):  # initialised as in BERT
                nn.init.normal_(module.weight, std=init_std(spec.init, width))
                nn.init.zeros_(module.bias)

    def project(self, tokens: Tensor) -> CrossAttentionCache:
        """Project image tokens to the keys and values of every layer. This is the most expensive part of fusion.

        Args:
            tokens: (B, P, image width), without padding.
        """
        attentions = [layer.cross_attention for layer in self.layers[:: self.images]]
        keys = tuple(key for a in attentions for key in [a.key(tokens)] * self.images)  # (B, P, D) for each layer
        values = tuple(value for a in attentions for value in [a.value(tokens)] * self.images)
        return CrossAttentionCache(keys, values)

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor,
        image: CrossAttentionCache | ImageTokens | AlternatingImages,
        texts: Tensor | None = None,
        images: Tensor | None = None,
        at: Outputs = None,
    ) -> Tensor:
        """Fuse n pairs of texts and images.

        The first n - m pairs go through the B images in order, repeatedly, and read keys and values in place. For the last m
        pairs these are copied. The first self-attention runs once per text.

        Args:
            tokens: (A, L, D) from the text tower.
            mask: (A, L) bool, padding on the right. A text without any token counts as one of its first.
            image: B images. Project them if there is more than one pass, or if layers have twins.
            texts: (n,) int64 text of each pair. None takes each text once, n = A.
            images: (m,) int64 image of the last m pairs. None means m = 0.
            at: The outputs to compute. The last layer skips all others. None computes all, "first" those of the first token
                of each pair, (M,) int64 those at positions of real tokens in the flattened (n * L).

        Returns:
            (n, L, D), zero at padding unless ``pack`` is False; (n, D) for "first"; (M, D).

        Raises:
            ValueError: if n - m is not a multiple of B.
        """
        states, batch = self._run(tokens, mask, image, texts, images, at, self.pack, {})
        if at is not None:
            return states
        padded = batch.pad(states)  # (n, W, D)
        return F.pad(padded, (0, 0, 0, tokens.shape[1] - padded.shape[1]))

    def with_attention(
        self,
        layer: int,
        tokens: Tensor,
        mask: Tensor,
        image: CrossAttentionCache,
        texts: Tensor | None = None,
        images: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Fuse as `forward`, with the cross-attention of one layer as a part of the graph (for Grad-CAM).

        Slower, without packing, and without dropout of the attention in that layer.

        Args:
            layer: From 0. ALBEF's grounding reads layer 2 of its fusion, layer 8 of all.
            tokens: See `forward`, as for the arguments that follow.

        Returns:
            (n, L, D) fused states; (n, h, L, P) attention probabilities, with respect to which torch.autograd.grad can
            differentiate a function of the states.
        """
        count = len(mask if texts is None else texts)
        rows = torch.arange(count, device=mask.device) % len(image)
        if images is not None:
            rows[count - len(images) :] = images
        probabilities = []

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            probabilities.append((query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1))
            return probabilities[0] @ value

        states, batch = self._run(tokens, mask, image, texts, rows, None, False, {layer: attend})
        return batch.pad(states), probabilities[0]

    def _run(
        self,
        tokens: Tensor,
        mask: Tensor,
        image: CrossAttentionCache | ImageTokens | AlternatingImages,
        texts: Tensor | None,
        images: Tensor | None,
        at: Outputs,
        pack: bool,
        attend: Mapping[int, Attend],
    ) -> tuple[Tensor, RaggedBatch]:
        """Return (T, D) or (M, D) packed states and the batch of the pairs.

        Args:
            attend: Layer -> function that replaces fused attention there.
        """
        own = pairs = RaggedBatch.of_texts(mask, pack=pack)
        states = self._step(self.layers[0].read_text, own.pack(tokens[:, : own.width]), own)  # of the A texts
        if texts is not None:
            pairs = RaggedBatch.of_pairs(mask, texts, pack=pack)
            states = states[own.tokens_of(texts, pairs)]  # (T, D) of the n pairs
        outputs, length = None, mask.shape[1]
        if at is not None:
            outputs = pairs.first_tokens() if isinstance(at, str) else pairs.tokens_at(at // length, at % length)
        for number, layer in enumerate(self.layers):
            last = number == len(self.layers) - 1
            if number:
                states = self._step(layer.read_text, states, pairs, outputs if last else None)
            elif last and outputs is not None:  # a single layer, whose self-attention is done
                states = states[outputs.packed]
            rows = outputs if last and outputs is not None else pairs
            source = (*image.layer(number), images, attend.get(number))
            states = self._step(layer.read_image, states, rows, *source)
        return states, pairs

    def _step(self, part: Callable[..., Tensor], *inputs) -> Tensor:
        return checkpointed(part, self.checkpointing, *inputs)

    def layer_ids(self) -> dict[str, int]:
        """Return the depth of each parameter, from 1. Twins have the same."""
        return {name: int(name.split(".")[1]) // self.images + 1 for name, _ in self.named_parameters()}

    def set_activation_checkpointing(self, mode: Checkpointing) -> None:
        """Switch activation checkpointing of the layers. Keys and values of images are always kept."""
        self.checkpointing = mode
