"""Load a published ALBEF file. It comes without a config, so sizes and heads are read off its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vlp.config import Data
from vlp.data.augment import Resize
from vlp.data.preprocess import Preprocess
from vlp.data.text import load_tokenizer
from vlp.encoders.decoder import Decoder
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage, TimmTower
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.loading.base import NO_OPTIONS, LoadedModel, LoadOptions, published
from vlp.models.albef import Albef, AlbefModel
from vlp.weights.albef import AlbefCheckpoint, load_albef

# The published code normalises by these for every file, whatever its image tower started from.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 64  # of ViT-B and of BERT-base; no tensor shape tells it


def load_albef_file(path: Path, state: Mapping[str, Tensor], options: LoadOptions = NO_OPTIONS) -> LoadedModel:
    """Load ALBEF weights with the preprocessing of the code that wrote them.

    Images are squashed. Texts lose their punctuation, and end with ``[SEP]`` for files of LAVIS only. For retrieval they
    are truncated.

    Args:
        path: The file.
        state: Its tensors.
        options: Settings that replace these. The tokenizer must be given to read texts.

    Raises:
        UserError: if the sizes do not go together, or the tokenizer does not fit.
    """
    checkpoint = load_albef(state)
    model = build_albef(checkpoint, options.image_size, options.head_width or HEAD_WIDTH)
    max_length = min(30 if model.itc else 64, model.text.max_length)
    data = Data(
        (), None, "", add_sep=checkpoint.lavis, clean_captions=True, max_length=max_length, resize=Resize("squash")
    )
    data = options.applied_to(data)
    tokenizer = load_tokenizer(data.tokenizer, data.add_sep, data.clean_captions) if data.tokenizer else None
    return published(path.stem, model, tokenizer, data, [path])


def build_albef(checkpoint: AlbefCheckpoint, image_size: int | None = None, head_width: int = HEAD_WIDTH) -> AlbefModel:
    """Build the model of a checkpoint and load its student into it.

    Args:
        checkpoint: The checkpoint.
        image_size: In pixels, a multiple of the patch size. Position embeddings are resized to it. None takes the size
            that they were trained at.
        head_width: Width of every attention head.

    Raises:
        UserError: if the sizes do not go together.
    """
    student = checkpoint.student
    image, text = _image_tower(student, image_size, head_width), _text(student, head_width)
    sizes = {"heads": text.config["num_attention_heads"], "hidden_size": text.config["intermediate_size"]}
    sizes |= {"dropout": 0.1, "eps": 1e-12}  # BERT's
    decoder = _numbers(student, r"decoder\.layers\.(\d+)\.")
    spec = Albef(
        TimmImage("vit_base_patch16_224"),  # a placeholder: the tower is given
        text,
        Fusion(images=_images(student), layers=_layers(student) // _images(student), **sizes),
        itc="image_projection.weight" in student,
        itm="itm.weight" in student,
        mlm="mlm.bias" in student,
        classes=len(student.get("classifier.2.weight", ())) or None,
        assignment="assignment.weight" in student,
        decoder=Decoder(layers=1 + max(decoder), **sizes) if decoder else None,
        embed_size=len(student.get("image_projection.weight", ())) or 1,
    )
    model = AlbefModel(spec, image, text.build())
    model.load(student)
    return model


def _layers(student: Mapping[str, Tensor]) -> int:
    return 1 + max(_numbers(student, r"fusion\.layers\.(\d+)\."))


def _images(student: Mapping[str, Tensor]) -> int:
    """Return 2 if pairs of layers share the keys of images, as in NLVR2's files, else 1."""
    key = "fusion.layers.{}.cross_attention.key.weight".format
    twins = _layers(student) % 2 == 0 and torch.equal(student[key(0)], student[key(1)])
    return 2 if twins else 1


def _image_tower(student: Mapping[str, Tensor], image_size: int | None, head_width: int) -> TimmTower:
    positions, patches = student["image.model.pos_embed"], student["image.model.patch_embed.proj.weight"]
    width, side = positions.shape[2], patches.shape[2]
    size = image_size or side * math.isqrt(positions.shape[1] - 1)
    if size % side or width % head_width:
        raise UserError(
            f"images of {size} pixels in patches of {side}, and {width} channels in heads of {head_width}; "
            "give image_size=, or head_width=, that divide"
        )
    vit = VisionTransformer(
        img_size=size,
        patch_size=side,
        num_classes=0,
        embed_dim=width,
        depth=1 + max(_numbers(student, r"image\.model\.blocks\.(\d+)\.")),
        num_heads=width // head_width,
        mlp_ratio=len(student["image.model.blocks.0.mlp.fc1.weight"]) / width,
    )
    return TimmTower(vit, Preprocess((size, size), MEAN, STD, "bicubic"))


def _text(student: Mapping[str, Tensor], head_width: int) -> BertText:
    table = student["text.model.embeddings.word_embeddings.weight"]
    sizes = {
        "model_type": "bert",
        "vocab_size": len(table),
        "hidden_size": table.shape[1],
        "num_hidden_layers": 1 + max(_numbers(student, r"text\.model\.encoder\.layer\.(\d+)\.")),
        "num_attention_heads": max(1, table.shape[1] // head_width),
        "intermediate_size": len(student["text.model.encoder.layer.0.intermediate.dense.weight"]),
        "max_position_embeddings": len(student["text.model.embeddings.position_embeddings.weight"]),
        "type_vocab_size": len(student["text.model.embeddings.token_type_embeddings.weight"]),
    }
    return BertText(config=sizes)


def _numbers(student: Mapping[str, Tensor], pattern: str) -> list[int]:
    return [int(found[1]) for key in student if (found := re.match(pattern, key))]
