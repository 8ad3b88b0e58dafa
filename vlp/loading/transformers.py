"""CLIP, ALIGN and SigLIP from a transformers folder, for evaluation: transformers' own classes as towers of a `DualEncoder`.

Preprocessing, tokenizer, projections and temperature are the folder's own.

B batch, L text tokens, D width of a tower, H and W pixels, P patches, p pixels of a patch's side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.data.augment import Resize
from vlp.data.preprocess import Preprocess
from vlp.data.text import pad
from vlp.encoders.base import ImageTower, PooledTextTower
from vlp.errors import UserError
from vlp.models.dual import Dual, DualEncoder
from vlp.weights import reading
from vlp.weights.reading import LoadReport

FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = "model.safetensors.index.json"  # where the weights are in several files
# numbers from 0 that older versions kept in their files
DERIVED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
PROJECTIONS = {"clip": "both", "align": "text-to-image", "siglip": "none", "siglip2": "none"}
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


class Folder(NamedTuple):
    """What `load_folder` gives."""

    model: DualEncoder
    tokenizer: TransformersTokenizer
    resize: Resize
    files: list[Path]  # of the weights


def model_type(folder: Path) -> str | None:
    """What config.json says, None where there is none."""
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def load_folder(folder: Path) -> Folder:
    """A CLIPModel, AlignModel, SiglipModel or Siglip2Model that `save_pretrained` or a hub wrote.

    Siglip2's pictures of any shape are squashed to the largest square of patches that they may have.

    Raises:
        UserError: if a part is missing, cannot be read without running code, or does not fit.
    """
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_config(config).float()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"transformers cannot build the model of {folder}: {_line(error)}") from error
    files = _weight_files(folder)
    state = {key: value for file in files for key, value in reading.read_weights(file).items()}
    report = reading.load(model, state, ignored=DERIVED)
    preprocess, resize = _preprocessing(folder, config)
    tokenizer = TransformersTokenizer(folder)
    bias = getattr(model, "logit_bias", None)
    spec = Dual(
        projection=PROJECTIONS[config.model_type],
        embed_size=model.visual_projection.out_features if config.model_type == "clip" else None,
        temperature=_temperature(model),
        temperature_min=None,
        bias=None if bias is None else bias.item(),
    )
    image = TransformersImageTower(model.vision_model, preprocess, report)
    kind = config.model_type.removesuffix("2")
    dual = DualEncoder(spec, image, TransformersTextTower(model.text_model, kind, tokenizer.padding, report))
    for name, projection in (("image_projection", "visual_projection"), ("text_projection", "text_projection")):
        if hasattr(model, projection):
            setattr(dual, name, getattr(model, projection))
    return Folder(dual, tokenizer, resize, files)


def _temperature(model: nn.Module) -> float:
    return model.temperature.item() if hasattr(model, "temperature") else math.exp(-model.logit_scale.item())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        names = json.loads((folder / INDEX).read_text())["weight_map"].values()
        return [folder / name for name in dict.fromkeys(names)]
    if files := [folder / name for name in FILES if (folder / name).is_file()]:
        return files[:1]
    raise UserError(f"{folder} holds a config.json but no {' or '.join(FILES)}; fetch the weights too")


def _preprocessing(folder: Path, config) -> tuple[Preprocess, Resize]:
    """How the folder's own image processor makes pixels: its steps as one affine map of them, and one resize and crop."""
    from transformers import AutoImageProcessor

    try:
        own = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} lacks preprocessor_config.json, which says what pictures look like: {error}"
        ) from error
    interpolation = INTERPOLATIONS.get(int(own.resample))
    if interpolation is None:
        raise UserError(f"{folder} resizes with PIL's filter {int(own.resample)}; only bilinear and bicubic are here")
    if config.model_type == "siglip2":
        sides = (own.patch_size * math.isqrt(own.max_num_patches),) * 2
        return Preprocess(sides, tuple(own.image_mean), tuple(own.image_std), interpolation), Resize(mode="squash")
    crops = bool(getattr(own, "do_center_crop", False))
    shortest = "shortest_edge" in own.size and own.size["shortest_edge"]
    resized = (shortest, shortest) if shortest else (own.size["height"], own.size["width"])
    size = (own.crop_size["height"], own.crop_size["width"]) if crops else resized
    if shortest and not crops:
        raise UserError(
            f"{folder} does not crop pictures, so that they would have different shapes; set do_center_crop"
        )
    # x * factor - offset, then - mean, / std, of x in [0, 255]; ours takes x / 255
    scale = 255 * own.rescale_factor if own.do_rescale else 255.0
    offset = float(getattr(own, "rescale_offset", False) or False)
    mean, std = (own.image_mean, own.image_std) if own.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    again = own.image_std if getattr(own, "include_top", False) else (1.0,) * 3  # EfficientNet's
    preprocess = Preprocess(
        tuple(size),
        tuple((m + offset) / scale for m in mean),
        tuple(s * a / scale for s, a in zip(std, again)),
        interpolation,
    )
    return preprocess, Resize(mode="center" if shortest else "squash", fraction=size[0] / resized[0])


class TransformersImageTower(ImageTower):
    """A vision model of transformers as one token: what it pools, before any projection."""

    def __init__(self, model: nn.Module, preprocess: Preprocess, report: LoadReport):
        super().__init__()
        self.model, self.preprocess, self.report = model, preprocess, report
        config = model.config
        self.width: int = getattr(config, "hidden_dim", None) or config.hidden_size  # ALIGN's is an EfficientNet

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised to (B, 1, D)."""
        if self.model.config.model_type == "siglip2_vision_model":
            patches, shape = patches_of(image, self.model.config.patch_size)
            mask = torch.ones(patches.shape[:2], dtype=torch.int64, device=image.device)
            shapes = torch.tensor([shape] * len(image), device=image.device)
            return self.model(patches, pixel_attention_mask=mask, spatial_shapes=shapes).pooler_output[:, None]
        return self.model(pixel_values=image).pooler_output[:, None]


def patches_of(image: Tensor, side: int) -> tuple[Tensor, tuple[int, int]]:
    """(B, 3, H, W) to (B, P, p * p * 3) as Siglip2 has them, row by row and channels last, and (rows, columns)."""
    rows, columns = image.shape[2] // side, image.shape[3] // side
    patches = image.unflatten(2, (rows, side)).unflatten(4, (columns, side))  # (B, 3, rows, p, columns, p)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2), (rows, columns)


class TransformersTextTower(PooledTextTower):
    """A text model of transformers as one token: what it pools, or its first state (ALIGN).

    Args:
        kind: "clip", "align" or "siglip".
        padding: the tokenizer's id and side. SigLIP was trained with it in view: texts are padded to the whole context,
            where the tokenizer pads, and nothing is masked.
    """

    def __init__(self, model: nn.Module, kind: str, padding: tuple[int, str], report: LoadReport):
        super().__init__()
        self.model, self.kind, self.padding, self.report = model, kind, padding, report
        config = model.config
        self.width: int = config.projection_size if kind == "siglip" else config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.max_length: int = config.max_position_embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) ids, padded on the right with the same id, and their (B, L) bool mask, to (B, 1, D)."""
        if self.kind == "siglip":
            whole = F.pad(input_ids, (0, self.max_length - input_ids.shape[1]), value=self.padding[0])
            if self.padding[1] == "left":
                turned = torch.arange(self.max_length, device=whole.device) + attention_mask.sum(1, keepdim=True)
                whole = whole.gather(1, turned % self.max_length)
            return self.model(input_ids=whole).pooler_output[:, None]
        out = self.model(input_ids=input_ids, attention_mask=attention_mask.long())
        return out.pooler_output[:, None] if self.kind == "clip" else out.last_hidden_state[:, :1]


class TransformersTokenizer:
    """The tokenizer of a transformers folder, by the protocol of `vlp.data.text`.

    Raises:
        UserError: if there is none, or it needs a package that is not installed.
    """

    mask_id = None

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        try:
            self._own = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError, AttributeError) as error:
            raise UserError(f"{folder} holds no tokenizer that can be read here: {_line(error)}") from error
        self.vocab_size: int = len(self._own)
        self.pad_id = 0 if self._own.pad_token_id is None else self._own.pad_token_id
        self.padding = self.pad_id, self._own.padding_side
        self._ends = self.rows(["a"])[0][-1] in self._own.all_special_ids

    def rows(self, captions: Sequence[str]) -> list[list[int]]:
        """Ids of each caption, special tokens included, neither cut nor padded."""
        return self._own(list(captions), verbose=False)["input_ids"]

    def __call__(self, captions: Sequence[str], max_length: int) -> tuple[Tensor, Tensor, int]:
        """As `vlp.data.text.Tokenizer.__call__`; a token at the end stays at the end of what is cut."""
        return pad(self.rows(captions), max_length, self.pad_id, keep_last=self._ends)
