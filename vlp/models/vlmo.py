"""VLMo: one transformer that is image encoder, text encoder and fusion encoder (Bao et al. 2022, arXiv:2111.02358).

B images, A texts, n pairs, P image tokens, L text tokens, D width, E embedding, M masked tokens, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlp.data.preprocess import Preprocess
from vlp.encoders.activation_checkpointing import Checkpointing
from vlp.encoders.heads import PatchHead, VocabularyHead
from vlp.encoders.mome import Mome, MomeEncoder
from vlp.encoders.ragged import RaggedBatch
from vlp.errors import UserError
from vlp.models.base import Encodings, Modality, Model, ModelSpec, encoded_by_head
from vlp.models.temperature import LearnedScale, check_temperatures
from vlp.models.vlmo_start import grid_of_run, start
from vlp.specs.fields import setting
from vlp.types import Encoded
from vlp.weights.reading import LoadReport
from vlp.weights.run import is_run
from vlp.weights.vlmo import load_vlmo


@dataclass(frozen=True)
class Vlmo(ModelSpec):
    """A VLMo for the objectives that it is to be trained with; it has no parameter that none of them uses.

    What a single modality goes through depends on them too: with ``itc`` or ``mim``, or without the vision-language
    expert, all layers with its own expert; otherwise there is nothing that would read it, and it is embedded only.

    Args:
        encoder: the transformer.
        itc: projections of the first tokens to ``embed_size``, and the scale of similarities.
        itc_vl: a second such head, where the top layers are the vision-language experts: objectives with ``head="vl"``.
        itm: pooler and linear layer on the first token of both: does the text belong to the image?
        mlm: a head that predicts masked words, of texts with their images, or of texts alone where there are none.
        mim: what a head predicts of masked patches: a spec of `vlp.encoders.patch_targets`; None = there is none.
        classes: C of a classifier of pairs; None = there is none.
        images: of each sample that is classified; NLVR2 has 2, and ``encoder.image_kinds`` too.
        embed_size: E; None = D, as published.
        tie_words: the head for words has the matrix of the word embeddings; the published one has its own.
        temperature: initial value, of both heads; similarities are divided by it, its inverse is learned as a log.
        temperature_min: smallest value that takes effect; None = unbounded, as in the published code, which lost it.
        temperature_max: largest.
        weights: a published checkpoint of VLMo or BEiT, see `vlp.weights.vlmo`, or the folder of a run, from which all
            that it has starts; positions are resized to ``encoder.image_size``.
        text_start: of the text experts: the "weights", or copies of the "image" experts there (the paper's stage 2), and then
            the embeddings of texts may be new.
        vl_start: of the vision-language experts: the "weights", at "random" (the published stage 3), or copies of the experts
            of "text" or "image" in the same layers.
    """

    encoder: Mome = Mome()
    itc: bool = True
    itc_vl: bool = True
    itm: bool = True
    mlm: bool = True
    mim: Any = None
    classes: int | None = None
    images: int = 1
    embed_size: int | None = setting(None, least=1)
    tie_words: bool = False
    temperature: float = 0.07
    temperature_min: float | None = 0.01
    temperature_max: float | None = None
    weights: str | None = None
    text_start: Literal["weights", "image"] = "weights"
    vl_start: Literal["weights", "random", "text", "image"] = "weights"

    @property
    def image(self) -> Mome | None:
        """The encoder, if it takes images: what objectives ask of a spec."""
        return self.encoder if "image" in self.encoder.experts else None

    @property
    def text(self) -> Mome | None:
        """The encoder, if it takes texts."""
        return self.encoder if "text" in self.encoder.experts else None

    @property
    def num_images(self) -> int:
        return self.images

    def resolved(self) -> Vlmo:
        """The same model with all sizes filled in."""
        encoder = self.encoder.resolved()
        return replace(self, encoder=encoder, embed_size=self.embed_size or encoder.width)

    def build(self, load_weights: bool = True) -> VlmoModel:
        """The model.

        Args:
            load_weights: False = leave everything random: a checkpoint follows.

        Raises:
            UserError: if heads and experts, or the sizes, do not go together.
        """
        check_temperatures(self.temperature, self.temperature_min, self.temperature_max)
        both, joint = self.image and self.text, "vl" in self.encoder.experts
        for name, possible in {
            "itc": both,
            "itc_vl": joint and self.itc,
            "itm": joint,
            "mlm": self.text,
            "mim": self.image,
            "classes": joint,
        }.items():
            if getattr(self, name) and not possible:
                wanted = "model.itc" if joint and name == "itc_vl" else "other experts"
                raise UserError(
                    f"model.{name} with the experts {', '.join(self.encoder.experts)} needs {wanted}; set model.{name} to "
                    f"{'none' if name in ('mim', 'classes') else 'false'}, or add them"
                )
        if self.images > self.encoder.image_kinds:
            raise UserError(
                f"images is {self.images}; set encoder.image_kinds to as many, not {self.encoder.image_kinds}"
            )
        for name in ("text_start", "vl_start"):
            if not self.weights and getattr(self, name) in ("text", "image"):
                raise UserError(
                    f"model.{name}={getattr(self, name)} copies experts of model.weights, and there are none; name weights or a "
                    f"run, or set model.{name}=weights to start at random"
                )
        model = VlmoModel(self.resolved(), load_weights)
        if load_weights and self.weights:
            source = grid_of_run(self.weights) if is_run(self.weights) else None
            starts = {"text": self.text_start, "vl": self.vl_start}
            model.report = start(model, load_vlmo(self.weights).student, self.weights, starts, source)
        return model


class ContrastHead(LearnedScale):
    """Bias-free projections of both modalities, and the scale of their similarities."""

    def __init__(self, spec: Vlmo):
        super().__init__()
        self.embed_size = spec.embed_size
        self.image = nn.Linear(spec.encoder.width, spec.embed_size, bias=False)
        self.text = nn.Linear(spec.encoder.width, spec.embed_size, bias=False)
        self.add_scale(spec.temperature, spec.temperature_min, spec.temperature_max, "logit_scale")
        for layer in (self.image, self.text):
            nn.init.trunc_normal_(layer.weight, std=0.02)

    def project(self, pooled: Tensor, modality: Modality) -> Tensor:
        """Project (B, D) pooled states to (B, E)."""
        return (self.image if modality == "image" else self.text)(pooled)


class Classifier(nn.Sequential):
    """Of the (n, images * D) pooled states of a sample: linear, norm, GELU, linear."""

    def __init__(self, width: int, images: int, classes: int):
        layers = nn.Linear(images * width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, classes)
        super().__init__(*layers)
        for layer in layers[::3]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


class VlmoModel(Model):
    """Images and texts by themselves, and texts beside images; owns every parameter.

    What the objectives call: `encode_image` and `encode_text` for each modality; `project` and `match` for the scores of
    pairs; `masked_text` and `masked_image` for what is under masks; `classify` for classes of pairs.

    Args:
        spec: resolved.
        load_weights: see `Vlmo.build`.
    """

    def __init__(self, spec: Vlmo, load_weights: bool = True):
        super().__init__()
        width, joint = spec.encoder.width, "vl" in spec.encoder.experts
        alone = [name for name, reads in (("image", spec.itc or spec.mim), ("text", spec.itc)) if reads or not joint]
        together = joint and (spec.itm or spec.mlm or spec.classes is not None)
        self.encoder = MomeEncoder(spec.encoder, alone, together)
        self.embed_size, self.images = spec.embed_size if spec.itc else width, spec.images
        self.itc = ContrastHead(spec) if spec.itc else None
        self.vl = ContrastHead(spec) if spec.itc_vl else None
        self.pooler = self.itm = self.classifier = self.mlm = self.words = self.mim = None
        if spec.itm or spec.classes is not None:
            self.pooler = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        if spec.itm:
            self.itm = nn.Linear(width, 2)
        if spec.classes is not None:
            self.classifier = Classifier(width, spec.images, spec.classes)
        if spec.mlm:
            self.mlm = VocabularyHead(width, self.encoder.text.words)
            self.words = None if spec.tie_words else nn.Linear(width, spec.encoder.vocab_size, bias=False)
        if spec.mim:
            self.mim = PatchHead(self.encoder, spec.mim.build(self.encoder, load_weights))
        for layer in filter(None, (self.pooler and self.pooler[0], self.itm, self.words)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.report: LoadReport | None = None

    @property
    def image(self) -> MomeEncoder | None:
        """The encoder, if it takes images."""
        return self.encoder if self.encoder.image is not None else None

    @property
    def text(self) -> MomeEncoder | None:
        """The encoder, if it takes texts."""
        return self.encoder if self.encoder.text is not None else None

    def can_encode(self, modality: Modality) -> bool:
        return modality in self.encoder.alone

    @property
    def can_contrast(self) -> bool:
        return self.itc is not None

    @property
    def can_match(self) -> bool:
        return self.itm is not None

    @property
    def can_predict_tokens(self) -> bool:
        return self.mlm is not None

    @property
    def can_predict_patches(self) -> bool:
        return self.mim is not None

    @property
    def num_classes(self) -> int | None:
        return None if self.classifier is None else self.classifier[-1].out_features

    @property
    def num_images(self) -> int:
        return self.images

    @property
    def fuses_inputs(self) -> bool:
        return True

    @property
    def preprocess(self) -> Preprocess | None:
        """What images must look like; None where it takes none."""
        return self.image and self.encoder.preprocess

    @property
    def reports(self) -> dict[str, LoadReport | None]:
        """What loading the weights did; None where none were loaded."""
        return {"model": self.report}

    @property
    def scale(self) -> Tensor:
        """(1,) what multiplies the cosine similarities of the first head."""
        return self.itc.scale

    def scalars(self) -> dict[str, float]:
        """For the log."""
        heads = {"": self.itc, "_vl": self.vl}
        return {name + of: value for of, head in heads.items() if head for name, value in head.scalars().items()}

    def clamp_scalars(self) -> None:
        """Put the temperatures back within the bounds, after an optimizer step."""
        for head in filter(None, (self.itc, self.vl)):
            head.clamp_scalars()

    def encode_image(self, image: Tensor, detach: Callable[[Tensor], Tensor] = lambda inputs: inputs) -> Encoded:
        """(B, 3, H, W) float32, normalised as `preprocess` says.

        Args:
            detach: Applied to the embedded patches before anything reads them, see `vlp.training.detached`.
        """
        inputs = detach(self.encoder.image(image))
        mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        rows = RaggedBatch.of_images(len(inputs), inputs.shape[1], inputs.device)
        return self._encoded(inputs, mask, rows, "image")

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor, detach: Callable[[Tensor], Tensor] = lambda inputs: inputs
    ) -> Encoded:
        """(A, L) int64 and bool, padded on the right; see `encode_image`."""
        inputs = detach(self.encoder.text(input_ids))
        return self._encoded(inputs, attention_mask, RaggedBatch.of_texts(attention_mask), "text")

    def _encoded(self, inputs: Tensor, mask: Tensor, rows: RaggedBatch, modality: Modality) -> Encoded:
        """Of the last layer the first token alone: nothing reads the others."""
        encoder = self.encoder
        if modality not in encoder.alone:
            return encoded_by_head(inputs[:, :1], mask, inputs[:, 0], inputs)
        given = {modality: inputs}
        states, first, depth = encoder.pack(rows, **given), rows.first_tokens(), len(encoder.layers)
        fork = encoder.vl_from if self.vl else 0
        states = encoder.run_layers(states, rows, 0, fork, joint=False)

        def top(joint: bool, head: ContrastHead | None) -> Encoded:
            pooled = encoder.norm(encoder.run_layers(states, rows, fork, depth, joint, first))
            return encoded_by_head(pooled[:, None], mask, head.project(pooled, modality) if head else pooled)

        return replace(top(False, self.itc), inputs=inputs, vl=top(True, self.vl) if self.vl else None)

    def project(self, image: Encoded) -> Tensor:
        """(B, P, D) what is fused of B images: their patches as they went in."""
        return image.inputs

    def fuse(
        self,
        image: Tensor,
        text: Encoded,
        texts: Tensor | None = None,
        images: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """(n, D) first tokens of pairs, or (M, D) others, after all layers.

        Args:
            image: (B, P, D), see `project`.
            texts: (n,) int64 text of each pair; None = each once, n = A.
            images: (m,) int64 image of the last m pairs; the others go through the B images in order, again and again.
            at: (M,) int64 in the flattened (n * L), of real tokens; None = the first of each pair.
        """
        inputs, mask = (text.inputs, text.mask) if texts is None else (text.inputs[texts], text.mask[texts])
        drawn = 0 if images is None else len(images)
        if (len(mask) - drawn) % len(image):
            raise ValueError(
                f"{len(mask) - drawn} texts in the order of {len(image)} images: give whole rounds of them"
            )
        rounds = image.repeat((len(mask) - drawn) // len(image), 1, 1)
        image = rounds if images is None else torch.cat([rounds, image[images]])
        rows = RaggedBatch.of_texts(mask, image.shape[1])
        outputs = rows.first_tokens() if at is None else rows.tokens_at(at // mask.shape[1], at % mask.shape[1])
        return self.encoder(rows, inputs, image, joint=True, outputs=outputs)

    def match(self, image: Tensor, text: Encoded, texts: Tensor | None = None, images: Tensor | None = None) -> Tensor:
        """(n, 2) logits of image-text matching, [:, 1] for a pair; arguments as those of `fuse`."""
        return self.itm(self.pooler(self.fuse(image, text, texts, images)))

    def masked_text(self, f: Encodings, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Logits of what stood at masked places of the texts of ``f``, with a look at its images if it has any.

        Args:
            f: of which the attention mask and the images are taken.
            input_ids: (B, L) int64, masked.
            positions: (M,) int64 in the flattened (B * L), of real tokens.

        Returns:
            (M, V).
        """
        inputs, mask = self.encoder.text(input_ids), f.batch.attention_mask
        if f.batch.image is not None and self.encoder.joint:
            states = self.fuse(f.projected, Encoded(inputs, mask, None, inputs), at=positions)
        else:
            if "text" not in self.encoder.alone:
                raise UserError(
                    "texts without images need text experts in all layers; set model.itc=true, or leave out vl"
                )
            rows, length = RaggedBatch.of_texts(mask), mask.shape[1]
            outputs = rows.tokens_at(positions // length, positions % length)
            states = self.encoder(rows, text=inputs, outputs=outputs)
        return self.mlm(states, self.encoder.text.words if self.words is None else self.words)

    def masked_image(self, f: Encodings, positions: Tensor) -> Tensor:
        """What ``mim.targets`` are predicted to be where patches of the images of ``f`` are masked.

        Args:
            positions: (M,) int64 masked patches, in the flattened (B * h * w).

        Returns:
            (M, outputs).
        """
        count = self.mim.grid[0] * self.mim.grid[1]
        masked = torch.zeros(len(f.batch) * count, dtype=torch.bool, device=positions.device)
        masked[positions] = True
        inputs = self.encoder.image(f.batch.image, 0, masked.view(-1, count), self.mim.mask_token)
        rows = RaggedBatch.of_images(len(inputs), 1 + count, inputs.device)
        outputs = rows.tokens_at(positions // count, 1 + positions % count)
        return self.mim(self.encoder(rows, image=inputs, outputs=outputs))

    def classify(self, f: Encodings) -> Tensor:
        """(B, C) logits of the classes of the samples of ``f``: text with each of its images, whose pooled states go side by
        side into the classifier."""
        text = f.text
        pictures = [f.projected]
        for number, other in enumerate(f.batch.views[: self.images - 1], start=1):
            pictures.append(self.encoder.image(other.image, number))
        if len(pictures) < self.images:
            raise UserError(f"the classifier takes {self.images} images of each sample; the data has {len(pictures)}")
        pooled = [self.pooler(self.fuse(picture, text)) for picture in pictures]
        return self.classifier(torch.cat(pooled, -1))

    def layer_ids(self) -> dict[str, int]:
        """Parameter name to depth, for layer-wise learning rates: encoder, then heads and scalars as the top."""
        depths = {f"encoder.{name}": depth for name, depth in self.encoder.layer_ids().items()}
        top = max(depths.values()) + 1
        return {name: depths.get(name, top) for name, _ in self.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are no weights, see the encoder's; the scales too."""
        named = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        return named | {name for name, p in self.named_parameters() if p.ndim == 1}

    def set_activation_checkpointing(self, how: Checkpointing) -> None:
        """See `vlp.encoders.activation_checkpointing`."""
        self.encoder.set_activation_checkpointing(how)
