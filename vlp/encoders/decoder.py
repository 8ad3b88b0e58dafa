"""A text decoder: causal BERT layers with cross-attention to a source (ALBEF, Li et al. 2021, fig. 4).

For answers the source is the fused states of image and question, for captions the image tokens. Work that is the same for
many texts runs once: the keys and values of the source, and the tokens that texts begin with (`KVCache`). The last token of a
text is not processed, since nothing follows it, and the vocabulary head computes only positions that predict a real token.

Q sources, n texts, L tokens of a text, S tokens of a source, T tokens that are processed, R tokens in the cache, M predicted
tokens, D width, h heads, V vocabulary.
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
from vlp.encoders.initialisation import init_std
from vlp.encoders.ragged import RaggedBatch, text_lengths
from vlp.types import keep_host_copy, on_host
from vlp.weights import reading
from vlp.weights.reading import LoadReport


@dataclass(frozen=True)
class Decoder(Fusion):
    """A decoder with the layers and sizes of `Fusion`, whose fields it has.

    Args:
        weights: A BERT folder. Self-attention and feed-forward start from its layers, beginning with ``first_layer``, the
            embeddings and the head from its other weights. Not used if the whole model starts from other weights: without a
            decoder among these, the decoder starts as their fusion layers, as published.
        source: The decoder attends to the "fusion" of image and text, or only to the "image".
    """

    source: Literal["fusion", "image"] = "fusion"

    def build(self, text: TextTower, sizes: LayerSizes, source_width: int, load_weights: bool = True) -> AnswerDecoder:
        """Build the decoder of a `resolved` spec.

        Args:
            text: Text tower, whose width, vocabulary and longest text the decoder takes.
            sizes: Sizes of the layers of ``text``.
            source_width: Width of the source's tokens.
            load_weights: False leaves the parameters random even where ``weights`` is set.

        Raises:
            UserError: if the sizes do not go together, or the weights do not fit.
        """
        self.check(text.width)
        model = AnswerDecoder(self, text, sizes, source_width)
        if load_weights and self.weights:
            state = self.read_weights()
            model.report = self.load(model.layers, self.read_layers(state), CROSS)
            words = {k.removeprefix("embeddings."): v for k, v in state.items() if k.startswith("embeddings.")}
            reading.load(model.embeddings, words, ignored=("position_ids",))
            model.head.load(self.weights)
        return model


@dataclass(frozen=True)
class KVCache:
    """Keys and values of self-attention for the tokens that were processed before.

    Args:
        length: R.
        layers: (n, h, R, D / h) keys and values for each layer.
    """

    length: int = 0
    layers: tuple[tuple[Tensor, Tensor], ...] = ()

    def __getitem__(self, rows: Tensor) -> KVCache:
        return KVCache(self.length, tuple((key[rows], value[rows]) for key, value in self.layers))


EMPTY = KVCache()


class WordEmbeddings(nn.Module):
    """BERT's embeddings, by BERT's names: words, positions and the first token type, summed and normalised.

    Args:
        width: D.
        vocab_size: V.
        positions: Number of positions.
        token_types: Number of token types, of which only the first is used.
        dropout: Rate.
        eps: Of the norm.
        std: Standard deviation of the random embeddings.
    """

    def __init__(
        self, width: int, vocab_size: int, positions: int, token_types: int, dropout: float, eps: float, std: float
    ):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(token_types, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)
        for part in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            nn.init.normal_(part.weight, std=std)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Return (T, D) embeddings of (T,) ids at (T,) positions of their texts."""
        words = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(words + self.position_embeddings(positions)))


class DecoderLayer(FusionLayer):
    """A fusion layer with causal self-attention."""

    def read_causally(
        self, states: Tensor, batch: RaggedBatch, cached: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Causal self-attention with its residual branch and norm.

        Padding is on the right, where the causal mask hides it from every real token. It needs no mask of its own.

        Args:
            states: (T, D).
            batch: Where the T tokens are.
            cached: (n, h, R, D / h) keys and values of the tokens before, or None.

        Returns:
            (T, D) states, and all keys and values, (n, h, R + W, D / h) each.
        """
        attention = self.self_attention
        query, key, value = (
            attention.split(batch.pad(part(states))) for part in (attention.query, attention.key, attention.value)
        )  # (n, h, W, D / h)
        causal = None
        if cached is not None:
            before, width = cached[0].shape[2], batch.width
            key, value = torch.cat([cached[0], key], 2), torch.cat([cached[1], value], 2)  # (n, h, R + W, D / h)
            causal = torch.ones(width, before + width, dtype=torch.bool, device=key.device).tril(before)
        dropout = attention.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, causal, dropout, is_causal=cached is None)
        states = self.self_norm(states + self.dropout(attention.out(batch.pack(merge_heads(attended)))))
        return states, key, value


@dataclass(frozen=True)
class DecodedStates:
    """Final states of n texts.

    Args:
        states: (T, D).
        batch: Where the T tokens are in the texts.
        cache: Keys and values of all tokens so far. Only valid for texts of equal length.
    """

    states: Tensor
    batch: RaggedBatch
    cache: KVCache


@dataclass(frozen=True)
class Predicted:
    """Predictions of every token of n texts but the first.

    Args:
        logits: (M, V).
        labels: (M,) int64 true tokens.
        text: (M,) int64 text that each token belongs to.
    """

    logits: Tensor
    labels: Tensor
    text: Tensor


class AnswerDecoder(nn.Module):
    """Predicts the next token of a text from the tokens before it and from a source.

    Args:
        spec: Resolved.
        text: Text tower, whose width, vocabulary and longest text the decoder takes.
        sizes: Sizes of the layers of ``text``.
        source_width: Width of the source's tokens.
    """

    def __init__(self, spec: Decoder, text: TextTower, sizes: LayerSizes, source_width: int):
        super().__init__()
        self.max_length: int = sizes.positions or text.max_length
        std = init_std(spec.init, text.width)
        self.embeddings = WordEmbeddings(
            text.width, text.vocab_size, self.max_length, sizes.token_types, spec.dropout, spec.eps, std
        )
        layer = (text.width, source_width, spec.heads, spec.hidden_size, spec.dropout, spec.eps)
        self.layers = nn.ModuleList(DecoderLayer(*layer) for _ in range(spec.layers))
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):  # initialised as in BERT
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        self.head = VocabularyHead(text.width, self.embeddings.word_embeddings, sizes.eps, std)
        self.source, self.pack = spec.source, spec.pack
        self.checkpointing: Checkpointing = "none"
        self.report: LoadReport | None = None

    def project(self, tokens: Tensor, mask: Tensor | None = None) -> CrossAttentionCache:
        """Project the tokens of sources to the keys and values of every layer.

        Args:
            tokens: (Q, S, source width).
            mask: (Q, S) bool of the real tokens, padding on the right. None if all are.
        """
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
        cache: KVCache = EMPTY,
    ) -> DecodedStates:
        """Process the tokens of n texts.

        Args:
            input_ids: (n, L) int64.
            mask: (n, L) bool, padding on the right.
            source: Q sources, see `project`.
            rows: (n,) int64 source of each text. None takes the Q sources in order, repeatedly, and reads keys and values in
                place.
            cache: Of the tokens before, which ``input_ids`` continue.

        Raises:
            ValueError: if there are more tokens than positions.
        """
        if cache.length + input_ids.shape[1] > self.max_length:
            raise ValueError(
                f"texts of {cache.length + input_ids.shape[1]} tokens; there are {self.max_length} positions"
            )
        batch = RaggedBatch.of_texts(mask, pack=self.pack)
        ids = batch.pack(input_ids[:, : batch.width, None])[:, 0]  # (T,)
        positions = torch.arange(batch.width, device=ids.device).expand(batch.rows, -1)
        states = self.embeddings(ids, cache.length + batch.pack(positions[..., None])[:, 0])  # (T, D)
        layers = []
        for number, layer in enumerate(self.layers):
            cached = cache.layers[number] if cache.layers else None
            states, key, value = self._step(layer.read_causally, states, batch, cached)
            states = self._step(layer.read_image, states, batch, *source.layer(number), rows, None, source.mask)
            layers.append((key, value))
        return DecodedStates(states, batch, KVCache(cache.length + batch.width, tuple(layers)))

    def words(self, states: Tensor) -> Tensor:
        """Return (T, V) logits of the next token after (T, D) states."""
        return self.head(states, self.embeddings.word_embeddings)

    def predict(
        self,
        input_ids: Tensor,
        mask: Tensor,
        source: CrossAttentionCache,
        rows: Tensor | None = None,
        cache: KVCache = EMPTY,
    ) -> Predicted:
        """Predict every token of (n, L) texts but the first from the tokens before it. Arguments as those of `read`."""
        follows = keep_host_copy(mask[:, 1:], on_host(mask)[:, 1:])  # (n, L - 1) whether a real token follows
        decoded = self.read(input_ids[:, :-1], follows, source, rows, cache)
        batch = decoded.batch
        text = torch.arange(len(mask), device=mask.device)[:, None].expand_as(follows)
        targets = torch.stack([input_ids[:, 1:], text], 2)  # (n, L - 1, 2)
        labels, text = batch.pack(targets[:, : batch.width]).unbind(1)  # (T,) each
        kept = batch.real_tokens(text_lengths(follows))  # (M,)
        return Predicted(self.words(decoded.states[kept]), labels[kept], text[kept])

    def _step(self, part, *inputs):
        return checkpointed(part, self.checkpointing, *inputs)

    def layer_ids(self) -> dict[str, int]:
        """Return each parameter's depth: embeddings 0, layers from 1, head after the last layer."""
        depth = {name: int(name.split(".")[1]) + 1 for name, _ in self.named_parameters() if name.startswith("layers.")}
        top = len(self.layers) + 1
        return {n: depth.get(n, 0 if n.startswith("embeddings.") else top) for n, _ in self.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Return the names of the embeddings of positions and of token types."""
        return {f"embeddings.{name}.weight" for name in ("position_embeddings", "token_type_embeddings")}

    def set_activation_checkpointing(self, mode: Checkpointing) -> None:
        """Switch activation checkpointing of the layers."""
        self.checkpointing = mode
