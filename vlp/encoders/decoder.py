"""A decoder that writes texts: causal BERT layers with cross-attention to what they are about (ALBEF, Li et al. 2021, fig. 4).

For an answer that is fusion's states of image and question, for a caption the image's tokens. Whatever is the same for many
texts runs once: the source's keys and values, and the tokens that texts begin with (`KVCache`). The last token of a text is
never read, since nothing follows it, and the vocabulary head sees no position but those that predict a real token.

Q sources, n texts, L tokens of a text, S tokens of a source, T tokens that are read and followed by one, D width, h heads, V
vocabulary, R tokens read before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.encoders.activation_checkpointing import Checkpointing, checkpointed
from vlp.encoders.base import LayerSizes, TextTower
from vlp.encoders.fusion import CROSS, CrossAttentionCache, Fusion
from vlp.encoders.fusion_layer import FusionLayer, merge_heads
from vlp.encoders.heads import VocabularyHead
from vlp.encoders.ragged import Layout
from vlp.weights import reading
from vlp.weights.reading import LoadReport


@dataclass(frozen=True)
class Decoder(Fusion):
    """Layers that write, as many and as large as those of `Fusion`, from whose fields theirs are.

    Args:
        weights: a BERT folder, from whose layers ``first_layer`` on self-attention and feed-forward start, and from the rest of
            which embeddings and head do. Not used where the whole model starts from other weights: without a decoder
            among these, it starts as their fusion layers, as published.
        source: what it writes about: "fusion" of image and text, or the "image" alone.
    """

    source: Literal["fusion", "image"] = "fusion"

    def build(self, text: TextTower, sizes: LayerSizes, source_width: int, load_weights: bool = True) -> AnswerDecoder:
        """Build the decoder of a `resolved` spec.

        Args:
            text: Text tower, whose width, vocabulary and longest text the decoder takes.
            sizes: Of the layers of ``text``.
            source_width: Of the source's tokens.
            load_weights: False leaves the parameters random even where ``weights`` is set.

        Raises:
            UserError: if the sizes do not go together, or the weights do not fit.
        """
        self.check(text.width)
        model = AnswerDecoder(self, text, sizes, source_width)
        if load_weights and self.weights:
            given = self.read_weights()
            model.report = self.load(model.layers, self.read_layers(given), CROSS)
            words = {k.removeprefix("embeddings."): v for k, v in given.items() if k.startswith("embeddings.")}
            reading.load(model.embeddings, words, ignored=("position_ids",))
            model.head.load(self.weights)
        return model


@dataclass(frozen=True)
class KVCache:
    """Self-attention's keys and values of the tokens that were read, (n, h, R, D / h) for every layer.

    Args:
        length: R.
    """

    length: int = 0
    layers: tuple[tuple[Tensor, Tensor], ...] = ()

    def __getitem__(self, rows: Tensor) -> KVCache:
        return KVCache(self.length, tuple((key[rows], value[rows]) for key, value in self.layers))


class WordEmbeddings(nn.Module):
    """BERT's: words, positions and the first token type, summed and normalised; named as BERT names them."""

    def __init__(self, width: int, vocab_size: int, positions: int, token_types: int, dropout: float, eps: float):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(token_types, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)
        for part in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            nn.init.normal_(part.weight, std=0.02)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """(T,) ids and where they stand in their texts, to (T, D)."""
        words = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(words + self.position_embeddings(positions)))


class DecoderLayer(FusionLayer):
    """Fusion's layer, of which each token sees those before it alone."""

    def write(self, states: Tensor, layout: Layout, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """Self-attention of (T, D) states, and all keys and values, (n, h, R + W, D / h) each.

        Padding stands on the right, where nothing before it looks: it needs no mask.
        """
        attention = self.self_attention
        query, key, value = (
            attention.split(layout.pad(part(states))) for part in (attention.query, attention.key, attention.value)
        )
        causal = None
        if past is not None:
            before, width = past[0].shape[2], layout.width
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
            causal = torch.ones(width, before + width, dtype=torch.bool, device=key.device).tril(before)
        dropout = attention.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, causal, dropout, is_causal=past is None)
        states = self.self_norm(states + self.dropout(attention.out(layout.pack(merge_heads(attended)))))
        return states, key, value


@dataclass(frozen=True)
class Generated:
    """What was read of n texts.

    Args:
        states: (T, D) of the last layer.
        layout: where these stand in the texts.
        past: what was read before, and now; of use where all texts are of one length.
    """

    states: Tensor
    layout: Layout
    past: KVCache


class AnswerDecoder(nn.Module):
    """What comes next, given what was written and what it is about.

    Args:
        spec: resolved.
        text: tower, whose vocabulary and width it takes.
        sizes: of its layers.
        source_width: of the source's tokens.
    """

    def __init__(self, spec: Decoder, text: TextTower, sizes: LayerSizes, source_width: int):
        super().__init__()
        self.max_length: int = sizes.positions or text.max_length
        self.embeddings = WordEmbeddings(
            text.width, text.vocab_size, self.max_length, sizes.token_types, spec.dropout, spec.eps
        )
        layer = (text.width, source_width, spec.heads, spec.hidden_size, spec.dropout, spec.eps)
        self.layers = nn.ModuleList(DecoderLayer(*layer) for _ in range(spec.layers))
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):  # as BERT
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.head = VocabularyHead(text.width, self.embeddings.word_embeddings, sizes.eps)
        self.source, self.pack = spec.source, spec.pack
        self.checkpointing: Checkpointing = "none"
        self.report: LoadReport | None = None

    def project(self, tokens: Tensor, mask: Tensor | None = None) -> CrossAttentionCache:
        """(Q, S, source width), and their (Q, S) bool mask, padding on the right, to the keys and values of every layer."""
        if mask is not None:
            mask = mask.clone()
            mask[:, 0] = True  # attention over nothing is NaN
        attentions = [layer.cross_attention for layer in self.layers]
        keys, values = tuple(a.key(tokens) for a in attentions), tuple(a.value(tokens) for a in attentions)
        return CrossAttentionCache(keys, values, mask)

    def read(
        self,
        input_ids: Tensor,
        mask: Tensor,
        source: CrossAttentionCache,
        rows: Tensor | None = None,
        past: KVCache = KVCache(),
    ) -> Generated:
        """n texts that go on from ``past``.

        Args:
            input_ids: (n, L) int64.
            mask: (n, L) bool, padding on the right.
            rows: (n,) int64 source of each text; None = they go through the Q sources in order, again and again, and read
                keys and values where they are.

        Raises:
            ValueError: if there are more tokens than positions.
        """
        if past.length + input_ids.shape[1] > self.max_length:
            raise ValueError(
                f"texts of {past.length + input_ids.shape[1]} tokens; there are {self.max_length} positions"
            )
        layout = Layout.of(mask, self.pack)
        ids = layout.pack(input_ids[:, : layout.width, None])[:, 0]
        places = torch.arange(layout.width, device=ids.device).expand(layout.rows, -1)
        states = self.embeddings(ids, past.length + layout.pack(places[..., None])[:, 0])
        kept = []
        for number, layer in enumerate(self.layers):
            before = past.layers[number] if past.layers else None
            states, *pair = self._step(layer.write, states, layout, before)
            given = (*source.layer(number), rows, None, source.mask)
            states = self._step(layer.read_image, states, layout, *given)
            kept.append(tuple(pair))
        return Generated(states, layout, KVCache(past.length + layout.width, tuple(kept)))

    def words(self, states: Tensor) -> Tensor:
        """(T, D) to (T, V) logits of what comes next."""
        return self.head(states, self.embeddings.word_embeddings)

    def predict(
        self,
        input_ids: Tensor,
        mask: Tensor,
        source: CrossAttentionCache,
        rows: Tensor | None = None,
        past: KVCache = KVCache(),
    ) -> Predicted:
        """Every token of (n, L) texts but the first, from those before it; arguments as those of `read`."""
        follows = mask[:, 1:]
        written = self.read(input_ids[:, :-1], follows, source, rows, past)
        layout = written.layout
        places = torch.stack(
            [follows, input_ids[:, 1:], torch.arange(len(mask), device=mask.device)[:, None].expand_as(follows)], 2
        )
        # one token stands even where nothing follows, and without packing padding does
        real, labels, text = layout.pack(places[:, : layout.width]).unbind(1)
        kept = real.bool()
        return Predicted(self.words(written.states[kept]), labels[kept], text[kept])

    def _step(self, part, *given):
        return checkpointed(part, self.checkpointing, *given)

    def layer_ids(self) -> dict[str, int]:
        """Parameter name to layer, from 1, embeddings 0; the head comes after the last."""
        depth = {name: int(name.split(".")[1]) + 1 for name, _ in self.named_parameters() if name.startswith("layers.")}
        top = len(self.layers) + 1
        return {n: depth.get(n, 0 if n.startswith("embeddings.") else top) for n, _ in self.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are no weights: embeddings of positions and of token types."""
        return {f"embeddings.{name}.weight" for name in ("position_embeddings", "token_type_embeddings")}

    def set_activation_checkpointing(self, how: Checkpointing) -> None:
        """See `vlp.encoders.activation_checkpointing`."""
        self.checkpointing = how


@dataclass(frozen=True)
class Predicted:
    """The tokens of n texts, the first apart.

    Args:
        logits: (T, V).
        labels: (T,) int64, what stands there.
        text: (T,) int64, of which text.
    """

    logits: Tensor
    labels: Tensor
    text: Tensor
