"""ALBEF: an image and a text encoder, aligned by contrast, and a fusion encoder on top (Li et al. 2021, sec. 3.1).

B images, A texts, n pairs, P image tokens, L text tokens, D width, E embedding, M masked tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.data.preprocess import Preprocess
from vlp.encoders.activation_checkpointing import Checkpointing
from vlp.encoders.base import ImageTower, ImageTowerSpec, TextTower, TextTowerSpec
from vlp.encoders.decoder import Decoder, Predicted
from vlp.encoders.fusion import AlternatingImages, CrossAttentionCache, Fusion, ImageTokens, Outputs
from vlp.encoders.heads import vocabulary_head
from vlp.errors import UserError
from vlp.models.base import Encodings, Model, ModelSpec, encoded_by_head, l2_normalize
from vlp.models.dual import tower_layer_ids
from vlp.models.temperature import LearnedScale, check_temperatures
from vlp.specs.fields import setting
from vlp.types import Answers, Encoded
from vlp.weights import reading
from vlp.weights.albef import as_twins, load_albef
from vlp.weights.reading import LoadReport
from vlp.weights.run import is_run, read_run

# what a file may hold, or lack, that a model for other objectives lacks, or holds
HEADS = ("image_projection", "text_projection", "temperature", "itm", "mlm", "classifier", "assignment", "decoder")
# what a decoder starts as that the weights lack
BEGINNING = {
    "fusion.layers.": "decoder.layers.",
    "text.model.embeddings.": "decoder.embeddings.",
    "mlm.": "decoder.head.",
}


@dataclass(frozen=True)
class Albef(ModelSpec):
    """An ALBEF for the objectives that it is to be trained with; it has no parameter that none of them uses.

    Args:
        text: the first layers of BERT: ``config={"num_hidden_layers": 6}`` on its folder.
        fusion: its last layers, with cross-attention; built where a head asks for it.
        itc: linear projections of the first tokens to ``embed_size``, and the temperature. Without them `Encoded.embed`
            is the first token itself, at unit length.
        itm: a linear layer on fusion's first token: does the text belong to the image?
        mlm: a head that predicts masked tokens from fusion's states, tied to the word embeddings; from the folder of the
            text tower's weights where that has one.
        classes: C of a head on fusion's first token, two linear layers with a ReLU between them (visual entailment, NLVR2,
            VQA as classification); None = there is none.
        assignment: a linear layer on it that tells which of ``fusion.images`` the text belongs to, or none: what NLVR2's
            twins are pre-trained with.
        decoder: layers that write answers to questions, or captions; None = there is none.
        embed_size: E.
        temperature: initial value; similarities are divided by it.
        temperature_min: smallest value that takes effect; None = unbounded.
        temperature_max: largest.
        weights: a checkpoint of ALBEF, see `vlp.weights.albef`, or the folder of a run, from which all of the model
            starts instead; positions are resized to ``image.image_size``. What it has no head for is new; a decoder
            starts as its fusion layers, word embeddings and head for masked words, as published.
    """

    image: ImageTowerSpec
    text: TextTowerSpec
    fusion: Fusion = Fusion()
    itc: bool = True
    itm: bool = True
    mlm: bool = True
    classes: int | None = None
    assignment: bool = False
    decoder: Decoder | None = None
    embed_size: int = setting(256, least=1)
    temperature: float = 0.07
    temperature_min: float | None = 0.001
    temperature_max: float | None = 0.5
    weights: str | None = None

    @property
    def num_images(self) -> int:
        return self.fusion.images

    def resolved(self) -> Albef:
        """The same model with all sizes and normalisation filled in: `build(load_weights=False)` needs no weights then."""
        parts = {"image": self.image.resolved(), "text": self.text.resolved()}
        parts["decoder"] = self.decoder and self.decoder.resolved(self.text)
        return replace(self, fusion=self.fusion.resolved(self.text), **parts)

    def build(self, load_weights: bool = True) -> AlbefModel:
        """The model.

        Args:
            load_weights: False = leave everything random: a checkpoint follows.

        Raises:
            UserError: if the sizes, or the weights, do not go together.
        """
        check_temperatures(self.temperature, self.temperature_min, self.temperature_max)
        if self.fusion.images > 1 and (self.itm or self.mlm):
            raise UserError(f"itm and mlm look at one image, fusion.images is {self.fusion.images}; set both to false")
        part_by_part = load_weights and not self.weights
        image, text = self.image.build(part_by_part), self.text.build(part_by_part)
        if not text.returns_token_states:
            raise UserError(
                "fusion reads the state of every text token, the first one pooled; set text.pool to cls, or choose "
                "another text tower"
            )
        model = AlbefModel(self, image, text, part_by_part)
        if load_weights and self.weights:
            model.load(read_run(self.weights) if is_run(self.weights) else load_albef(self.weights).student)
        return model


class AlbefModel(LearnedScale, Model):
    """Images and texts on one sphere, and texts that look at images; owns every parameter.

    What the objectives call: `encode_image` and `encode_text` for each modality; `project` once for each image and
    `fuse` for each pass over pairs; `match` for the scores of pairs; `masked_text` for the words under masks; `classify` for
    the classes of pairs; `answer` and `caption` for what is written about them.

    Args:
        spec: of all but the towers.
        image: tower, see `vlp.encoders.base.ImageTower`.
        text: tower, see `vlp.encoders.base.TextTower`.
        load_weights: see `Albef.build`.
    """

    def __init__(self, spec: Albef, image: ImageTower, text: TextTower, load_weights: bool = True):
        super().__init__()
        self.image, self.text, self.itc = image, text, spec.itc
        self.embed_size = spec.embed_size if spec.itc else text.width
        self.image_projection: nn.Module = nn.Linear(image.width, spec.embed_size) if spec.itc else nn.Identity()
        self.text_projection: nn.Module = nn.Linear(text.width, spec.embed_size) if spec.itc else nn.Identity()
        if spec.itc:
            self.add_scale(spec.temperature, spec.temperature_min, spec.temperature_max)
        self.fusion = self.itm = self.mlm = self.classifier = self.assignment = self.decoder = None
        answers = spec.decoder is not None and spec.decoder.source == "fusion"
        if spec.itm or spec.mlm or spec.classes or spec.assignment or answers:
            self.fusion = spec.fusion.resolved(spec.text).build(text.width, image.width, load_weights)
        if spec.itm:
            self.itm = nn.Linear(text.width, 2)
        if spec.mlm:
            self.mlm = vocabulary_head(spec.text, text, load_weights)
        if spec.classes:
            width = text.width
            self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, spec.classes))
        if spec.assignment:
            self.assignment = nn.Linear(text.width, spec.fusion.images + 1)
        if spec.decoder:
            source_width = text.width if answers else image.width
            decoder, sizes = spec.decoder.resolved(spec.text), spec.text.layer_sizes()
            self.decoder = decoder.build(text, sizes, source_width, load_weights)
        self.report: LoadReport | None = None

    def load(self, student: Mapping[str, Tensor]) -> None:
        """Takes everything from a checkpoint's ``student``, and says so in ``reports``.

        Heads that it lacks stay as they are, and what this model is built without is left out; the report names both.

        Raises:
            UserError: if it is of other sizes.
        """
        if self.fusion is not None:
            images = self.fusion.images
            student = as_twins(student, len(self.fusion.layers) // images, images)
        grids = {f"image.{name}": grid for name, grid in self.image.position_grids().items()}
        own = {name.partition(".")[0] for name, _ in self.named_parameters()}
        ignored = [part for part in (*HEADS, "fusion") if part not in own]
        self.report = reading.load(self, self._with_decoder(student), new=HEADS, ignored=ignored, grids=grids)

    def _with_decoder(self, student: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``student`` with the beginning of a decoder that it lacks, as far as sizes allow: with a source of another width than
        fusion's, the layers' cross-attention to it is new."""
        if self.decoder is None or any(key.startswith("decoder.") for key in student):
            return student
        own, begun = self.state_dict(), {}
        for key, value in student.items():
            for of, to in BEGINNING.items():
                name = to + key.removeprefix(of)
                if key.startswith(of) and name in own and own[name].shape == value.shape:
                    begun[name] = value
        return {**student, **begun}

    @property
    def can_contrast(self) -> bool:
        return self.itc

    @property
    def can_match(self) -> bool:
        return self.itm is not None

    @property
    def num_attention_layers(self) -> int:
        return 0 if self.fusion is None else len(self.fusion.layers)

    @property
    def can_predict_tokens(self) -> bool:
        return self.mlm is not None

    @property
    def num_classes(self) -> int | None:
        return None if self.classifier is None else self.classifier[-1].out_features

    @property
    def num_images(self) -> int:
        return 1 if self.fusion is None else self.fusion.images

    @property
    def can_answer(self) -> bool:
        return self.decoder is not None and self.decoder.source == "fusion"

    @property
    def can_caption(self) -> bool:
        return self.decoder is not None and self.decoder.source == "image"

    @property
    def preprocess(self) -> Preprocess:
        """What images must look like, which is the image tower's."""
        return self.image.preprocess

    @property
    def reports(self) -> dict[str, LoadReport | None]:
        """What loading their weights did to the parts; None where none were loaded."""
        if self.report is not None:
            return {"model": self.report}
        parts = {
            "image": self.image,
            "text": self.text,
            "fusion": self.fusion,
            "mlm": self.mlm,
            "decoder": self.decoder,
        }
        return {name: part.report for name, part in parts.items() if part is not None}

    def scalars(self) -> dict[str, float]:
        """For the log."""
        return super().scalars() if self.itc else {}

    def clamp_scalars(self) -> None:
        """Put the temperature back within the bounds, after an optimizer step."""
        if self.itc:
            super().clamp_scalars()

    def encode_image(self, image: Tensor) -> Encoded:
        """(B, 3, H, W) float32, normalised as `preprocess` says."""
        tokens = self.image(image)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return encoded_by_head(tokens, mask, self.image_projection(tokens[:, 0]))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """(A, L) int64 and bool, padded on the right."""
        tokens = self._text_tokens(input_ids, attention_mask)
        return encoded_by_head(tokens, attention_mask, self.text_projection(tokens[:, 0]))

    def embed_text(self, pooled: Tensor) -> Tensor:
        return l2_normalize(self.text_projection(pooled))

    def _text_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.text(input_ids, attention_mask)
        # the tower may have cut padding that all rows share; positions in (A * L) are to stay valid
        return F.pad(tokens, (0, 0, 0, input_ids.shape[1] - tokens.shape[1]))

    def project(self, image: Encoded) -> CrossAttentionCache:
        """What fusion reads of B images: once for all passes over them."""
        return self.fusion.project(image.tokens)

    def fuse(
        self,
        image: CrossAttentionCache | ImageTokens | AlternatingImages,
        text: Encoded,
        texts: Tensor | None = None,
        images: Tensor | None = None,
        at: Outputs = None,
    ) -> Tensor:
        """(n, L, D) texts that have looked at images; see `vlp.encoders.fusion.FusionEncoder.forward`."""
        return self.fusion(text.tokens, text.mask, image, texts, images, at)

    def fuse_all(self, f: Encodings) -> Tensor:
        """(B, L, D) the texts of ``f`` fused with its images; see `vlp.forward.Forward.fused`."""
        return self.fuse(self._image_of(f), f.text)

    def match(
        self,
        image: CrossAttentionCache | ImageTokens,
        text: Encoded,
        texts: Tensor | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """(n, 2) logits of image-text matching, [:, 1] for a pair; arguments as those of `fuse`."""
        return self.itm(self.fuse(image, text, texts, images, at="first"))

    def match_with_attention(
        self, layer: int, image: Encoded, text: Encoded, images: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Model.match_with_attention` and `vlp.encoders.fusion.FusionEncoder.with_attention`."""
        states, attention = self.fusion.with_attention(
            layer, text.tokens, text.mask, self.project(image), images=images
        )  # (n, L, D), (n, heads, L, P)
        return self.itm(states[:, 0]), attention

    def masked_text(self, f: Encodings, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Logits of what stood at masked places of the texts of ``f``, with a look at its images.

        Args:
            f: of which the attention mask and the images are taken.
            input_ids: (B, L) int64, masked.
            positions: (M,) int64 in the flattened (B * L), of real tokens.

        Returns:
            (M, V).
        """
        tokens = self._text_tokens(input_ids, f.batch.attention_mask)
        states = self.fusion(tokens, f.batch.attention_mask, self._image_of(f), at=positions)
        return self.mlm(states, self.text.get_input_embeddings())

    def classify(self, f: Encodings) -> Tensor:
        """(B, C) logits of the classes of texts with their image, or with all of their images, from fusion's first token."""
        if self.can_answer:  # the decoder reads every fused state, the first among them
            return self.classifier(f.fused[:, 0])
        if self.fusion.images == 1:
            image = self._image_of(f)
        else:
            if len(f.image_views) != self.fusion.images:
                raise ValueError(
                    f"each text looks at {self.fusion.images} images, and the batch has {len(f.image_views)}"
                )
            image = AlternatingImages(tuple(map(self.project, f.image_views)))
        return self.classifier(self.fuse(image, f.text, at="first"))

    def assign(self, images: tuple[CrossAttentionCache, ...], text: Encoded) -> Tensor:
        """Score which of ``fusion.images`` images each text belongs to, see `Model.assign`."""
        return self.assignment(self.fuse(AlternatingImages(images), text, at="first"))

    def ask(
        self, image: CrossAttentionCache | ImageTokens, text: Encoded, images: Tensor | None = None
    ) -> CrossAttentionCache:
        """What the decoder reads of questions: fusion's states; arguments as those of `fuse`."""
        return self.decoder.project(self.fuse(image, text, images=images), text.mask)

    def describe(self, image: Encoded) -> CrossAttentionCache:
        """What the decoder reads of images alone."""
        return self.decoder.project(image.tokens)

    def answer(self, f: Encodings, answers: Answers) -> Predicted:
        """The tokens of answers to the texts of ``f``, as the decoder would write them."""
        source = self.decoder.project(f.fused, f.text.mask)
        return self.decoder.predict(answers.input_ids, answers.attention_mask, source, answers.row)

    def caption(self, f: Encodings) -> Predicted:
        """The tokens of the texts of ``f``, as the decoder would write them about its images."""
        return self.decoder.predict(f.batch.input_ids, f.batch.attention_mask, self.describe(f.image))

    def _image_of(self, f: Encodings) -> CrossAttentionCache | ImageTokens:
        """Return what fusion reads of the images of ``f``.

        While training, the keys and values that all objectives share. A teacher or an evaluation fuses once, for which the
        image tokens are cheaper. Training needs the keys: without them their biases have no gradient, which DDP refuses.
        """
        learns = torch.is_grad_enabled() and self.fusion.layers[0].cross_attention.key.bias.requires_grad
        return f.projected if learns else ImageTokens(f.image.tokens)

    def layer_ids(self) -> dict[str, int]:
        """Parameter name to depth, for layer-wise learning rates: towers, fusion, and heads and scalars as the top."""
        depths = tower_layer_ids(self.image, self.text)
        towers = max(depths.values())
        if self.fusion is not None:
            depths |= {f"fusion.{name}": towers + depth for name, depth in self.fusion.layer_ids().items()}
        if self.decoder is not None:
            # the embeddings are as deep as the text tower's, the layers as fusion's that they start as
            ids = self.decoder.layer_ids()
            depths |= {f"decoder.{name}": depth and towers + depth for name, depth in ids.items()}
        top = max(depths.values()) + 1
        return {name: depths.get(name, top) for name, _ in self.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are no weights: what the towers name, and the temperature."""
        towers = {f"image.{name}" for name in self.image.no_weight_decay()}
        towers |= {f"text.{name}" for name in self.text.no_weight_decay()}
        decoder = {f"decoder.{name}" for name in self.decoder.no_weight_decay()} if self.decoder is not None else set()
        return towers | decoder | ({"temperature"} if self.itc else set())

    def set_activation_checkpointing(self, how: Checkpointing) -> None:
        """Recompute activations in the backward instead of keeping them; UserError where a tower cannot."""
        for part in (self.image, self.text, self.fusion, self.decoder):
            if part is not None:
                part.set_activation_checkpointing(how)
