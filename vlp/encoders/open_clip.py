"""The towers of an open_clip model, with its preprocessing. Texts are run on as little padding as possible.

B images or texts, H and W pixels, L text tokens, E embedding.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import open_clip
import torch
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.data.preprocess import Interpolation, Preprocess, Triple
from vlp.encoders.activation_checkpointing import Checkpointing
from vlp.encoders.base import ImageTower, PooledTextTower
from vlp.encoders.image import timm_layer_ids, timm_no_weight_decay
from vlp.encoders.text import layer_ids, run_by_length
from vlp.errors import UserError
from vlp.specs.fields import setting
from vlp.weights import reading
from vlp.weights.reading import Grid, LoadReport

BLOCK = r"(?:resblocks\.|visual\.layer)(\d+)\."
LAST = ("visual.ln_post", "visual.proj", "visual.attn", "visual.head", "text.ln_final", "text.text_projection")


class ClipTowers(NamedTuple):
    """Two towers, and the scale and bias of the logits from their weights.

    Args:
        image: Image tower.
        text: Text tower.
        scale: Factor of the cosine similarities. None if no weights were loaded.
        bias: Added to the logits. None if no weights were loaded, or they have none.
    """

    image: ClipImageTower
    text: ClipTextTower
    scale: float | None
    bias: float | None


@dataclass(frozen=True)
class OpenClip:
    """Both towers of an open_clip model, with their projections.

    The tokenizer is ``open_clip:NAME`` for `vlp.data.text.load_tokenizer`.

    Args:
        name: Model name, e.g. "ViT-B-32".
        weights: A pretrained tag of open_clip, which is downloaded. Otherwise a file, or ``pip:PACKAGE/sub/path``. None
            starts at random.
        length_groups: Number of groups of similar length that a batch of texts is split into. 1 never splits.
        context_length: Tokens of the longest text. None takes the model's own, which is also the upper limit.
        mean: Of the pixels, per channel. None, for ``std`` and ``interpolation`` too, takes the value of open_clip for these
            weights, or else for the first weights of this model.
        std: Of the pixels, per channel.
        interpolation: For resizing images.
    """

    name: str
    weights: str | None = None
    length_groups: int = setting(4, least=1)
    context_length: int | None = setting(None, least=2)
    mean: Triple | None = None
    std: Triple | None = None
    interpolation: Interpolation | None = None

    def resolved(self) -> OpenClip:
        """Return the same towers with context length, mean, std and interpolation filled in. Reads no weights.

        Raises:
            UserError: if open_clip has no such model, its text tower comes from a hub, or the context is too long.
        """
        own = self._config()["text_cfg"].get("context_length", 77)
        if (self.context_length or own) > own:
            raise UserError(f"{self.name} reads {own} tokens; set context_length to {own} or less")
        cfg = pretrained_settings(self.name, self.weights)
        return replace(
            self,
            context_length=self.context_length or own,
            mean=tuple(self.mean or cfg.get("mean") or open_clip.OPENAI_DATASET_MEAN),
            std=tuple(self.std or cfg.get("std") or open_clip.OPENAI_DATASET_STD),
            interpolation=self.interpolation or cfg.get("interpolation") or "bicubic",
        )

    def build(self, load_weights: bool = True) -> ClipTowers:
        """Build the two towers.

        Args:
            load_weights: False leaves the parameters random even where ``weights`` is set.

        Raises:
            UserError: if the name or the weights do not fit, or a download fails.
        """
        spec = self.resolved()
        weights = self.weights if load_weights else None
        tag = weights if weights in open_clip.list_pretrained_tags_by_model(self.name) else None
        with _own_root_logger():
            try:  # force_custom_text puts the parameters of the text tower into a module of their own
                model = open_clip.create_model(self.name, tag, force_custom_text=True)
            except Exception as error:  # the type of a failed download's error depends on the hub client
                reason = " ".join(str(error).split())
                raise UserError(f"open_clip cannot build {self.name} with weights {tag}: {reason}") from error
        report = None
        if weights and not tag:
            state = convert_to_custom_text_state_dict(reading.read_weights(weights))
            scalars = {
                name: value.reshape(()) for name, value in state.items() if name in ("logit_scale", "logit_bias")
            }
            grids = {}
            if isinstance(model.visual, VisionTransformer):
                grids = {"visual.positional_embedding": Grid(tuple(model.visual.grid_size), prefix=1)}
            report = reading.load(model, state | scalars, new=["logit_bias"], ignored=["logit_bias"], grids=grids)
        size = model.visual.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        width = self._config()["embed_dim"]
        image = ClipImageTower(model.visual, width, Preprocess(size, spec.mean, spec.std, spec.interpolation), report)
        text = ClipTextTower(model.text, width, spec.context_length, self.length_groups, report)
        scale = model.logit_scale.exp().item() if weights else None
        bias = model.logit_bias.item() if weights and model.logit_bias is not None else None
        return ClipTowers(image, text, scale, bias)

    def _config(self) -> dict:
        if ":" in self.name:  # open_clip reads a schema such as hf-hub:, downloads the model and may run its code
            raise UserError(
                f"{self.name} is not one of open_clip's own models, and nothing is downloaded; name one of them, with "
                f"weights=FILE"
            )
        config = open_clip.get_model_config(self.name)
        if config is None:
            close = difflib.get_close_matches(self.name, open_clip.list_models(), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "open_clip.list_models() has the names"
            raise UserError(f"open_clip has no model {self.name!r}; {hint}")
        if "hf_model_name" in config["text_cfg"] or "multimodal_cfg" in config:
            raise UserError(
                f"{self.name} has a text tower from a hub or a decoder; use TimmImage with BertText instead"
            )
        return config


def pretrained_settings(name: str, weights: str | None) -> dict:
    """Return open_clip's preprocessing of a model's weights: mean, std, interpolation, resize_mode.

    The tags of a model nearly always agree on it, so a file of unknown origin takes that of the first one.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    tag = weights if weights in tags else next(iter(tags), None)
    return open_clip.get_pretrained_cfg(name, tag) if tag else {}


@contextmanager
def _own_root_logger() -> Iterator[None]:
    """Give open_clip a root logger of its own. Its first log message would set up the root logger of the whole program."""
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, [logging.NullHandler()]
    try:
        yield
    finally:
        root.handlers = handlers


class ClipImageTower(ImageTower):
    """An image tower of open_clip as one token: its projected embedding, before normalisation.

    The patch tokens are not returned, since in open_clip their width differs from that of the embedding.

    Args:
        visual: open_clip's tower.
        width: E.
        preprocess: The input format of ``visual``.
        report: Account of the loaded weights, None if they are random.
    """

    def __init__(self, visual: nn.Module, width: int, preprocess: Preprocess, report: LoadReport | None = None):
        super().__init__()
        self.visual = visual
        self.width = width
        self.preprocess = preprocess
        self.report = report

    def forward(self, image: Tensor) -> Tensor:
        """Return (B, 1, E) embeddings of (B, 3, H, W) normalised images."""
        return self.visual(image)[:, None]

    def layer_ids(self) -> dict[str, int]:
        """Return each parameter's depth: stem 0, blocks (stages of a ResNet) 1 to L, final norm and projection L + 1."""
        if not isinstance(self.visual, TimmModel):
            return layer_ids(self, BLOCK, LAST)
        ids = {f"visual.trunk.{name}": depth for name, depth in timm_layer_ids(self.visual.trunk).items()}
        top = max(ids.values()) + 1
        return {name: ids.get(name, top) for name, _ in self.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Return the names of the class token and of the position embeddings."""
        if isinstance(self.visual, TimmModel):
            return {f"visual.trunk.{name}" for name in timm_no_weight_decay(self.visual.trunk)}
        return {n for n, _ in self.named_parameters() if n.endswith(("positional_embedding", "class_embedding"))}

    def set_activation_checkpointing(self, mode: Checkpointing) -> None:
        """Switch activation checkpointing, "full" or "none".

        Raises:
            UserError: if the tower does not support ``mode``.
        """
        model = self.visual.trunk if isinstance(self.visual, TimmModel) else self.visual
        if mode != "none" and isinstance(model, ModifiedResNet):  # it would ignore the call
            raise UserError("open_clip's ResNets cannot checkpoint activations; turn that off")
        _refuse_cheap(mode)
        try:
            model.set_grad_checkpointing(mode == "full")
        except (AssertionError, AttributeError) as error:
            raise UserError(f"{type(model).__name__} cannot checkpoint activations; turn that off") from error


class ClipTextTower(PooledTextTower):
    """A text tower of open_clip as one token: its projected embedding, before normalisation.

    With a causal mask and the embedding taken at the end-of-text token, padding has no effect, and texts are truncated to
    their length and grouped. Other towers of open_clip (SigLIP) were trained with visible padding and always run on the
    whole context.

    Args:
        text: open_clip's tower.
        width: E.
        max_length: Tokens of the longest text.
        length_groups: See `vlp.encoders.text.run_by_length`.
        report: Account of the loaded weights, None if they are random.
    """

    def __init__(
        self, text: nn.Module, width: int, max_length: int, length_groups: int = 1, report: LoadReport | None = None
    ):
        super().__init__()
        self.text = text
        self.width = width
        self.vocab_size: int = text.vocab_size
        self.max_length = max_length
        self.length_groups = length_groups
        self.report = report
        self.cuts_padding = text.attn_mask is not None and text.pool_type in ("argmax", "eos")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode texts.

        Args:
            input_ids: (B, L) int64, padded on the right.
            attention_mask: (B, L) bool.

        Returns:
            (B, 1, E).

        Raises:
            ValueError: if L exceeds ``max_length``.
        """
        length = input_ids.shape[1]
        if length > self.max_length:
            raise ValueError(f"texts of {length} tokens; this tower takes {self.max_length}")
        if self.cuts_padding:
            groups, exactly = self.length_groups, self.equal_passes
            return run_by_length(self._encode, input_ids, attention_mask, groups, exactly=exactly)
        pad = self.text.pad_id
        whole = F.pad(input_ids.masked_fill(~attention_mask, pad), (0, self.text.context_length - length), value=pad)
        return self.text(whole)[:, None]

    def _encode(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        # the forward pass of open_clip.TextTransformer, which itself refuses texts shorter than its context
        tower, length = self.text, input_ids.shape[1]
        x = tower.token_embedding(input_ids) + tower.positional_embedding[:length]  # (b, l, D)
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length]))
        end = input_ids.argmax(1) if tower.pool_type == "argmax" else (input_ids == tower.eos_id).int().argmax(1)
        pooled = x[torch.arange(len(x), device=x.device), end]  # (b, D)
        projection = tower.text_projection
        return (projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection)[:, None]

    def layer_ids(self) -> dict[str, int]:
        """Return each parameter's depth: embeddings 0, blocks 1 to L, final norm and projection L + 1."""
        return layer_ids(self, BLOCK, LAST)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the position embeddings."""
        return {name for name, _ in self.named_parameters() if name.endswith("positional_embedding")}

    def set_activation_checkpointing(self, mode: Checkpointing) -> None:
        """Switch activation checkpointing, "full" or "none"."""
        _refuse_cheap(mode)
        self.text.set_grad_checkpointing(mode == "full")


def _refuse_cheap(mode: Checkpointing) -> None:
    if mode == "cheap":
        raise UserError(
            "open_clip's towers checkpoint whole blocks only; set train.activation_checkpointing to full, or none"
        )
