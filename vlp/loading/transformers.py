"""Load CLIP, ALIGN and SigLIP from a transformers folder: transformers' own modules as the towers of a `DualEncoder`.

Preprocessing, tokenizer, projections and temperature are those of the folder.

B images or texts, L text tokens, D width of a tower, H and W pixels, P patches of p x p pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.config import Data
from vlp.data.augment import Resize
from vlp.data.preprocess import Preprocess
from vlp.data.text import check_spelling, pad
from vlp.encoders.base import ImageTower, PooledTextTower
from vlp.errors import UserError
from vlp.loading.base import NO_OPTIONS, LoadedModel, LoadOptions, published
from vlp.models.dual import Dual, DualEncoder
from vlp.weights import reading
from vlp.weights.reading import LoadReport

# Buffers of older versions: position numbers from 0.
DERIVED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
PROJECTIONS = {"clip": "both", "align": "text-to-image", "siglip": "none", "siglip2": "none"}
PROCESSORS = ("CLIPImageProcessor", "SiglipImageProcessor", "EfficientNetImageProcessor", "ViTImageProcessor")
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


def model_type(folder: Path) -> str | None:
    """Return the model type in a folder's config.json, None where there is none."""
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def load_transformers(folder: Path, options: LoadOptions = NO_OPTIONS) -> LoadedModel:
    """Load a CLIPModel, AlignModel, SiglipModel or Siglip2Model that ``save_pretrained`` or a hub wrote.

    Siglip2 keeps the aspect ratio of images (NaFlex), which is not implemented. With ``options.resize`` "squash" its images
    are squashed to the largest square of patches that it takes.

    Raises:
        UserError: if a part is missing, cannot be read without running code, or does not fit.
    """
    from transformers import AutoConfig, AutoModel

    options.refuse(f"{folder} has its own", "tokenizer", "image_size", "head_width", "add_sep")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_config(config).float()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"transformers cannot build the model of {folder}: {_line(error)}") from error
    files = reading.weight_files(folder)
    report = reading.load(model, reading.read_folder(folder), ignored=DERIVED)
    preprocess, resize = _preprocessing(folder, config, squash=options.resize == "squash")
    tokenizer = TransformersTokenizer(folder)
    dual = _dual_encoder(model, preprocess, tokenizer, report)
    data = Data((), None, str(folder), max_length=dual.text.max_length, resize=resize)
    return published(folder.resolve().name, dual, tokenizer, options.applied_to(data), files)


def _dual_encoder(
    model: nn.Module, preprocess: Preprocess, tokenizer: TransformersTokenizer, report: LoadReport
) -> DualEncoder:
    kind = model.config.model_type
    learned, parts = dict(model.named_parameters()), dict(model.named_children())
    bias = learned.get("logit_bias")  # SigLIP's
    spec = Dual(
        projection=PROJECTIONS[kind],
        embed_size=model.visual_projection.out_features if kind == "clip" else None,
        temperature=model.temperature.item() if kind == "align" else math.exp(-model.logit_scale.item()),
        temperature_min=None,
        bias=None if bias is None else bias.item(),
    )
    image = TransformersImageTower(model.vision_model, preprocess, report)
    text = TransformersTextTower(model.text_model, kind.removesuffix("2"), tokenizer.padding, report)
    dual = DualEncoder(spec, image, text)
    if "visual_projection" in parts:
        dual.image_projection = model.visual_projection
    if "text_projection" in parts:
        dual.text_projection = model.text_projection
    return dual


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _preprocessing(folder: Path, config, squash: bool) -> tuple[Preprocess, Resize]:
    """Return the steps of the folder's image processor: one affine map of the pixels, and one resize and crop.

    Args:
        folder: Folder of the processor.
        config: Configuration of the model.
        squash: Squash images to one shape although the model keeps their aspect ratio.

    Raises:
        UserError: if the processor has a step that `Preprocess` and `Resize` cannot express.
    """
    from transformers import AutoImageProcessor

    try:
        own = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} lacks preprocessor_config.json, which says how images are prepared: {error}"
        ) from error
    steps = own.to_dict()  # each family of processors has some of them
    interpolation = INTERPOLATIONS.get(steps.get("resample"))
    if interpolation is None:
        raise UserError(
            f"{folder} resizes with PIL's filter {steps.get('resample')}; only bilinear and bicubic are supported"
        )
    if config.model_type == "siglip2":
        if not squash:
            raise UserError(
                f"{folder} keeps the aspect ratio of images, which is not supported; say resize=squash to evaluate it on "
                "squashed images, which it was not trained with"
            )
        sides = (own.patch_size * math.isqrt(own.max_num_patches),) * 2
        resize = Resize(mode="squash", resampler="torchvision")
        return Preprocess(sides, tuple(own.image_mean), tuple(own.image_std), interpolation), resize
    size, resize = _resize_of(folder, type(own).__name__, steps)
    # theirs: (x * factor - offset - mean) / std of x in [0, 255]; `Preprocess` takes x / 255
    scale = 255 * own.rescale_factor if own.do_rescale else 255.0
    offset = float(steps.get("rescale_offset") or False)
    mean, std = (own.image_mean, own.image_std) if own.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    again = own.image_std if steps.get("include_top") else (1.0,) * 3  # EfficientNet divides twice
    preprocess = Preprocess(
        size,
        tuple((m + offset) / scale for m in mean),
        tuple(s * a / scale for s, a in zip(std, again)),
        interpolation,
    )
    return preprocess, resize


def _resize_of(folder: Path, processor: str, steps: dict) -> tuple[tuple[int, int], Resize]:
    """Return the (H, W) of a processor's images, and its resize and crop.

    Raises:
        UserError: if it has other steps, or images would keep different shapes.
    """
    if not processor.startswith(PROCESSORS):
        raise UserError(
            f"{folder} has a {processor}, whose steps are unknown here; {', '.join(PROCESSORS)} are supported"
        )
    if not steps.get("do_resize") or steps.get("do_pad"):
        raise UserError(f"{folder} does not resize images, or pads them, which is not supported; change its do_resize")
    given = {name: value for name, value in dict(steps["size"]).items() if value}
    crops = bool(steps.get("do_center_crop"))
    if set(given) == {"shortest_edge"} and not crops:
        raise UserError(f"{folder} does not crop images, so that they would have different shapes; set do_center_crop")
    if set(given) not in ({"shortest_edge"}, {"height", "width"}):
        raise UserError(f"{folder} resizes images to {given}; only shortest_edge, or height and width, are supported")
    mode = "center" if "shortest_edge" in given else "squash"
    resized = (given["shortest_edge"],) * 2 if mode == "center" else (given["height"], given["width"])
    crop = dict(steps["crop_size"]) if crops else {}
    size = (crop["height"], crop["width"]) if crops else resized
    resize = Resize(mode, fraction=size[0] / resized[0], resampler="torchvision", odd_margin="floor")
    if mode == "center" and size[0] != size[1]:
        raise UserError(f"{folder} crops {size[0]} x {size[1]} pixels; only squares are supported with shortest_edge")
    if any(c > r for c, r in zip(size, resized)):
        raise UserError(
            f"{folder} crops {size} of images of {resized} pixels, which would be padded; correct crop_size"
        )
    if any(round(side / resize.fraction) != whole for side, whole in zip(size, resized)):
        raise UserError(f"{folder} crops {size} of {resized} pixels; only crops of the same shape are supported")
    return size, resize


class TransformersImageTower(ImageTower):
    """A vision model of transformers as one token: its pooled output, before any projection."""

    def __init__(self, model: nn.Module, preprocess: Preprocess, report: LoadReport):
        super().__init__()
        self.model, self.preprocess, self.report = model, preprocess, report
        # ALIGN's is an EfficientNet, whose hidden_dim is the width
        self.width: int = model.config.to_dict().get("hidden_dim") or model.config.hidden_size

    def forward(self, image: Tensor) -> Tensor:
        """Return (B, 1, D) pooled tokens of (B, 3, H, W) normalised images."""
        if self.model.config.model_type == "siglip2_vision_model":
            patches, shape = patches_of(image, self.model.config.patch_size)
            mask = torch.ones(patches.shape[:2], dtype=torch.int64, device=image.device)
            shapes = torch.tensor([shape] * len(image), device=image.device)
            return self.model(patches, pixel_attention_mask=mask, spatial_shapes=shapes).pooler_output[:, None]
        return self.model(pixel_values=image).pooler_output[:, None]


def patches_of(image: Tensor, side: int) -> tuple[Tensor, tuple[int, int]]:
    """Cut images into patches as Siglip2 does, row by row and channels last.

    Args:
        image: (B, 3, H, W).
        side: p.

    Returns:
        (B, P, p * p * 3) patches, and (rows, columns).
    """
    rows, columns = image.shape[2] // side, image.shape[3] // side
    patches = image.unflatten(2, (rows, side)).unflatten(4, (columns, side))  # (B, 3, rows, p, columns, p)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2), (rows, columns)


class TransformersTextTower(PooledTextTower):
    """A text model of transformers as one token: its pooled output, or its first state (ALIGN).

    Args:
        model: The text model.
        kind: "clip", "align" or "siglip".
        padding: Id and side of the tokenizer's padding. SigLIP was trained with visible padding: texts are padded to the
            whole context, on the tokenizer's side, and nothing is masked.
        report: Account of the loaded weights.
    """

    def __init__(self, model: nn.Module, kind: str, padding: tuple[int, str], report: LoadReport):
        super().__init__()
        self.model, self.kind, self.padding, self.report = model, kind, padding, report
        config = model.config
        self.width: int = config.projection_size if kind == "siglip" else config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.max_length: int = config.max_position_embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode texts.

        Args:
            input_ids: (B, L) int64, padded on the right with the id of ``padding``.
            attention_mask: (B, L) bool.

        Returns:
            (B, 1, D) pooled tokens.
        """
        if self.kind == "siglip":
            whole = F.pad(input_ids, (0, self.max_length - input_ids.shape[1]), value=self.padding[0])
            if self.padding[1] == "left":
                # rotate each row to the right by its number of padding tokens
                source = torch.arange(self.max_length, device=whole.device) + attention_mask.sum(1, keepdim=True)
                whole = whole.gather(1, source % self.max_length)
            return self.model(input_ids=whole).pooler_output[:, None]
        out = self.model(input_ids=input_ids, attention_mask=attention_mask.long())
        return out.pooler_output[:, None] if self.kind == "clip" else out.last_hidden_state[:, :1]


class TransformersTokenizer:
    """The tokenizer of a transformers folder, with the interface of `vlp.data.text.Tokenizer`.

    Raises:
        UserError: if the folder has none, or it needs a package that is not installed.
    """

    mask_id = None

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        try:
            self._own = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError, AttributeError) as error:
            if "sentencepiece" in str(error).lower():  # SigLIP's own, where the folder has no tokenizer.json
                raise UserError(
                    f"the tokenizer of {folder} needs the package sentencepiece, which is not installed: "
                    "pip install 'vlp[siglip]'"
                ) from error
            raise UserError(f"{folder} has no tokenizer that can be read: {_line(error)}") from error
        check_spelling(self._own.get_vocab(), f"the tokenizer of {folder}")
        self.vocab_size: int = len(self._own)
        self.pad_id = 0 if self._own.pad_token_id is None else self._own.pad_token_id
        self.padding = self.pad_id, self._own.padding_side
        self._ends = self.rows(["a"])[0][-1] in self._own.all_special_ids

    def rows(self, captions: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, with special tokens, neither truncated nor padded."""
        return self._own(list(captions), verbose=False)["input_ids"]

    def __call__(self, captions: Sequence[str], max_length: int) -> tuple[Tensor, Tensor, int]:
        """Tokenize as `vlp.data.text.Tokenizer.__call__`. A special token at the end is kept when a text is truncated."""
        return pad(self.rows(captions), max_length, self.pad_id, keep_last=self._ends)
