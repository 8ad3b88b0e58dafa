"""Fusion of texts with images: BERT layers that also attend to the tokens of an image (ALBEF, Li et al. 2021, sec. 3.1).

An image is long and a text short, so what an image costs here is the projection to its keys and values. `project` does
that once, and every text that is fused with the image reads them in place. Linear layers see real tokens only.

B images, A texts, n pairs, P image tokens, L text tokens, W <= L of the longest text, D width, h heads, T real tokens of all
texts.
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
from vlp.encoders.ragged import Layout
from vlp.encoders.text import BertText, read_encoder
from vlp.errors import UserError
from vlp.weights import reading
from vlp.weights.bert import BERT_LAYER
from vlp.weights.reading import LoadReport
from vlp.weights.run import is_run, read_run

if TYPE_CHECKING:
    from typing_extensions import Self

CROSS = ("cross_attention", "cross_norm")
Wanted = Tensor | Literal["first"] | None


@dataclass(frozen=True)
class Fusion:
    """Layers of cross-attention on top of a text tower.

    Args:
        layers: how many.
        weights: a BERT folder, ``pip:PACKAGE/folder`` or the folder of a run, from whose layers ``first_layer`` on
            self-attention and feed-forward start; BERT has no cross-attention, that is new. None = all random.
        first_layer: ALBEF's text tower takes layers 0 to 5, its fusion 6 to 11.
        images: how many a text looks at: every layer stands so many times in a row, each time for the next image, with
            keys and values of images in common (ALBEF's NLVR2 has 2: twins).
        heads: None = as in the weights, or else the text tower.
        hidden_size: of the feed-forward part; None = likewise.
        dropout: of hidden states and attention alike; None = likewise.
        eps: of the norms; None = likewise.
        pack: linear layers see real tokens only, for whose number a GPU's host waits (once, twice with ``texts``; a CPU
            loses nothing). False = all L positions, nothing waits.
    """

    layers: int = 6
    weights: str | None = None
    first_layer: int = 6
    images: int = 1
    heads: int | None = None
    hidden_size: int | None = None
    dropout: float | None = None
    eps: float | None = None
    pack: bool = True

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
        """The module of a `resolved` spec.

        Args:
            width: D of the text tower.
            image_width: of the image tower.
            load_weights: False = leave the parameters random whatever ``weights`` says: a checkpoint follows.

        Raises:
            UserError: if the sizes do not go together, or the weights do not fit.
        """
        self.check(width)
        model = FusionEncoder(self, width, image_width)
        if load_weights and self.weights:
            model.report = self.load(model.layers, self.read_layers(self.read_weights()), CROSS)
        return model

    def check(self, width: int) -> None:
        """Raises UserError where layers cannot be of this width."""
        if self.images < 1:
            raise UserError(f"fusion with {self.images} images a text; give 1 or more")
        if self.layers < 1 or width % self.heads:
            raise UserError(
                f"fusion of {self.layers} layers with {self.heads} heads on a text tower of width {width}; "
                "take at least one layer, and heads that divide the width"
            )

    def read_weights(self) -> dict[str, Tensor]:
        """What ``weights`` names, by BERT's names."""
        return read_run(self.weights, "text.model") if is_run(self.weights) else read_encoder(self.weights, "bert")

    def read_layers(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The layers from ``first_layer`` on, by our names, numbered from 0."""
        state = {}
        for number in range(self.layers * self.images):
            for theirs, ours in BERT_LAYER.items():
                old = f"encoder.layer.{self.first_layer + number // self.images}.{theirs}."
                state |= {f"{number}.{ours}.{k.removeprefix(old)}": v for k, v in given.items() if k.startswith(old)}
        return state

    def load(self, layers: nn.ModuleList, state: Mapping[str, Tensor], fresh: Collection[str]) -> LoadReport:
        """Takes the state of the layers, of which the parts ``fresh`` may be missing. Raises UserError where it does not fit."""
        new = [f"{number}.{name}" for number in range(len(layers)) for name in fresh]
        try:
            return reading.load(layers, state, new=new)
        except UserError as error:
            last = self.first_layer + self.layers - 1
            raise UserError(f"fusion from layers {self.first_layer} to {last} of {self.weights}: {error}") from error


@dataclass(frozen=True)
class CrossAttentionCache:
    """What is read of B images, or of B texts: keys and values, each (B, P, D) for every layer.

    Args:
        mask: (B, P) bool, which tokens are real; None = all, as of images.
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
        return self.keys[number], self.values[number]


@dataclass(frozen=True)
class ImageTokens:
    """Images as they left their tower, (B, P, image width): for a single pass of short texts the cheaper way.

    The result is the same. With 13 tokens a text and 257 an image it takes a third of the operations.
    """

    tokens: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def layer(self, number: int) -> tuple[Tensor, Tensor | None]:
        return self.tokens, None


@dataclass(frozen=True)
class AlternatingImages:
    """Several images of each text, B of each: the layers look at the first, the second, ..., and the first again."""

    images: tuple[CrossAttentionCache, ...]

    def __len__(self) -> int:
        return len(self.images[0])

    def layer(self, number: int) -> tuple[Tensor, Tensor | None]:
        return self.images[number % len(self.images)].layer(number)


class FusionEncoder(nn.Module):
    """What texts become when they look at images.

    Args:
        spec: resolved.
        width: D of the texts.
        image_width: of the image tokens.
    """

    def __init__(self, spec: Fusion, width: int, image_width: int):
        super().__init__()
        sizes = (spec.heads, spec.hidden_size, spec.dropout, spec.eps)
        twins = [image_width] + [None] * (spec.images - 1)
        self.layers = nn.ModuleList(FusionLayer(width, source, *sizes) for _ in range(spec.layers) for source in twins)
        self.pack, self.images = spec.pack, spec.images
        self.checkpointing: Checkpointing = "none"
        self.report: LoadReport | None = None
        for module in self.modules():
            if isinstance(module, nn.Linear):  # as BERT
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def project(self, tokens: Tensor) -> CrossAttentionCache:
        """(B, P, image width), all of them real, to the keys and values of every layer: the dearest part of fusion."""
        attentions = [layer.cross_attention for layer in self.layers[:: self.images]]
        keys, values = [a.key(tokens) for a in attentions], [a.value(tokens) for a in attentions]
        return CrossAttentionCache(*(tuple(x for x in each for _ in range(self.images)) for each in (keys, values)))

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor,
        image: CrossAttentionCache | ImageTokens | AlternatingImages,
        texts: Tensor | None = None,
        images: Tensor | None = None,
        at: Wanted = None,
    ) -> Tensor:
        """Texts fused with images, n pairs of them.

        The first n - len(``images``) pairs go through the B images in their order, again and again, and read keys and
        values where they are; for the others these are copied. The first self-attention runs once a text.

        Args:
            tokens: (A, L, D) of the text tower.
            mask: (A, L) bool, padding on the right; a text without any token counts as one of its first.
            image: B of them, projected if there is more than one pass, or if layers have twins.
            texts: (n,) int64 text of each pair; None = each once, n = A.
            images: (m,) int64 image of the last m pairs; None = m is 0.
            at: which outputs are wanted, the last layer computes no others: None = all; "first" = of each pair's first
                token; (M,) int64 = at these positions, of real tokens, in the flattened (n * L).

        Returns:
            (n, L, D), with zeros where there is no token unless ``pack`` is False; (n, D) for "first"; (M, D).

        Raises:
            ValueError: if the pairs in order are no whole rounds of the images.
        """
        states, layout = self._run(tokens, mask, image, texts, images, at, self.pack, {})
        if at is not None:
            return states
        padded = layout.pad(states)
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
        """As `forward`, slowly, with the cross-attention of one layer as a part of the graph (for Grad-CAM).

        Dropout of attention is left out there. Without packing, whatever `Fusion.pack` says.

        Args:
            layer: from 0; ALBEF's grounding looks at layer 2 of its fusion, 8 in all.

        Returns:
            (n, L, D) fused; (n, heads, L, P) probabilities, which torch.autograd.grad can differentiate a function of
            the fused states by.
        """
        count = len(mask if texts is None else texts)
        rows = torch.arange(count, device=mask.device) % len(image)
        if images is not None:
            rows[count - len(images) :] = images
        seen = []

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            seen.append((query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1))
            return seen[0] @ value

        states, layout = self._run(tokens, mask, image, texts, rows, None, False, {layer: attend})
        return layout.pad(states), seen[0]

    def _run(
        self,
        tokens: Tensor,
        mask: Tensor,
        image: CrossAttentionCache | ImageTokens | AlternatingImages,
        texts: Tensor | None,
        images: Tensor | None,
        at: Wanted,
        packed: bool,
        attend: Mapping[int, Attend],
    ) -> tuple[Tensor, Layout]:
        """Packed states and their layout; ``attend``: by layer, what to do in the place of fused attention."""
        own = pairs = Layout.of(mask, packed)
        states = self._step(self.layers[0].read_text, own.pack(tokens[:, : own.width]), own)
        if texts is not None:
            pairs = Layout.of(mask[texts], packed)
            states = states[own.packed(pairs.source(texts, own.width))]
        out, pick = (pairs, None) if at is None else pairs.part(at, mask.shape[1], mask.device)
        for number, layer in enumerate(self.layers):
            last = number == len(self.layers) - 1
            if number:
                states = self._step(layer.read_text, states, pairs, *((out, pick) if last else ()))
            elif last and pick is not None:  # a single layer's self-attention is done
                states = states[pick]
            given = (*image.layer(number), images, attend.get(number))
            states = self._step(layer.read_image, states, out if last else pairs, *given)
        return states, out

    def _step(self, part: Callable[..., Tensor], *given) -> Tensor:
        return checkpointed(part, self.checkpointing, *given)

    def layer_ids(self) -> dict[str, int]:
        """Parameter name to layer, from 1; twins are one."""
        return {name: int(name.split(".")[1]) // self.images + 1 for name, _ in self.named_parameters()}

    def set_activation_checkpointing(self, how: Checkpointing) -> None:
        """See `vlp.encoders.activation_checkpointing`; keys and values of images are kept."""
        self.checkpointing = how
