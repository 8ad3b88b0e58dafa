"""Load a published VLMo file. It comes without a config, so sizes, experts and heads are read off its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlp.config import Data
from vlp.data.augment import Resize
from vlp.data.text import load_tokenizer
from vlp.encoders.mome import BASE_PLUS, Mome
from vlp.errors import UserError
from vlp.loading.base import NO_OPTIONS, LoadedModel, LoadOptions, published
from vlp.models.vlmo import Vlmo, VlmoModel
from vlp.models.vlmo_start import initialize
from vlp.weights.vlmo import TEXT_POSITIONS, VlmoCheckpoint, load_vlmo

HEAD_WIDTH = 64  # of base and large
NEEDED = ("encoder.image.patches.weight", "encoder.image.kind.weight", "encoder.text.words.weight")
NEEDED += ("encoder.layers.0.experts.image.expand.weight", "encoder.layers.0.experts.text.expand.weight")


def load_vlmo_file(path: Path, state: Mapping[str, Tensor], options: LoadOptions = NO_OPTIONS) -> LoadedModel:
    """Load VLMo weights with the preprocessing of the published code: squashed images, texts of at most 40 tokens.

    Args:
        path: The file.
        state: Its tensors.
        options: Settings that replace these. The tokenizer must be given to read texts.

    Raises:
        UserError: if a part is missing, the sizes do not go together, or the tokenizer does not fit.
    """
    model = build_vlmo(load_vlmo(state), str(path), options.image_size, options.head_width)
    max_length = min(40, model.text.max_length)
    data = options.applied_to(Data((), None, "", max_length=max_length, resize=Resize("squash")))
    tokenizer = load_tokenizer(data.tokenizer, data.add_sep) if data.tokenizer else None
    return published(path.stem, model, tokenizer, data, [path])


def build_vlmo(
    checkpoint: VlmoCheckpoint, name: str, image_size: int | None = None, head_width: int | None = None
) -> VlmoModel:
    """Build the model of a checkpoint and load its student into it.

    Args:
        checkpoint: The checkpoint.
        name: Name of the file, for messages.
        image_size: In pixels, a multiple of the patch size. Positions are resized to it. None takes the size that they were
            trained at.
        head_width: Width of every attention head. Only needed with absolute positions, where no tensor shape tells it. None
            takes the published one.

    Raises:
        UserError: if a part or an expert is missing, or the sizes do not go together.
    """
    student = checkpoint.student
    if missing := [key for key in NEEDED if key not in student]:
        raise UserError(f"{name} lacks {', '.join(missing)}; give a file of the whole model")
    spec = Vlmo(
        encoder_of(student, image_size, head_width),
        itc="itc.image.weight" in student,
        itc_vl="vl.image.weight" in student,
        itm="itm.weight" in student,
        mlm="mlm.bias" in student,
        classes=len(student.get("classifier.3.weight", ())) or None,
        images=student["classifier.0.weight"].shape[1] // _width(student) if "classifier.0.weight" in student else 1,
        embed_size=len(student.get("itc.image.weight", ())) or None,
        tie_words="words.weight" not in student,
        temperature_min=None,
    )
    model = spec.build(load_weights=False)
    model.report = initialize(model, student, name, {"text": "weights", "vl": "weights"}, None)
    return model


def encoder_of(student: Mapping[str, Tensor], image_size: int | None, head_width: int | None) -> Mome:
    """Return the spec of the transformer that the tensors belong to."""
    width, patch = _width(student), student["encoder.image.patches.weight"].shape[2]
    found = {name: _layers(student, rf"experts\.{name}\.") for name in ("image", "text", "vl")}
    layers = 1 + max(_layers(student, ""))
    relative = student.get("encoder.positions.image")
    if relative is None:
        side = math.isqrt(student["encoder.image.positions"].shape[-2] - 1)
        heads = width // (head_width or (width // BASE_PLUS.heads if width == BASE_PLUS.width else HEAD_WIDTH))
        length = len(student["encoder.text.positions.weight"])
    else:  # the table has (2 h - 1)^2 + 3 rows for an h x h grid, and a column for each head of each layer
        side, heads, length = (math.isqrt(len(relative) - 3) + 1) // 2, relative.shape[1] // layers, TEXT_POSITIONS
    return Mome(
        width=width,
        layers=layers,
        heads=heads,
        hidden_size=len(student["encoder.layers.0.experts.image.expand.weight"]),
        vl_from=min(found["vl"], default=layers - 1),
        experts=tuple(name for name, numbers in found.items() if numbers),
        layer_scale=0.1 if "encoder.layers.0.gamma_1" in student else None,
        image_size=image_size or patch * side,
        patch_size=patch,
        image_kinds=len(student["encoder.image.kind.weight"]),
        vocab_size=len(student["encoder.text.words.weight"]),
        max_text_length=length,
        positions="absolute" if relative is None else "relative",
    )


def _width(student: Mapping[str, Tensor]) -> int:
    return len(student["encoder.image.patches.weight"])


def _layers(student: Mapping[str, Tensor], part: str) -> list[int]:
    """Return the numbers of the layers with parameters whose names match ``part``, a regular expression."""
    return sorted({int(found[1]) for key in student if (found := re.match(rf"encoder\.layers\.(\d+)\.{part}", key))})
