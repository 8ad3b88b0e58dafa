"""Text towers: any BERT-like transformers encoder, its pooled token first, run on as little padding as possible.

B batch, L text tokens, D width.
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
from vlp.errors import UserError
from vlp.files import resolve
from vlp.weights import reading
from vlp.weights.reading import LoadReport
from vlp.weights.run import is_run, read_run, run_spec

# What files of BERT-like models hold besides the encoder: pooler, heads of other tasks, buffers of older versions.
HEADS = (
    *("pooler", "cls", "lm_head", "classifier", "qa_outputs", "vocab_transform", "vocab_layer_norm", "vocab_projector"),
    *("discriminator_predictions", "generator_predictions", "generator_lm_head"),
    *("embeddings.position_ids", "embeddings.token_type_ids"),
)
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


@dataclass(frozen=True)
class BertText:
    """A text tower: any BERT-like encoder that transformers' `AutoModel` builds (BERT, RoBERTa, MPNet, ELECTRA, ...).

    Args:
        weights: a transformers folder (config.json and model.safetensors or pytorch_model.bin), ``pip:PACKAGE/folder``,
            or the folder of a run, whose newest text tower it then is; None = random, of the sizes in ``config``.
        config: transformers' own size names. With ``model_type`` (bert, roberta, ...) among them it stands alone, and
            what it leaves out takes transformers' default; without, it changes the config in the ``weights`` folder.
        dropout: rate, hidden states and attention alike; None = the config's.
        pool: "cls" = the state of the first token; "mean" = mean over the real tokens.
        length_groups: into how many groups of rows of like length a batch is split; 1 = never. See `by_length`.
    """

    weights: str | None = None
    config: dict[str, Any] | None = None
    dropout: float | None = None
    pool: Literal["cls", "mean"] = "cls"
    length_groups: int = 4

    def resolved(self) -> BertText:
        """The same tower with its full architecture in ``config``: `build(load_weights=False)` needs no folder then."""
        return replace(self, config=_architecture(self._config()))

    def build(self, load_weights: bool = True) -> BertTower:
        """The tower, without pooler.

        Args:
            load_weights: False = leave the parameters random whatever ``weights`` says: a checkpoint follows.

        Raises:
            UserError: if a name in ``config`` is unknown, or the folder or its weights do not fit.
        """
        from transformers import MODEL_MAPPING, AutoModel

        config = self._config()
        config.use_cache = False  # is for decoders, and checkpointing would warn of it
        for name in DROPOUTS:
            if self.dropout is not None and hasattr(config, name):
                setattr(config, name, self.dropout)
        takes_pooler = "add_pooling_layer" in inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters
        try:
            model = AutoModel.from_config(config, **{"add_pooling_layer": False} if takes_pooler else {})
        except ValueError as error:  # sizes that do not divide, say
            raise UserError(f"transformers cannot build this text tower: {_line(error)}") from error
        report = None
        if load_weights and self.weights:
            if is_run(self.weights):
                state = read_run(self.weights, "text")
            else:
                state = read_encoder(self.weights, model.base_model_prefix)
            report = reading.load(model, state, ignored=HEADS + _layers_from(config.num_hidden_layers, state))
        return BertTower(model.float(), self.pool, self.length_groups, report)

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
                f"transformers has no model_type {model_type!r}; bert, roberta or distilbert, say"
            ) from error
        known = [*defaults.to_dict(), *defaults.attribute_map]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else "see transformers' documentation of its config"
                raise UserError(f"a {model_type} config has no {name!r}; {hint}")
        try:
            return AutoConfig.for_model(model_type, **given)
        except Exception as error:  # transformers' own check of types has its own class of error
            raise UserError(f"this {model_type} config does not hold together: {_line(error)}") from error

    def _config_of_weights(self) -> dict[str, Any]:
        from transformers import AutoConfig

        if is_run(self.weights):
            return run_spec(self.weights, "text").config
        folder = resolve(self.weights)
        try:
            return _architecture(AutoConfig.from_pretrained(folder, local_files_only=True))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.weights} is no transformers folder, nor a run: {_line(error)}") from error


def _architecture(config) -> dict[str, Any]:
    """What this family of models adds to every transformers config: all that its shape and function depend on."""
    from transformers import PretrainedConfig

    own = type(config)().to_dict().keys() - PretrainedConfig().to_dict().keys()
    return {"model_type": config.model_type} | {name: v for name, v in config.to_dict().items() if name in own}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def read_encoder(weights: str, prefix: str) -> dict[str, Tensor]:
    """The encoder's tensors in a transformers folder, named as the bare encoder names them."""
    folder = resolve(weights)
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not files:
        raise UserError(
            f"{weights} holds neither model.safetensors nor pytorch_model.bin; save the model there in one file"
        )
    state = reading.read_weights(files[0])
    # The first BERT checkpoints call a norm's weight gamma and its bias beta.
    norms = {"gamma": "weight", "beta": "bias"}
    state = {re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda m: norms[m[1]], key): v for key, v in state.items()}
    return {key.removeprefix(f"{prefix}."): value for key, value in state.items()}


def _layers_from(number: int, state: Iterable[str]) -> tuple[str, ...]:
    """The layers of a deeper model: a config with fewer asks for the first ones."""
    found = {match[0]: int(match[1]) for key in state if (match := re.match(r"\w+\.layers?\.(\d+)(?=\.)", key))}
    return tuple(layer for layer, its_number in found.items() if its_number >= number)


def by_length(lengths: Sequence[int], groups: int) -> list[Tensor]:
    """Split rows into at most ``groups`` groups of like length, so that padding each to its longest row costs least.

    Exact: dynamic programming over the U distinct lengths, U^2 * groups steps.

    Args:
        lengths: of each row, in tokens.

    Returns:
        Index tensors (int64, on the CPU), shortest group first; together a permutation of all rows.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(lengths, kind="stable")
    distinct, first = np.unique(lengths[order], return_index=True)
    ends = np.append(first, len(lengths))  # rows order[ends[i]:ends[j]] have the distinct lengths i .. j-1
    # cost[j] = fewest tokens that hold the j shortest lengths, in as many groups as there were rounds
    cost = np.where(np.arange(len(ends)) == 0, 0.0, np.inf)
    cuts = []
    for _ in range(min(groups, len(distinct))):
        # candidate[i, j]: the groups so far end at i, and one more holds i .. j at length distinct[j]
        candidate = cost[:-1, None] + (ends[None, 1:] - ends[:-1, None]) * distinct[None, :]
        candidate[np.tril_indices(len(distinct), -1)] = np.inf
        cuts.append(candidate.argmin(0))
        cost = np.append(np.inf, candidate.min(0))
    parts, end = [], len(distinct)
    for cut in reversed(cuts):
        start = cut[end - 1]
        parts.append(torch.from_numpy(order[ends[start] : ends[end]]))
        end = start
    return parts[::-1]


def run_by_length(
    encode: Callable[..., Tensor], input_ids: Tensor, attention_mask: Tensor, groups: int, *others: Tensor
) -> Tensor:
    """``encode(input_ids, attention_mask, *others)`` for rows grouped by length, each group at its own longest row.

    Equal to one call at full length wherever padding cannot change a row, dropout aside; the gradient too. On a GPU it
    costs one synchronisation with the host, for the lengths, which ``groups`` 1 avoids.

    Args:
        encode: (b, l) ids and mask, and (b, l, ...) others, to (b, l', D), where row i depends on row i alone and l'
            grows with l.
        input_ids: (B, L).
        attention_mask: (B, L) bool, padding on the right.
        others: (B, L, ...) whatever else a row needs; cut as the ids are.

    Returns:
        (B, L', D), zero behind the end of a row's group, rows in the order in which they came.
    """
    given = (input_ids, attention_mask, *others)
    if groups == 1 or len(input_ids) == 1:
        return encode(*given)
    positions = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    lengths = (attention_mask * positions).amax(1).tolist()
    rows = by_length(lengths, groups)
    longest = [max(lengths[part[-1]], 1) for part in rows]
    order = torch.cat(rows).to(input_ids.device)
    parts = order.split([len(part) for part in rows])
    outputs = [encode(*(each[part, :n] for each in given)) for part, n in zip(parts, longest)]
    width = max(out.shape[1] for out in outputs)
    padded = torch.cat([F.pad(out, (0, 0, 0, width - out.shape[1])) for out in outputs])
    return padded[order.argsort()]


def layer_ids(module: nn.Module, block: str, behind: Iterable[str] = ()) -> dict[str, int]:
    """Parameter name to depth: 0 before the blocks, 1 to L in them, L + 1 behind them.

    Args:
        block: regular expression whose one group is the block's number.
        behind: beginnings of the names of what comes after the last block.
    """
    names = [name for name, _ in module.named_parameters()]
    numbers = {name: int(found[1]) for name in names if (found := re.search(block, name))}
    depth = {number: i for i, number in enumerate(sorted(set(numbers.values())), start=1)}
    after = {name: len(depth) + 1 for name in names if name.startswith(tuple(behind))}
    return {name: after.get(name, depth.get(numbers.get(name), 0)) for name in names}


class BertTower(nn.Module):
    """A transformers encoder as a sequence of tokens, the pooled one first.

    Args:
        model: a transformers encoder without pooler.
        pool: "cls": the tokens are the encoder's, and the first is the pooled one; "mean": the mean over the real
            tokens goes in front of them.
        length_groups: see `run_by_length`.
        report: what loading its weights did, if any were loaded.
    """

    def __init__(self, model: nn.Module, pool: str = "cls", length_groups: int = 1, report: LoadReport | None = None):
        super().__init__()
        if pool not in ("cls", "mean"):
            raise UserError(f"a text tower cannot pool by {pool!r}; set pool to cls or mean")
        self.model = model
        self.pool = pool
        self.length_groups = length_groups
        self.report = report
        self.width: int = model.config.hidden_size
        self.vocab_size: int = model.config.vocab_size
        self.max_length: int = _max_length(model)

    @property
    def word_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, keep: Tensor | None = None) -> Tensor:
        """Encode (B, L) ids, padded on the right, with their (B, L) bool mask.

        Args:
            keep: (B, L, 1) or (B, 1, W) bool, W the width of the embeddings: False where what the embedding layer
                gives out, positions and norm included, is set to 0.

        Returns:
            (B, L, D), or (B, 1 + L, D) with pool "mean"; `token_mask` says which are real, the rest means nothing.

        Raises:
            ValueError: if L is above ``max_length``.
        """
        if input_ids.shape[1] > self.max_length:
            raise ValueError(f"texts of {input_ids.shape[1]} tokens; this tower takes {self.max_length}")
        # looked up once for all groups: the gradient of each look-up is as large as the whole vocabulary
        words = self.word_embeddings(input_ids)
        others = () if keep is None else (keep.expand(*input_ids.shape, -1),)
        return run_by_length(self._encode, input_ids, attention_mask, self.length_groups, words, *others)

    def _encode(self, input_ids: Tensor, attention_mask: Tensor, words: Tensor, keep: Tensor | None = None) -> Tensor:
        # a hook, since no model takes what comes out of its embedding layer: `inputs_embeds` goes in before the norm
        cut = nullcontext()
        if keep is not None:
            cut = self.model.embeddings.register_forward_hook(lambda module, given, out: out * keep)
        with cut:
            tokens = self.model(inputs_embeds=words, attention_mask=attention_mask).last_hidden_state
        if self.pool == "cls":
            return tokens
        weight = attention_mask[:, :, None].to(tokens.dtype)
        mean = (tokens * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return torch.cat([mean, tokens], dim=1)

    def token_mask(self, attention_mask: Tensor) -> Tensor:
        """(B, L) bool to the mask of what `forward` returns: the mean in front, if there is one, is a token."""
        return attention_mask if self.pool == "cls" else F.pad(attention_mask, (1, 0), value=True)

    def layer_ids(self) -> dict[str, int]:
        """Parameter name to depth: embeddings (and what all layers share) 0, blocks 1 to L, any final norm L + 1."""
        return layer_ids(self, r"\.layers?\.(\d+)\.", behind=["model.final_norm"])

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are no weights: embeddings of positions and of token types."""
        endings = ("position_embeddings.weight", "token_type_embeddings.weight", "relative_attention_bias.weight")
        return {name for name, _ in self.named_parameters() if name.endswith(endings)}

    def set_activation_checkpointing(self, how: Checkpointing) -> None:
        """See `vlp.encoders.activation_checkpointing`."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in ("layer", "layers"):
                checkpoint_blocks(module, how)


def _max_length(model: nn.Module) -> int:
    """Tokens that have a position: RoBERTa and its kin count from behind the padding index and so have fewer."""
    positions = getattr(model.embeddings, "position_embeddings", None)
    reserved = getattr(positions, "padding_idx", None)
    return model.config.max_position_embeddings - (0 if reserved is None else reserved + 1)
