"""ALBEF: an image and a text tower aligned by contrast, and a fusion encoder on top (Li et al. 2021, sec. 3.1).

B images, A texts, n pairs, P image tokens, L text tokens, D width, E embedding, M masked tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.data.preprocess import Preprocess
from vlp.encoders.activation_checkpointing import Checkpointing
from vlp.encoders.base import ImageTower, ImageTowerSpec, TextTower, TextTowerSpec
from vlp.encoders.decoder import Decoder, Predicted
from vlp.encoders.fusion import AlternatingImages, CrossAttentionCache, Fusion, ImageTokens, Outputs
from vlp.encoders.grid_positions import sine_positions
from vlp.encoders.heads import vocabulary_head
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.models.base import Encodings, Model, ModelSpec, encoded_by_head, l2_normalize
from vlp.models.dual import tower_layer_ids, tower_no_weight_decay
from vlp.models.temperature import LearnedScale
from vlp.specs.fields import check_limits, setting
from vlp.types import Answers, Encoded
from vlp.weights import reading
from vlp.weights.albef import as_twins, load_albef
from vlp.weights.reading import LoadReport
from vlp.weights.run import is_run, read_run

# parts that depend on the objectives: a file may lack some, or have some that the model does not need
HEADS = (
    "image_projection",
    "text_projection",
    "temperature",
    "itm",
    "mlm",
    "classifier",
    "assignment",
    "decoder",
    "heads",
    "grid_positions",
)
# source of the initial weights of a decoder that the weights lack
DECODER_START = {
    "fusion.layers.": "decoder.layers.",
    "text.model.embeddings.": "decoder.embeddings.",
    "mlm.": "decoder.head.",
}


@dataclass(frozen=True)
class Albef(ModelSpec):
    """Spec of an ALBEF. The model has only the parameters that its objectives use.

    Args:
        image: Image tower.
        text: Text tower: the first layers of BERT, ``config={"num_hidden_layers": 6}`` on its folder.
        fusion: The last layers of BERT, with cross-attention. Built if a head needs it.
        itc: Linear projections of the first tokens to ``embed_size``, and the temperature. Without them `Encoded.embed` is
            the first token, normalised.
        itm: A linear layer on the first fused token: does the text belong to the image?
        mlm: A head that predicts masked tokens from fused states, tied to the word embeddings. It is loaded from the
            folder of the text tower's weights if that has one.
        classes: C, outputs of a head on the first fused token, two linear layers with a ReLU between them (visual
            entailment, NLVR2, VQA as classification). None builds no such head.
        assignment: A linear layer on the first fused token that tells which of ``fusion.images`` the text belongs to, or
            neither. The twin layers of NLVR2 are pre-trained with it.
        decoder: Decoder of answers to questions, or of captions. None builds none.
        embed_size: E.
        temperature: Initial temperature; similarities are divided by it.
        temperature_min: Smallest temperature that takes effect. None leaves it unbounded.
        temperature_max: Largest temperature that takes effect. None leaves it unbounded.
        grid_positions: 2-D positions that are added to the grid of an image tower whose tokens have none, such as a CNN:
            fixed "sine" ones, or "learned" ones that start as these. "none" adds none, as in runs from before this field.
        weights: A checkpoint of ALBEF, see `vlp.weights.albef`, or the folder of a run. The whole model starts from it.
            Positions are resized to ``image.image_size``. Heads that it lacks are new. A decoder that it lacks starts as
            its fusion layers, word embeddings and head for masked tokens, as published.
    """

    image: ImageTowerSpec
    text: TextTowerSpec
    fusion: Fusion = Fusion()
    itc: bool = True
    itm: bool = True
    mlm: bool = True
    classes: int | None = setting(None, least=1)
    assignment: bool = False
    decoder: Decoder | None = None
    embed_size: int = setting(256, least=1)
    temperature: float = setting(0.07, above=0)
    temperature_min: float | None = setting(0.001, above=0)
    temperature_max: float | None = setting(0.5, above=0)
    grid_positions: Literal["none", "learned", "sine"] = "sine"
    weights: str | None = None

    @property
    def num_images(self) -> int:
        return self.fusion.images

    def resolved(self) -> Albef:
        """Fill in all sizes and normalisation, so that `build(load_weights=False)` reads no weights."""
        parts = {"image": self.image.resolved(), "text": self.text.resolved()}
        parts["decoder"] = self.decoder and self.decoder.resolved(self.text)
        return replace(self, fusion=self.fusion.resolved(self.text), **parts)

    def build(self, load_weights: bool = True) -> AlbefModel:
        """Build the model.

        Args:
            load_weights: False leaves everything random, because a checkpoint is loaded afterwards.

        Raises:
            UserError: if sizes or weights do not fit together.
        """
        check_limits(self)
        if self.fusion.images > 1 and (self.itm or self.mlm):
            raise UserError(f"itm and mlm read one image, fusion.images is {self.fusion.images}; set both to false")
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


# The published model: DeiT-base for images normalised like CLIP's, six layers of BERT-base for texts and six for fusion.
BASE = Albef(
    image=TimmImage("deit_base_patch16_224", image_size=384, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD),
    text=BertText(
        config={
            "model_type": "bert",
            "vocab_size": 30_522,
            "hidden_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
        },
        dropout=0.1,
    ),
    fusion=Fusion(layers=6, heads=12, hidden_size=3072, dropout=0.1, eps=1e-12),
)


class AlbefModel(LearnedScale, Model):
    """Two towers whose embeddings share a space, and a fusion encoder in which texts attend to images.

    Objectives call `encode_image` and `encode_text` for each modality, `project` once per image and `fuse` once per pass over
    pairs, and the heads: `match`, `masked_text`, `classify`, `answer` and `caption`.

    Args:
        spec: Everything but the towers.
        image: Image tower.
        text: Text tower.
        load_weights: Load the weights of fusion, heads and decoder, see `Albef.build`.
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
            self.mlm = vocabulary_head(spec.text, text, load_weights, spec.fusion.init)
        if spec.classes:
            width = text.width
            self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, spec.classes))
        if spec.assignment:
            self.assignment = nn.Linear(text.width, spec.fusion.images + 1)
        if spec.decoder:
            source_width = text.width if answers else image.width
            decoder, sizes = spec.decoder.resolved(spec.text), spec.text.layer_sizes()
            self.decoder = decoder.build(text, sizes, source_width, load_weights)
        positions = None
        if spec.grid_positions != "none" and image.grid is not None and not image.grid_has_positions:
            positions = sine_positions(image.grid, image.width)  # (P, image width)
        if spec.grid_positions == "learned" and positions is not None:
            self.grid_positions = nn.Parameter(positions)
        else:
            self.register_buffer("grid_positions", positions, persistent=False)
        self.report: LoadReport | None = None

    def load(self, student: Mapping[str, Tensor]) -> None:
        """Load the state dict of a checkpoint, and keep the account in ``reports``.

        Heads that it lacks stay unchanged, and heads that this model lacks are skipped. The report names both.

        Raises:
            UserError: if the sizes differ.
        """
        if self.fusion is not None:
            images = self.fusion.images
            student = as_twins(student, len(self.fusion.layers) // images, images)
        grids = {f"image.{name}": grid for name, grid in self.image.position_grids().items()}
        own = {name.partition(".")[0] for name, _ in self.named_parameters()}
        ignored = [part for part in (*HEADS, "fusion") if part not in own]
        self.report = reading.load(self, self._with_decoder(student), new=HEADS, ignored=ignored, grids=grids)

    def _with_decoder(self, student: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Add initial weights for a decoder that ``student`` lacks, as far as sizes allow.

        If the decoder's source is not as wide as that of fusion, its cross-attention is new.
        """
        if self.decoder is None or any(key.startswith("decoder.") for key in student):
            return student
        own, begun = self.state_dict(), {}
        for key, value in student.items():
            for of, to in DECODER_START.items():
                name = to + key.removeprefix(of)
                if key.startswith(of) and name in own and own[name].shape == value.shape:
                    begun[name] = value
        return {**student, **begun}

    @property
    def can_contrast(self) -> bool:
        return self.itc

    @property
    def num_attention_layers(self) -> int:
        return 0 if self.fusion is None else len(self.fusion.layers)

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
        return self.image.preprocess

    @property
    def reports(self) -> dict[str, LoadReport | None]:
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
        return super().scalars() if self.itc else {}

    def clamp_scalars(self) -> None:
        if self.itc:
            super().clamp_scalars()

    def encode_image(self, image: Tensor) -> Encoded:
        tokens = self.image(image)  # (B, P, D)
        if self.grid_positions is not None:  # none for the pooled token
            tokens = torch.cat([tokens[:, :1], tokens[:, 1:] + self.grid_positions], 1)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return encoded_by_head(tokens, mask, self.image_projection(tokens[:, 0]))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        tokens = self._text_tokens(input_ids, attention_mask)  # (A, L, D)
        return encoded_by_head(tokens, attention_mask, self.text_projection(tokens[:, 0]))

    def embed_text(self, pooled: Tensor) -> Tensor:
        return l2_normalize(self.text_projection(pooled))

    def _text_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.text(input_ids, attention_mask)
        # The tower may drop padding that all rows share. Positions in the flattened (A * L) must stay valid.
        return F.pad(tokens, (0, 0, 0, input_ids.shape[1] - tokens.shape[1]))

    def project(self, image: Encoded) -> CrossAttentionCache:
        """Project B images to the keys and values of every fusion layer, once for all passes over them."""
        return self.fusion.project(image.tokens)

    def fuse(
        self,
        image: CrossAttentionCache | ImageTokens | AlternatingImages,
        text: Encoded,
        texts: Tensor | None = None,
        images: Tensor | None = None,
        at: Outputs = None,
    ) -> Tensor:
        """Fuse texts with images, n pairs of them: (n, L, D); see `vlp.encoders.fusion.FusionEncoder.forward`."""
        return self.fusion(text.tokens, text.mask, image, texts, images, at)

    def fuse_all(self, f: Encodings) -> Tensor:
        return self.fuse(self._image_of(f), f.text)

    def match(
        self,
        image: CrossAttentionCache | ImageTokens,
        text: Encoded,
        texts: Tensor | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        return self.itm(self.fuse(image, text, texts, images, at="first"))

    def match_with_attention(
        self, layer: int, image: Encoded, text: Encoded, images: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        states, attention = self.fusion.with_attention(
            layer, text.tokens, text.mask, self.project(image), images=images
        )  # (n, L, D), (n, heads, L, P)
        return self.itm(states[:, 0]), attention

    def masked_text(self, f: Encodings, input_ids: Tensor, positions: Tensor) -> Tensor:
        tokens = self._text_tokens(input_ids, f.batch.attention_mask)  # (B, L, D)
        states = self.fusion(tokens, f.batch.attention_mask, self._image_of(f), at=positions)  # (M, D)
        return self.mlm(states, self.text.get_input_embeddings())

    def classify(self, f: Encodings) -> Tensor:
        """Classify texts with their image, or with all of their images, by the first fused token: (B, C) logits."""
        if self.can_answer:  # the decoder reads every fused state, the first among them
            return self.classifier(f.fused[:, 0])
        if self.fusion.images == 1:
            image = self._image_of(f)
        else:
            if len(f.image_views) != self.fusion.images:
                raise ValueError(
                    f"each text attends to {self.fusion.images} images, and the batch has {len(f.image_views)}"
                )
            image = AlternatingImages(tuple(map(self.project, f.image_views)))
        return self.classifier(self.fuse(image, f.text, at="first"))

    def assign(self, images: tuple[CrossAttentionCache, ...], text: Encoded) -> Tensor:
        return self.assignment(self.fuse(AlternatingImages(images), text, at="first"))

    def ask(
        self, image: CrossAttentionCache | ImageTokens, text: Encoded, images: Tensor | None = None
    ) -> CrossAttentionCache:
        """Project the fused states of questions to the keys and values of every decoder layer."""
        return self.decoder.project(self.fuse(image, text, images=images), text.mask)

    def describe(self, image: Encoded) -> CrossAttentionCache:
        """Project images to the keys and values of every decoder layer."""
        return self.decoder.project(image.tokens)

    def answer(self, f: Encodings, answers: Answers) -> Predicted:
        source = self.decoder.project(f.fused, f.text.mask)
        return self.decoder.predict(answers.input_ids, answers.attention_mask, source, answers.row)

    def caption(self, f: Encodings) -> Predicted:
        return self.decoder.predict(f.batch.input_ids, f.batch.attention_mask, self.describe(f.image))

    def _image_of(self, f: Encodings) -> CrossAttentionCache | ImageTokens:
        """Return what fusion reads of the images of ``f``.

        While training, the keys and values that all objectives share. A teacher or an evaluation fuses once, for which the
        image tokens are cheaper. Training needs the keys: without them their biases have no gradient, which DDP refuses.
        """
        learns = torch.is_grad_enabled() and self.fusion.layers[0].cross_attention.key.bias.requires_grad
        return f.projected if learns else ImageTokens(f.image.tokens)

    def layer_ids(self) -> dict[str, int]:
        """Return the depth of each parameter by name: towers, then fusion, then heads and scalars at the top."""
        depths = tower_layer_ids(self.image, self.text)
        towers = max(depths.values())
        if self.fusion is not None:
            depths |= {f"fusion.{name}": towers + depth for name, depth in self.fusion.layer_ids().items()}
        if self.decoder is not None:
            # embeddings are at the depth of the text tower's, layers at that of the fusion layers they start as
            ids = self.decoder.layer_ids()
            depths |= {f"decoder.{name}": depth and towers + depth for name, depth in ids.items()}
        top = max(depths.values()) + 1
        return {name: depths.get(name, top) for name, _ in self.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay: those of the towers, and the temperature."""
        towers = tower_no_weight_decay(self.image, self.text)
        decoder = {f"decoder.{name}" for name in self.decoder.no_weight_decay()} if self.decoder is not None else set()
        return towers | decoder | ({"temperature"} if self.itc else set())

    def set_activation_checkpointing(self, mode: Checkpointing) -> None:
        """Recompute activations in the backward pass; UserError if a tower cannot."""
        for part in (self.image, self.text, self.fusion, self.decoder):
            if part is not None:
                part.set_activation_checkpointing(mode)
