"""Text towers from transformers, with the pooled token first, run on as little padding as possible.

B texts, L text tokens, D width.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.encoders.activation_checkpointing import Checkpointing, checkpoint_blocks
from vlp.encoders.base import LayerSizes, TextTower, TextTowerSpec
from vlp.encoders.initialisation import Init, init_std
from vlp.encoders.ragged import length_bounds, text_lengths, upload
from vlp.errors import UserError
from vlp.specs.fields import setting
from vlp.types import on_host
from vlp.weights import reading
from vlp.weights.reading import LoadReport
from vlp.weights.run import is_run, read_run, tower_spec

# Parts of BERT-like checkpoints besides the encoder: pooler (SimCSE's is "mlp"), heads of other tasks, buffers of older
# versions.
HEADS = (
    *(
        "pooler",
        "mlp",
        "cls",
        "lm_head",
        "classifier",
        "qa_outputs",
        "vocab_transform",
        "vocab_layer_norm",
        "vocab_projector",
    ),
    *("discriminator_predictions", "generator_predictions", "generator_lm_head"),
    *("embeddings.position_ids", "embeddings.token_type_ids"),
)
# Model types whose encoders take a mask that `create_bidirectional_mask` has prepared. Others may use the mask for more.
TAKE_PREPARED_MASKS = {"bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet", "distilbert", "albert"}
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


@dataclass(frozen=True)
class BertText(TextTowerSpec):
    """A text tower: any BERT-like encoder that transformers' `AutoModel` builds (BERT, RoBERTa, MPNet, ELECTRA, ...).

    Args:
        weights: A transformers folder (config.json and model.safetensors or pytorch_model.bin), ``pip:PACKAGE/folder``,
            or a run folder, whose newest text tower is taken. None starts at random, with the sizes in ``config``.
        config: Sizes by transformers' own names. With ``model_type`` (bert, roberta, ...) among them it is complete, and
            missing sizes take transformers' defaults. Without, it changes the config of ``weights``.
        dropout: Rate, for hidden states and attention alike. None takes the config's.
        pool: "cls" pools by the state of the first token, "mean" by the mean over the real tokens.
        length_groups: Number of groups of similar length that a batch is split into, see `by_length`. 1 never splits.
        init: Rule for random weights, see `vlp.encoders.initialisation`. "published" is the config's ``initializer_range``,
            0.02 unless it is set.
    """

    weights: str | None = None
    config: dict[str, Any] | None = None
    dropout: float | None = setting(None, least=0, below=1)
    pool: Literal["cls", "mean"] = "cls"
    length_groups: int = setting(4, least=1)
    init: Init = "published"

    def resolved(self) -> BertText:
        """Return the same tower with its full architecture in ``config``. `build(load_weights=False)` then reads nothing."""
        return replace(self, config=_architecture(self._config()))

    def build(self, load_weights: bool = True) -> BertTower:
        """Build the tower, without pooler.

        Args:
            load_weights: False leaves the parameters random even where ``weights`` is set.

        Raises:
            UserError: if a name in ``config`` is unknown, or the folder or its weights do not fit.
        """
        from transformers import MODEL_MAPPING, AutoModel

        config = self._config()
        config.use_cache = False  # for decoders only, and activation checkpointing would warn about it
        if self.dropout is not None:
            config.update({name: self.dropout for name in DROPOUTS if name in config.to_dict()})
        takes_pooler = "add_pooling_layer" in inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters
        try:
            model = AutoModel.from_config(config, **{"add_pooling_layer": False} if takes_pooler else {})
        except ValueError as error:  # e.g. heads that do not divide the width
            raise UserError(f"transformers cannot build this text tower: {_line(error)}") from error
        report = None
        if load_weights and self.weights:
            if is_run(self.weights):
                state = read_run(self.weights, "text.model")
            else:
                state = read_encoder(self.weights, model.base_model_prefix)
            report = reading.load(model, state, ignored=HEADS + _layers_from(config.num_hidden_layers, state))
        return BertTower(model.float(), self.pool, self.length_groups, report)

    def layer_sizes(self) -> LayerSizes:
        """Return the sizes of the encoder's layers."""
        config = self.resolved().config
        return LayerSizes(
            heads=config.get("num_attention_heads"),
            hidden_size=config.get("intermediate_size"),
            dropout=config.get("hidden_dropout_prob", LayerSizes.dropout) if self.dropout is None else self.dropout,
            eps=config.get("layer_norm_eps", LayerSizes.eps),  # DistilBERT's config has none
            positions=config.get("max_position_embeddings"),
            token_types=config.get("type_vocab_size", LayerSizes.token_types),
        )

    def head_weights(self) -> str | None:
        """Return the folder, which may have a head for masked language modelling."""
        return self.weights

    def _config(self):
        from transformers import AutoConfig

        given = dict(self.config or {})
        if self.weights and "model_type" not in given:
            given = self._config_of_weights() | given
        if "model_type" not in given:
            raise UserError(
                "a text tower needs weights, or a config with model_type (for example 'bert') and its sizes"
            )
        model_type = given.pop("model_type")
        try:
            defaults = AutoConfig.for_model(model_type)
        except ValueError as error:
            raise UserError(
                f"transformers has no model_type {model_type!r}; set for example bert, roberta or distilbert"
            ) from error
        known = [*defaults.to_dict(), *defaults.attribute_map]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else "see transformers' documentation of its config"
                raise UserError(f"a {model_type} config has no {name!r}; {hint}")
        try:
            config = AutoConfig.for_model(model_type, **given)
        except Exception as error:  # transformers checks types with an error class of its own
            raise UserError(f"transformers refuses this {model_type} config: {_line(error)}") from error
        if self.init == "width":
            config.initializer_range = init_std(self.init, config.hidden_size)
        return config

    def _config_of_weights(self) -> dict[str, Any]:
        from transformers import AutoConfig

        if is_run(self.weights):
            return tower_spec(self.weights, "text", BertText).config
        folder = reading.resolve_weights(self.weights)
        try:
            return _architecture(AutoConfig.from_pretrained(folder, local_files_only=True))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.weights} is not a transformers folder or a run: {_line(error)}") from error


def _architecture(config) -> dict[str, Any]:
    """Return the entries that this family adds to every transformers config: its whole architecture."""
    from transformers import PretrainedConfig

    own = type(config)().to_dict().keys() - PretrainedConfig().to_dict().keys()
    return {"model_type": config.model_type} | {name: v for name, v in config.to_dict().items() if name in own}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def read_encoder(weights: str, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a transformers folder, by the names of the bare encoder.

    Args:
        weights: The folder, or ``pip:PACKAGE/folder``.
        prefix: Name of the encoder within the saved model, removed where a name starts with it.

    Raises:
        UserError: if the folder has no weights.
    """
    state = reading.read_folder(reading.resolve_weights(weights))
    # The first BERT checkpoints call a norm's weight gamma and its bias beta.
    norms = {"gamma": "weight", "beta": "bias"}
    state = {re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda m: norms[m[1]], key): v for key, v in state.items()}
    return {key.removeprefix(f"{prefix}."): value for key, value in state.items()}


def _layers_from(number: int, state: Iterable[str]) -> tuple[str, ...]:
    """Return the layers from ``number`` on. A config with fewer layers than the weights takes the first ones."""
    found = {match[0]: int(match[1]) for key in state if (match := re.match(r"\w+\.layers?\.(\d+)(?=\.)", key))}
    return tuple(layer for layer, layer_number in found.items() if layer_number >= number)


def by_length(lengths: Sequence[int] | np.ndarray, groups: int, exactly: bool = False) -> list[np.ndarray]:
    """Split rows into at most ``groups`` groups of similar length with the least padding in total.

    Exact: dynamic programming over the U distinct lengths, U^2 * groups steps.

    Args:
        lengths: Of each row, in tokens.
        groups: Largest number of groups.
        exactly: Return as many groups as there are rows for, even if fewer have the same padding.

    Returns:
        Positions of the rows of each group, shortest first, together a permutation of all rows.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(lengths, kind="stable")
    distinct, first = np.unique(lengths[order], return_index=True)
    ends = np.append(first, len(lengths))  # rows order[ends[i]:ends[j]] have the distinct lengths i .. j-1
    # cost[j]: fewest padded tokens for the j shortest lengths, in as many groups as rounds so far
    cost = np.where(np.arange(len(ends)) == 0, 0.0, np.inf)
    cuts = []
    for _ in range(min(groups, len(distinct))):
        # candidate[i, j]: the groups so far end at i, and one more covers i .. j at length distinct[j]
        candidate = cost[:-1, None] + (ends[None, 1:] - ends[:-1, None]) * distinct[None, :]
        candidate[np.tril_indices(len(distinct), -1)] = np.inf
        cuts.append(candidate.argmin(0))
        cost = np.append(np.inf, candidate.min(0))
    parts, end = [], len(distinct)
    for cut in reversed(cuts):
        start = cut[end - 1]
        parts.append(order[ends[start] : ends[end]])
        end = start
    while exactly and len(parts) < min(groups, len(lengths)):
        number = max(range(len(parts)), key=lambda i: len(parts[i]))
        parts[number : number + 1] = np.array_split(parts[number], 2)[::-1]
    return parts[::-1]


def run_by_length(
    encode: Callable[..., Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    groups: int,
    *others: Tensor,
    exactly: bool = False,
) -> Tensor:
    """Call ``encode`` on groups of rows of similar length, each truncated to its longest row.

    Value and gradient equal those of one call at full length wherever padding cannot change a row, dropout aside.

    Args:
        encode: Takes (b, l) ids and mask, which is None if there is no padding, and (b, l, ...) others, and returns (b, l', D), where row i depends on row i
            only and l' grows with l.
        input_ids: (B, L) int64.
        attention_mask: (B, L) bool, padding on the right.
        groups: Largest number of groups.
        others: (B, L, ...) further inputs of a row, truncated as the ids are.
        exactly: Whether the number of calls must depend on B only, see `by_length`.

    Returns:
        (B, L', D) in the order of the input rows, zero after the end of a row's group.
    """
    if groups == 1 or len(input_ids) == 1:
        return encode(input_ids, attention_mask, *others)
    bounds = length_bounds(attention_mask)
    lengths = text_lengths(attention_mask) if bounds is None else bounds
    rows = by_length(lengths, groups, exactly)
    order = upload(np.concatenate(rows), input_ids.device)  # (B,)
    outputs = []
    for part, row in zip(order.split([len(row) for row in rows]), rows):
        longest = max(lengths[row[-1]], 1)
        is_full = bounds is None and on_host(attention_mask)[row, :longest].all()
        mask = None if is_full else attention_mask[part, :longest]
        outputs.append(encode(input_ids[part, :longest], mask, *(each[part, :longest] for each in others)))
    width = max(out.shape[1] for out in outputs)
    padded = torch.cat([F.pad(out, (0, 0, 0, width - out.shape[1])) for out in outputs])  # (B, L', D) by group
    return padded[order.argsort()]


def layer_ids(module: nn.Module, block: str, last: Iterable[str] = ()) -> dict[str, int]:
    """Return each parameter's depth by name: 0 before the blocks, 1 to L in them, L + 1 after them.

    Args:
        module: The module with the parameters.
        block: Regular expression whose one group is the block's number.
        last: Name prefixes of the parameters after the last block.
    """
    names = [name for name, _ in module.named_parameters()]
    numbers = {name: int(found[1]) for name in names if (found := re.search(block, name))}
    depth = {number: i for i, number in enumerate(sorted(set(numbers.values())), start=1)}
    after = {name: len(depth) + 1 for name in names if name.startswith(tuple(last))}
    return {name: after.get(name, depth.get(numbers.get(name), 0)) for name in names}


class BertTower(TextTower):
    """A transformers encoder as a sequence of tokens.

    Args:
        model: A transformers encoder without pooler.
        pool: "cls" returns the encoder's tokens, of which the first is the pooled one. "mean" puts the mean over the
            real tokens in front of them.
        length_groups: See `run_by_length`.
        report: Account of the loaded weights, None if they are random.
    """

    def __init__(self, model: nn.Module, pool: str = "cls", length_groups: int = 1, report: LoadReport | None = None):
        super().__init__()
        if pool not in ("cls", "mean"):
            raise UserError(f"a text tower cannot pool by {pool!r}; set pool to cls or mean")
        self.model = model
        self.pool = pool
        self.length_groups = length_groups
        self.report = report
        self.returns_token_states = pool == "cls"
        self.width: int = model.config.hidden_size
        self.vocab_size: int = model.config.vocab_size
        self.max_length: int = _max_length(model)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the word embeddings."""
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, keep: Tensor | None = None) -> Tensor:
        """Encode texts.

        Args:
            input_ids: (B, L) int64, padded on the right.
            attention_mask: (B, L) bool.
            keep: See `forward_cutoff`. None keeps everything.

        Returns:
            (B, L', D) with L' <= L, or (B, 1 + L', D) with pool "mean". `token_mask` says which tokens are real. The
            values at the others are undefined.

        Raises:
            ValueError: if L exceeds ``max_length``.
        """
        if input_ids.shape[1] > self.max_length:
            raise ValueError(f"texts of {input_ids.shape[1]} tokens; this tower takes {self.max_length}")
        # one look-up for all groups: the gradient of each look-up is as large as the whole vocabulary
        words = self.get_input_embeddings()(input_ids)  # (B, L, W)
        others = () if keep is None else (keep.expand(*input_ids.shape, -1),)
        groups, exactly = self.length_groups, self.equal_passes
        return run_by_length(self._encode, input_ids, attention_mask, groups, words, *others, exactly=exactly)

    def forward_cutoff(self, input_ids: Tensor, attention_mask: Tensor, keep: Tensor) -> Tensor:
        """Encode texts with a part of the embedding layer's output, positions and norm included, set to zero."""
        return self(input_ids, attention_mask, keep)

    def _encode(
        self, input_ids: Tensor, attention_mask: Tensor | None, words: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        # a hook, since no model takes the output of its embedding layer: `inputs_embeds` enters before the norm
        zeroed = nullcontext()
        if keep is not None:
            zeroed = self.model.embeddings.register_forward_hook(lambda module, inputs, out: out * keep)
        with zeroed:
            mask = self._prepared(words, attention_mask)
            tokens = self.model(inputs_embeds=words, attention_mask=mask).last_hidden_state  # (b, l, D)
        if self.pool == "cls":
            return tokens
        if attention_mask is None:
            return torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
        weight = attention_mask[:, :, None].to(tokens.dtype)
        mean = (tokens * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)  # (b, 1, D)
        return torch.cat([mean, tokens], dim=1)

    def _prepared(self, words: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return the mask as the attention layers take it. From a 2-d mask transformers reads whether it has padding."""
        from transformers.masking_utils import create_bidirectional_mask

        if mask is None or self.model.config.model_type not in TAKE_PREPARED_MASKS:
            return mask
        return create_bidirectional_mask(self.model.config, words, mask, allow_is_bidirectional_skip=False)

    def token_mask(self, attention_mask: Tensor) -> Tensor:
        """Return the mask of the output tokens. The mean in front, if there is one, counts as a token."""
        return attention_mask if self.pool == "cls" else F.pad(attention_mask, (1, 0), value=True)

    def layer_ids(self) -> dict[str, int]:
        """Return each parameter's depth: embeddings and parts that all layers share 0, blocks 1 to L, final norm L + 1."""
        return layer_ids(self, r"\.layers?\.(\d+)\.", last=["model.final_norm"])

    def no_weight_decay(self) -> set[str]:
        """Return the names of the embeddings of positions and of token types."""
        endings = ("position_embeddings.weight", "token_type_embeddings.weight", "relative_attention_bias.weight")
        return {name for name, _ in self.named_parameters() if name.endswith(endings)}

    def set_activation_checkpointing(self, mode: Checkpointing) -> None:
        """Switch activation checkpointing of the blocks."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in ("layer", "layers"):
                checkpoint_blocks(module, mode)


def _max_length(model: nn.Module) -> int:
    """Return the number of usable positions. RoBERTa and its relatives count from after the padding index."""
    positions = dict(model.embeddings.named_children()).get("position_embeddings")
    reserved = positions.padding_idx if isinstance(positions, nn.Embedding) else None
    return model.config.max_position_embeddings - (0 if reserved is None else reserved + 1)
