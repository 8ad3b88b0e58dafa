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
from vlp.encoders.initialisation import init_std
from vlp.encoders.mome import Mome, MomeEncoder
from vlp.encoders.ragged import RaggedBatch
from vlp.errors import UserError
from vlp.models.base import Encodings, Modality, Model, ModelSpec, encoded_by_head
from vlp.models.temperature import LearnedScale
from vlp.models.vlmo_start import initialize
from vlp.specs.fields import check_limits, setting
from vlp.types import Encoded
from vlp.weights.reading import LoadReport
from vlp.weights.run import is_run, run_spec
from vlp.weights.vlmo import load_vlmo


@dataclass(frozen=True)
class Vlmo(ModelSpec):
    """Spec of a VLMo. The model has only the parameters that its objectives use.

    The layers that a single modality passes depend on the objectives too. With ``itc`` or ``mim``, or without the
    vision-language expert, it passes all layers with its own expert. Otherwise no objective reads its states, and it is only
    embedded.

    Args:
        encoder: The transformer.
        itc: Projections of the first tokens to ``embed_size``, and the scale of similarities.
        itc_vl: A second contrastive head, behind the vision-language experts of the top layers, for objectives with
            ``head="vl"``.
        itm: Pooler and linear layer on the first token of the pair: does the text belong to the image?
        mlm: A head that predicts masked tokens of texts with their images, or of texts only if there are no images.
        mim: Targets of masked patches: a spec of `vlp.encoders.patch_targets`. None builds no such head.
        classes: C, outputs of a classifier of pairs. None builds none.
        images: Images of each sample that is classified. NLVR2 has 2, and then ``encoder.image_kinds`` is 2 as well.
        embed_size: E. None is D, as published.
        tie_words: Use the matrix of the word embeddings in the head for masked tokens. The published head has its own.
        temperature: Initial temperature of both heads. Similarities are divided by it; the log of its inverse is learned.
        temperature_min: Smallest temperature that takes effect. None leaves it unbounded, as in the published code, where
            the bound has no effect.
        temperature_max: Largest temperature that takes effect. None leaves it unbounded.
        weights: A published checkpoint of VLMo or BEiT, see `vlp.weights.vlmo`, or the folder of a run. All parameters
            that it has start from it. Positions are resized to ``encoder.image_size``.
        text_start: Start of the text experts: from the "weights", or as copies of the "image" experts there (the paper's
            stage 2). In the latter case the embeddings of texts may be new.
        vl_start: Start of the vision-language experts: from the "weights", at "random" (the published stage 3), or as
            copies of the "text" or "image" experts in the same layers.
    """

    encoder: Mome = Mome()
    itc: bool = True
    itc_vl: bool = True
    itm: bool = True
    mlm: bool = True
    mim: Any = None
    classes: int | None = setting(None, least=1)
    images: int = setting(1, least=1)
    embed_size: int | None = setting(None, least=1)
    tie_words: bool = False
    temperature: float = setting(0.07, above=0)
    temperature_min: float | None = setting(0.01, above=0)
    temperature_max: float | None = setting(None, above=0)
    weights: str | None = None
    text_start: Literal["weights", "image"] = "weights"
    vl_start: Literal["weights", "random", "text", "image"] = "weights"

    @property
    def image(self) -> Mome | None:
        """The spec of the encoder, or None if it does not take images."""
        return self.encoder if "image" in self.encoder.experts else None

    @property
    def text(self) -> Mome | None:
        """The spec of the encoder, or None if it does not take texts."""
        return self.encoder if "text" in self.encoder.experts else None

    @property
    def num_images(self) -> int:
        return self.images

    def resolved(self) -> Vlmo:
        """Fill in all sizes."""
        encoder = self.encoder.resolved()
        return replace(self, encoder=encoder, embed_size=self.embed_size or encoder.width)

    def build(self, load_weights: bool = True) -> VlmoModel:
        """Build the model.

        Args:
            load_weights: False leaves everything random, because a checkpoint is loaded afterwards.

        Raises:
            UserError: if heads and experts, or sizes, do not fit together.
        """
        check_limits(self)
        both, joint = self.image and self.text, "vl" in self.encoder.experts
        for name, (asked, possible) in {
            "itc": (self.itc, both),
            "itc_vl": (self.itc_vl, joint and self.itc),
            "itm": (self.itm, joint),
            "mlm": (self.mlm, self.text),
            "mim": (self.mim, self.image),
            "classes": (self.classes, joint),
        }.items():
            if asked and not possible:
                wanted = "model.itc" if joint and name == "itc_vl" else "other experts"
                raise UserError(
                    f"model.{name} with the experts {', '.join(self.encoder.experts)} needs {wanted}; set model.{name} to "
                    f"{'none' if name in ('mim', 'classes') else 'false'}, or add them"
                )
        if self.images > self.encoder.image_kinds:
            raise UserError(
                f"images is {self.images}; set encoder.image_kinds to as many, not {self.encoder.image_kinds}"
            )
        for name, source in (("text_start", self.text_start), ("vl_start", self.vl_start)):
            if not self.weights and source in ("text", "image"):
                raise UserError(
                    f"model.{name}={source} copies experts of model.weights, and there are none; name weights or a run, or "
                    f"set model.{name}=weights to start at random"
                )
        model = VlmoModel(self.resolved(), load_weights)
        if load_weights and self.weights:
            grid = _grid_of_run(self.weights) if is_run(self.weights) else None
            starts = {"text": self.text_start, "vl": self.vl_start}
            model.report = initialize(model, load_vlmo(self.weights).student, self.weights, starts, grid)
        return model


def _grid_of_run(folder: str) -> tuple[int, int]:
    """Return the (h, w) patches of the images of a run; UserError if it is not a run of a VLMo."""
    spec = run_spec(folder)
    if not isinstance(spec, Vlmo):
        raise UserError(f"the run {folder} is of another model than VLMo; name one of a VLMo as model.weights")
    return spec.encoder.grid


class ContrastHead(LearnedScale):
    """A contrastive head: bias-free projections of both modalities, and the scale of their similarities."""

    def __init__(self, spec: Vlmo):
        super().__init__()
        self.embed_size = spec.embed_size
        self.image = nn.Linear(spec.encoder.width, spec.embed_size, bias=False)
        self.text = nn.Linear(spec.encoder.width, spec.embed_size, bias=False)
        self.add_scale(spec.temperature, spec.temperature_min, spec.temperature_max, "logit_scale")
        for layer in (self.image, self.text):
            nn.init.trunc_normal_(layer.weight, std=init_std(spec.encoder.init, spec.encoder.width))

    def project(self, pooled: Tensor, modality: Modality) -> Tensor:
        """Project (B, D) pooled states to (B, E)."""
        return (self.image if modality == "image" else self.text)(pooled)


class Classifier(nn.Sequential):
    """Classifier of the (n, images * D) pooled states of a sample: linear, norm, GELU, linear."""

    def __init__(self, width: int, images: int, classes: int, std: float = 0.02):
        layers = nn.Linear(images * width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, classes)
        super().__init__(*layers)
        for layer in layers[::3]:
            nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)


class VlmoModel(Model):
    """One transformer that encodes images, texts, and texts together with images.

    Objectives call `encode_image` and `encode_text` for each modality, `project` and `match` for pairs, and the heads:
    `masked_text`, `masked_image` and `classify`.

    Args:
        spec: Resolved spec.
        load_weights: Load the weights of a frozen tokenizer of image patches, if ``mim`` has one.
    """

    def __init__(self, spec: Vlmo, load_weights: bool = True):
        super().__init__()
        std = init_std(spec.encoder.init, spec.encoder.width)
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
            self.classifier = Classifier(width, spec.images, spec.classes, std)
        if spec.mlm:
            self.mlm = VocabularyHead(width, self.encoder.text.words, std=std)
            self.words = None if spec.tie_words else nn.Linear(width, spec.encoder.vocab_size, bias=False)
        if spec.mim:
            self.mim = PatchHead(self.encoder, spec.mim.build(self.encoder, load_weights))
        for layer in filter(None, (self.pooler and self.pooler[0], self.itm, self.words)):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.report: LoadReport | None = None

    @property
    def image(self) -> MomeEncoder | None:
        """The encoder, or None if it does not take images."""
        return self.encoder if self.encoder.image is not None else None

    @property
    def text(self) -> MomeEncoder | None:
        """The encoder, or None if it does not take texts."""
        return self.encoder if self.encoder.text is not None else None

    def can_encode(self, modality: Modality) -> bool:
        return modality in self.encoder.alone

    @property
    def can_contrast(self) -> bool:
        return self.itc is not None

    @property
    def num_images(self) -> int:
        return self.images

    @property
    def fuses_inputs(self) -> bool:
        return True

    @property
    def preprocess(self) -> Preprocess | None:
        return self.image and self.encoder.preprocess

    @property
    def reports(self) -> dict[str, LoadReport | None]:
        return {"model": self.report}

    @property
    def scale(self) -> Tensor:
        """(1,) multiplier of the cosine similarities of the first head."""
        return self.itc.scale

    def scalars(self) -> dict[str, float]:
        heads = {"": self.itc, "_vl": self.vl}
        return {name + suffix: x for suffix, head in heads.items() if head for name, x in head.scalars().items()}

    def clamp_scalars(self) -> None:
        for head in filter(None, (self.itc, self.vl)):
            head.clamp_scalars()

    def encode_image(self, image: Tensor, detach: Callable[[Tensor], Tensor] = lambda inputs: inputs) -> Encoded:
        """Encode (B, 3, H, W) float32 images, normalised as `preprocess` says.

        Args:
            detach: Applied to the embedded patches before anything reads them, see `vlp.training.detached`.
        """
        inputs = detach(self.encoder.image(image))  # (B, P, D)
        mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        rows = RaggedBatch.of_images(len(inputs), inputs.shape[1], inputs.device)
        return self._encoded(inputs, mask, rows, "image")

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor, detach: Callable[[Tensor], Tensor] = lambda inputs: inputs
    ) -> Encoded:
        inputs = detach(self.encoder.text(input_ids))  # (A, L, D)
        return self._encoded(inputs, attention_mask, RaggedBatch.of_texts(attention_mask), "text")

    def _encoded(self, inputs: Tensor, mask: Tensor, rows: RaggedBatch, modality: Modality) -> Encoded:
        """Run the layers on one modality. The last layer computes only the first token, because nothing reads the others."""
        encoder = self.encoder
        if modality not in encoder.alone:  # only embedded, for fusion
            return encoded_by_head(inputs[:, :1], mask, inputs[:, 0], inputs)
        given = {modality: inputs}
        states, first, depth = encoder.pack(rows, **given), rows.first_tokens(), len(encoder.layers)
        fork = encoder.vl_from if self.vl else 0
        states = encoder.run_layers(states, rows, 0, fork, joint=False)

        def top(joint: bool, head: ContrastHead | None) -> Encoded:
            pooled = encoder.norm(encoder.run_layers(states, rows, fork, depth, joint, first))  # (B, D)
            return encoded_by_head(pooled[:, None], mask, head.project(pooled, modality) if head else pooled)

        return replace(top(False, self.itc), inputs=inputs, vl=top(True, self.vl) if self.vl else None)

    def project(self, image: Encoded) -> Tensor:
        """Return the (B, P, D) embedded patches of B images, which fusion reads."""
        return image.inputs

    def fuse(
        self,
        image: Tensor,
        text: Encoded,
        texts: Tensor | None = None,
        images: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Run all layers on pairs of images and texts.

        Args:
            image: (B, P, D) images after `project`.
            text: A encoded texts.
            texts: (n,) int64 text of each pair. None takes each text once, n = A.
            images: (m,) int64 image of the last m pairs. The others go through the B images in order, repeatedly.
            at: (M,) int64 positions in the flattened (n * L), of real tokens. None takes the first token of each pair.

        Returns:
            (n, D) first tokens, or (M, D) tokens at the positions.
        """
        patches = image.shape[1]
        if texts is None:
            inputs, rows = text.inputs, RaggedBatch.of_texts(text.mask, patches)
        else:
            inputs, rows = text.inputs[texts], RaggedBatch.of_pairs(text.mask, texts, patches)
        drawn = 0 if images is None else len(images)
        if (len(inputs) - drawn) % len(image):
            raise ValueError(
                f"{len(inputs) - drawn} texts in the order of {len(image)} images: give a multiple of that many texts"
            )
        rounds = image.repeat((len(inputs) - drawn) // len(image), 1, 1)  # (n - m, P, D)
        image = rounds if images is None else torch.cat([rounds, image[images]])  # (n, P, D)
        length = inputs.shape[1]
        outputs = rows.first_tokens() if at is None else rows.tokens_at(at // length, at % length)
        return self.encoder(rows, inputs, image, joint=True, outputs=outputs)

    def match(self, image: Tensor, text: Encoded, texts: Tensor | None = None, images: Tensor | None = None) -> Tensor:
        return self.itm(self.pooler(self.fuse(image, text, texts, images)))

    def masked_text(self, f: Encodings, input_ids: Tensor, positions: Tensor) -> Tensor:
        inputs, mask = self.encoder.text(input_ids), f.batch.attention_mask
        if f.batch.image is not None and self.encoder.joint:
            text = Encoded(inputs, mask, inputs[:, 0], inputs)  # fusion reads only inputs and mask
            states = self.fuse(f.projected, text, at=positions)  # (M, D)
        else:
            if "text" not in self.encoder.alone:
                raise UserError(
                    "texts without images need text experts in all layers; set model.itc=true, or remove the vl expert"
                )
            rows, length = RaggedBatch.of_texts(mask), mask.shape[1]
            outputs = rows.tokens_at(positions // length, positions % length)
            states = self.encoder(rows, text=inputs, outputs=outputs)
        return self.mlm(states, self.encoder.text.words if self.words is None else self.words)

    def masked_image(self, f: Encodings, positions: Tensor) -> Tensor:
        count = self.mim.grid[0] * self.mim.grid[1]
        masked = torch.zeros(len(f.batch) * count, dtype=torch.bool, device=positions.device)
        masked[positions] = True
        inputs = self.encoder.image(f.batch.image, 0, masked.view(-1, count), self.mim.mask_token)
        rows = RaggedBatch.of_images(len(inputs), 1 + count, inputs.device)
        outputs = rows.tokens_at(positions // count, 1 + positions % count)
        return self.mim(self.encoder(rows, image=inputs, outputs=outputs))

    def classify(self, f: Encodings) -> Tensor:
        """Fuse the text with each image of its sample, and classify the concatenated pooled states: (B, C) logits."""
        images = [f.projected]
        for number, view in enumerate(f.batch.views[: self.images - 1], start=1):
            images.append(self.encoder.image(view.image, number))
        if len(images) < self.images:
            raise UserError(f"the classifier reads {self.images} images of each sample; the data has {len(images)}")
        pooled = [self.pooler(self.fuse(image, f.text)) for image in images]
        return self.classifier(torch.cat(pooled, -1))  # of (B, images * D)

    def layer_ids(self) -> dict[str, int]:
        """Return the depth of each parameter by name: the encoder, then heads and scalars at the top."""
        depths = {f"encoder.{name}": depth for name, depth in self.encoder.layer_ids().items()}
        top = max(depths.values()) + 1
        return {name: depths.get(name, top) for name, _ in self.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay: those of the encoder, and vectors such as the scales."""
        named = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        return named | {name for name, p in self.named_parameters() if p.ndim == 1}

    def set_activation_checkpointing(self, mode: Checkpointing) -> None:
        self.encoder.set_activation_checkpointing(mode)
