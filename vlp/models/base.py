"""The contracts of a model and of its spec: what training, objectives and tasks read and call.

B images, A texts, n pairs, N tokens, L text tokens, D width, E embedding, M predicted positions, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.errors import UserError
from vlp.types import Answers, Batch, Encoded

if TYPE_CHECKING:  # imported by vlp.forward, which must stay light
    from vlp.data.preprocess import Preprocess
    from vlp.encoders.activation_checkpointing import Checkpointing
    from vlp.encoders.decoder import Predicted
    from vlp.weights.reading import LoadReport

Modality = Literal["image", "text"]


class Encodings(Protocol):
    """The part of `vlp.forward.Forward` that models read: the batch and the encodings of its images and texts."""

    @property
    def batch(self) -> Batch: ...
    @property
    def image(self) -> Encoded: ...
    @property
    def text(self) -> Encoded: ...
    @property
    def image_views(self) -> tuple[Encoded, ...]: ...
    @property
    def projected(self) -> Any: ...
    @property
    def fused(self) -> Tensor: ...


class HeadSpec(Protocol):
    """A head that an objective adds to the model, see `vlp.objectives.base.Objective.heads`."""

    def build(self, width: int) -> nn.Module:
        """Build the head for (B, ``width``) inputs, ``width`` being the model's ``embed_size``."""
        ...


class ModelSpec:
    """Base class of the frozen dataclass that describes a model in an experiment.

    A spec has the fields that its model needs. The attributes below are capabilities that objectives check before
    anything is built. A subclass overrides one with a field, a property or a class attribute.

    | member | default | meaning |
    |---|---|---|
    | ``image`` | required | spec of the image tower, or None |
    | ``text`` | required | spec of the text tower, or None |
    | ``towers`` | None | spec of both towers, in place of ``image`` and ``text`` |
    | ``itc`` | False | embeddings of both modalities in one space, with a learned scale |
    | ``itc_vl`` | False | a second contrastive head, ``head="vl"`` |
    | ``bias`` | None | initial value of a learned bias of the logits (SigLIP) |
    | ``itm`` | False | a head for image-text matching |
    | ``mlm`` | False | a head that predicts masked tokens |
    | ``mim`` | None | spec of the targets of masked patches |
    | ``classes`` | None | number of outputs of a classifier |
    | ``assignment`` | False | a head that tells which of several images a text belongs to |
    | ``decoder`` | None | spec of a text decoder |
    | ``num_images`` | 1 | images of a sample that the classifier or fusion reads |
    | ``has_image``, ``has_text`` | from the towers | whether there is an image or a text tower |
    | ``build(load_weights)`` | required | build the `Model` |
    | ``resolved()`` | required | fill in sizes and normalisation |
    """

    image: Any  # a default here would become that of the dataclass's field
    text: Any
    towers: Any = None
    itc: bool = False
    itc_vl: bool = False
    bias: float | None = None
    itm: bool = False
    mlm: bool = False
    mim: Any = None
    classes: int | None = None
    assignment: bool = False
    decoder: Any = None

    def build(self, load_weights: bool = True) -> Model:
        """Build the model.

        Args:
            load_weights: False leaves all weights random, because a checkpoint is loaded afterwards.
        """
        raise NotImplementedError

    def resolved(self) -> ModelSpec:
        """Return the spec with every size and normalisation filled in, so that building it needs no other file."""
        raise NotImplementedError

    @property
    def num_images(self) -> int:
        return 1

    @property
    def has_image(self) -> bool:
        """Whether the model has an image tower."""
        return self.image is not None or self.towers is not None

    @property
    def has_text(self) -> bool:
        """Whether the model has a text tower."""
        return self.text is not None or self.towers is not None


class Model(nn.Module):
    """Base class of models. A model owns every parameter: towers, projections, heads and learned scalars.

    | member | default | meaning |
    |---|---|---|
    | ``image``, ``text`` | required | the towers, each a module or None |
    | ``embed_size`` | required | E |
    | ``preprocess`` | required | input format of images, None without an image tower |
    | ``encode_image``, ``encode_text`` | not offered | inputs -> `Encoded` |
    | ``can_encode(modality)`` | has a tower | whether features of a modality exist independently of the other one |
    | ``can_contrast`` | False | embeddings of both modalities share a space, and ``scale`` exists |
    | ``scale``, ``bias`` | not offered, None | multiplier of cosine similarities, and what is added to them |
    | ``vl`` | None | second contrastive head, with a ``scale`` of its own |
    | ``embed_text`` | not offered | pooled states of texts -> embeddings |
    | ``project`` | not offered | encoded images -> what fusion reads of them, computed once for all passes |
    | ``can_match``, ``match``, ``itm`` | False | logits of image-text matching, and their head |
    | ``can_attend``, ``match_with_attention``, ``num_attention_layers`` | False | ``match`` with cross-attention in the graph |
    | ``fuse_all`` | not offered | every state of each text after it has been fused with its image |
    | ``can_predict_tokens``, ``masked_text``, ``mlm`` | False | logits of masked tokens, and their head |
    | ``masked_image``, ``mim`` | None | predictions of masked patches, and their head |
    | ``num_classes``, ``classify``, ``classifier`` | None | C, logits of the classes, and the module that computes them |
    | ``num_images`` | 1 | images of a sample that ``classify`` and ``assign`` read |
    | ``assign`` | not offered | logits of which image a text belongs to |
    | ``can_answer``, ``answer``, ``ask`` | False | logits of the tokens of answers; what the decoder reads of questions |
    | ``can_caption``, ``caption``, ``describe`` | False | logits of the tokens of captions; what the decoder reads of images |
    | ``fuses_inputs`` | False | early fusion: fusing passes read embedded inputs, and the encode methods take ``detach`` |
    | ``heads``, ``add_heads`` | empty | heads that objectives added, by name |
    | ``reports`` | empty | part of the model -> account of its loaded weights, None if it started at random |
    | ``scalars()`` | empty | learned scalars for the log |
    | ``clamp_scalars()`` | does nothing | put learned scalars back within their bounds after an optimizer step |
    | ``layer_ids()`` | required | depth of each parameter by name, for layer-wise learning rates |
    | ``no_weight_decay()`` | required | names of parameters without weight decay, besides those of dimension 1 |
    | ``set_activation_checkpointing(mode)`` | required | recompute activations in the backward pass |
    """

    image: Any
    text: Any
    embed_size: int
    vl: Any
    itm: Any
    classifier: Any
    mlm: Any
    mim: Any

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict()
        self.vl = self.itm = self.classifier = self.mlm = self.mim = None

    def add_heads(self, specs: Mapping[str, HeadSpec]) -> None:
        """Build the heads that objectives read as ``model.heads[name]``.

        Raises:
            UserError: if two objectives ask for a head of the same name.
        """
        for name, spec in specs.items():
            if name in self.heads:
                raise UserError(f"two objectives ask for a head named {name!r}; keep one of them")
            self.heads[name] = spec.build(self.embed_size)

    # capabilities

    @property
    def preprocess(self) -> Preprocess | None:
        raise NotImplementedError

    @property
    def reports(self) -> dict[str, LoadReport | None]:
        return {}

    def can_encode(self, modality: Modality) -> bool:
        return (self.image if modality == "image" else self.text) is not None

    @property
    def can_contrast(self) -> bool:
        return False

    @property
    def can_match(self) -> bool:
        return self.itm is not None

    @property
    def num_attention_layers(self) -> int:
        return 0

    @property
    def can_attend(self) -> bool:
        return self.can_match and self.num_attention_layers > 0

    @property
    def can_predict_tokens(self) -> bool:
        return self.mlm is not None

    @property
    def num_classes(self) -> int | None:
        if self.classifier is None:
            return None
        *_, last = self.classifier.modules()  # a linear layer, or the last one of several layers
        return last.out_features

    @property
    def num_images(self) -> int:
        return 1

    @property
    def can_answer(self) -> bool:
        return False

    @property
    def can_caption(self) -> bool:
        return False

    @property
    def fuses_inputs(self) -> bool:
        return False

    # single modalities

    def encode_image(self, image: Tensor) -> Encoded:
        """Encode (B, 3, H, W) float32 images, normalised as `preprocess` says."""
        raise NotImplementedError

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """Encode (A, L) int64 ids with their (A, L) bool mask, padded on the right."""
        raise NotImplementedError

    def embed_text(self, pooled: Tensor) -> Tensor:
        """Project (A, D) pooled states of texts to (A, E) embeddings of unit norm."""
        raise NotImplementedError

    @property
    def scale(self) -> Tensor:
        """(1,) multiplier of cosine similarities."""
        raise NotImplementedError

    @property
    def bias(self) -> Tensor | None:
        """(1,) added to the scaled similarities (SigLIP), or None."""
        return None

    # both modalities

    def project(self, image: Encoded) -> Any:
        """Return what fusion reads of B images, e.g. the keys and values of every layer. Every fusing pass takes it."""
        raise NotImplementedError

    def match(self, image: Any, text: Encoded, texts: Tensor | None = None, images: Tensor | None = None) -> Tensor:
        """Score pairs of images and texts.

        Args:
            image: B images after `project`.
            text: A encoded texts.
            texts: (n,) int64 text of each pair; None pairs each text once, n = A.
            images: (m,) int64 image of the last m pairs. The first n - m pairs go through the B images in order,
                repeatedly.

        Returns:
            (n, 2) logits; ``[:, 1]`` is that of a pair.
        """
        raise NotImplementedError

    def match_with_attention(
        self, layer: int, image: Encoded, text: Encoded, images: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Score pairs like `match`, with the cross-attention of one layer as part of the graph (for Grad-CAM).

        Args:
            layer: 0 to ``num_attention_layers - 1``.
            image: B encoded images.
            text: n encoded texts.
            images: (n,) int64 image of each text; None pairs them in order.

        Returns:
            (n, 2) logits and (n, heads, L, P) attention probabilities.
        """
        raise NotImplementedError

    def fuse_all(self, f: Encodings) -> Tensor:
        """Return the (B, L, D) states of the texts of ``f`` fused with their images."""
        raise NotImplementedError

    def masked_text(self, f: Encodings, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Predict masked tokens of the texts of ``f``; a model that fuses reads the images too.

        Args:
            input_ids: (B, L) int64, masked.
            positions: (M,) int64 in the flattened (B * L), of real tokens.

        Returns:
            (M, V) logits.
        """
        raise NotImplementedError

    def masked_image(self, f: Encodings, positions: Tensor) -> Tensor:
        """Predict ``mim.targets`` at masked patches of the images of ``f``.

        Args:
            positions: (M,) int64 masked patches in the flattened (B * h * w).

        Returns:
            (M, outputs).
        """
        raise NotImplementedError

    def classify(self, f: Encodings) -> Tensor:
        """Return (B, C) logits of the classes of the samples of ``f``."""
        raise NotImplementedError

    def assign(self, images: tuple[Any, ...], text: Encoded) -> Tensor:
        """Score which of several images each text belongs to.

        Args:
            images: ``num_images`` times B images after `project`.
            text: B encoded texts.

        Returns:
            (B, num_images + 1) logits, the last for none of the images.
        """
        raise NotImplementedError

    def answer(self, f: Encodings, answers: Answers) -> Predicted:
        """Predict the tokens of ``answers`` to the texts of ``f``, given their images."""
        raise NotImplementedError

    def caption(self, f: Encodings) -> Predicted:
        """Predict the tokens of the texts of ``f`` from its images."""
        raise NotImplementedError

    def ask(self, image: Any, text: Encoded, images: Tensor | None = None) -> Any:
        """Return what the decoder reads of questions about images; arguments as those of `match`."""
        raise NotImplementedError

    def describe(self, image: Encoded) -> Any:
        """Return what the decoder reads of images without a question."""
        raise NotImplementedError

    # bookkeeping

    def scalars(self) -> dict[str, float]:
        return {}

    def clamp_scalars(self) -> None:
        """Put learned scalars back within their bounds."""

    def layer_ids(self) -> dict[str, int]:
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        raise NotImplementedError

    def set_activation_checkpointing(self, mode: Checkpointing) -> None:
        raise NotImplementedError


def encoded_by_head(tokens: Tensor, mask: Tensor, projection: Tensor, inputs: Tensor | None = None) -> Encoded:
    """Return the encoding of a modality from its tokens and the (B, E) output of its projection head."""
    return Encoded(tokens, mask, l2_normalize(projection), inputs, unnormalised=projection)


def l2_normalize(x: Tensor) -> Tensor:
    """Scale rows to length 1, in float32 or higher precision."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
