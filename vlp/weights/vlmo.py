"""Read and write published VLMo checkpoints, and read the image weights of BEiT.

The official files (stages 2 and 3 of base, base_plus and large; fine-tuned on VQA, NLVR2 and retrieval) use the same names and
differ in their parts. The names here are those of `vlp.models.vlmo`. Differences besides the names:

  relative_position_bias_table   one table: rows of images, 2 rows across modalities, 392 rows of texts, with a column for each
                                 head of each layer. Here three tables: encoder.positions.image, .cross and .text.
  token_type_embeddings          row 0 is encoder.text.kind, the others are encoder.image.kind.
  text_embeddings.position_embeddings   is in every file, but not used with relative positions. It is kept as `unused`.

Files of BEiT v1 contain an image encoder: attention, image experts, and a table for all layers or one for each. Files of BEiT-3
do not fit: its attention has separate weights per modality, and norms that VLMo lacks.

D width, h x w patches, M positions of texts, C = layers * heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vlp.errors import UserError
from vlp.weights.reading import read_weights
from vlp.weights.run import is_run, read_run

TEXT_POSITIONS = 196  # M of every published table, also where a stage truncates texts to fewer tokens
NAMES = {
    "transformer.patch_embed.proj.": "encoder.image.patches.",
    "transformer.cls_token": "encoder.image.cls_token",
    "transformer.pos_embed": "encoder.image.positions",
    "transformer.norm.": "encoder.norm.",
    "text_embeddings.word_embeddings.": "encoder.text.words.",
    "text_embeddings.token_type_embeddings.": "encoder.text.token_types.",
    "text_embeddings.position_embeddings.": "encoder.text.positions.",
    "text_embeddings.LayerNorm.": "encoder.text.norm.",
    "itc_image_proj.fc.": "itc.image.",
    "itc_text_proj.fc.": "itc.text.",
    "itc_vl_image_proj.fc.": "vl.image.",
    "itc_vl_text_proj.fc.": "vl.text.",
    "logit_scale": "itc.logit_scale",
    "logit_vl_scale": "vl.logit_scale",
    "pooler.dense.": "pooler.0.",
    "itm_score.fc.": "itm.",
    "mlm_score.transform.dense.": "mlm.dense.",
    "mlm_score.transform.LayerNorm.": "mlm.norm.",
    "mlm_score.bias": "mlm.bias",
    "mlm_score.decoder.": "words.",
    "vqa_classifier.": "classifier.",
    "nlvr2_classifier.": "classifier.",
}
BLOCK = {
    "norm1.": "norm.",
    "attn.qkv.": "attention.qkv.",
    "attn.q_bias": "attention.q_bias",
    "attn.v_bias": "attention.v_bias",
    "attn.proj.": "attention.out.",
    "gamma_1": "gamma_1",
    "gamma_2": "gamma_2",
    **{
        f"{old}_{short}.{theirs}": f"experts.{name}.{ours}"
        for short, name in {"imag": "image", "text": "text", "vl": "vl"}.items()
        for old, theirs, ours in (("norm2", "", "norm."), ("mlp", "fc1.", "expand."), ("mlp", "fc2.", "contract."))
    },
}
BEIT_BLOCK = {"norm2.": "norm2_imag.", "mlp.": "mlp_imag."}
TABLE, KINDS, DEAD = (
    "relative_position_bias_table",
    "token_type_embeddings.weight",
    "text_embeddings.position_embeddings.weight",
)
DERIVED = re.compile(r"(.*relative_position_index|text_embeddings\.position_ids)$")  # position numbers
# Leading dimensions of size 1 in the official files but not here. A scale has one here, since engines refuse 0-dim parameters.
SINGLE = {"encoder.image.cls_token": 2, "encoder.image.positions": 1, "itc.logit_scale": -1, "vl.logit_scale": -1}


@dataclass
class VlmoCheckpoint:
    """The content of a checkpoint file.

    Args:
        student: Tensors of the model by the names of this module.
        unused: Further tensors by their official names: absolute positions next to relative ones, and index tables.
    """

    student: dict[str, Tensor]
    unused: dict[str, Tensor] = field(default_factory=dict)


def load_vlmo(source: str | Path | Mapping[str, Tensor]) -> VlmoCheckpoint:
    """Read a checkpoint of VLMo or BEiT, or the newest one of a run.

    Args:
        source: A file, see `vlp.weights.reading.read_weights`, a run folder, or the tensors of a file.

    Raises:
        UserError: if the file cannot be read without running code, or is of another model.
    """
    if not isinstance(source, Mapping) and is_run(str(source)):
        return VlmoCheckpoint(read_run(str(source)))
    state, name = (
        (dict(source), "the checkpoint") if isinstance(source, Mapping) else (read_weights(source), str(source))
    )
    if any(key.startswith("beit3.") for key in state):
        raise UserError(
            f"{name} is of BEiT-3, whose attention has separate weights per modality; VLMo shares them: use BEiT v1"
        )
    if "blocks.0.attn.q_bias" in state:
        state = _from_beit(state)
    if "transformer.blocks.0.attn.qkv.weight" not in state:
        some = ", ".join(list(state)[:3])
        raise UserError(
            f"{name} is not a checkpoint of VLMo or BEiT, which have blocks with attn.qkv; it has {some}, ..."
        )
    checkpoint = VlmoCheckpoint({})
    if TABLE in state:
        checkpoint.student |= _split(state.pop(TABLE), name)
        checkpoint.unused = {DEAD: state.pop(DEAD)} if DEAD in state else {}
    if KINDS in state:
        kinds = state.pop(KINDS)
        checkpoint.student |= {"encoder.text.kind": kinds[0], "encoder.image.kind.weight": kinds[1:]}
    for key, value in state.items():
        if DERIVED.search(key):
            checkpoint.unused[key] = value
            continue
        ours = _ours(key)
        if ours is None:
            raise UserError(f"{name} has {key}, which is unknown in VLMo checkpoints; choose another file")
        checkpoint.student[ours] = _without(value, SINGLE.get(ours, 0))
    return checkpoint


def _ours(key: str) -> str | None:
    if found := re.match(r"transformer\.blocks\.(\d+)\.(.*)", key):
        rest = next(
            (ours + found[2].removeprefix(old) for old, ours in BLOCK.items() if found[2].startswith(old)), None
        )
        return rest and f"encoder.layers.{found[1]}.{rest}"
    # `_from_beit` has renamed the heads of BEiT already
    known = {**NAMES, "mim.": "mim."}
    return next((ours + key.removeprefix(old) for old, ours in known.items() if key.startswith(old)), None)


def _split(table: Tensor, name: str) -> dict[str, Tensor]:
    """Split the official table of positions into those of images, across, and of texts; or of images only."""
    for text in (2 + 2 * TEXT_POSITIONS, 0):
        rows = len(table) - text  # (2 s - 1)^2 + 3 for a square of s x s patches
        if rows > 3 and math.isqrt(rows - 3) ** 2 == rows - 3 and math.isqrt(rows - 3) % 2:
            image, cross, rest = table.split([rows, min(text, 2), max(text - 2, 0)])  # (rows, C) each
            parts = {"image": image, "cross": cross, "text": rest}
            return {f"encoder.positions.{part}": each for part, each in parts.items() if len(each)}
    raise UserError(
        f"{name} has a table of {len(table)} relative positions, which fits no square image; choose another file"
    )


def _from_beit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate BEiT's names to VLMo's. Of fine-tuned files, the norm is that of the pooled patches, without classifier."""
    layers = 1 + max(int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key)))
    heads = {"head.weight", "head.bias"}
    beit, tables = {}, {}
    for key, value in state.items():
        if key.endswith("relative_position_bias_table"):
            found = re.match(r"blocks\.(\d+)\.", key)
            tables |= {int(found[1]): value} if found else dict.fromkeys(range(layers), value)
        elif found := re.match(r"blocks\.(\d+)\.(.*)", key):
            old = next((each for each in BEIT_BLOCK if found[2].startswith(each)), "")
            beit[f"transformer.blocks.{found[1]}.{BEIT_BLOCK.get(old, '')}{found[2].removeprefix(old)}"] = value
        elif key == "mask_token":
            beit["mim.mask_token"] = value.flatten()
        elif key.startswith("lm_head."):
            beit[key.replace("lm_head.", "mim.predict.")] = value
        elif key not in heads:
            beit["transformer." + re.sub(r"^fc_norm\.", "norm.", key)] = value
    if tables:
        beit[TABLE] = torch.cat([tables[layer] for layer in range(layers)], 1)  # (rows, heads) each -> (rows, C)
    width = state["blocks.0.attn.q_bias"].shape[0]
    beit[KINDS] = torch.zeros(2, width)  # BEiT has no token types
    return beit


def export_vlmo(checkpoint: VlmoCheckpoint) -> dict[str, Tensor]:
    """Return a checkpoint by official names, for the official code. The inverse of `load_vlmo` for files of VLMo.

    A model with relative positions gets absolute ones of zero, which the official code has but does not use.

    Raises:
        ValueError: if a part has no place in VLMo's layout, such as the head for masked patches, positions of a rectangle, or
            another number of text positions than 196; or if positions are missing.
    """
    student, official = dict(checkpoint.student), dict(checkpoint.unused)
    tables = [student.pop(f"encoder.positions.{part}", None) for part in ("image", "cross", "text")]
    if any(table is not None for table in tables):
        _check_tables(*tables)
        official[TABLE] = torch.cat([table for table in tables if table is not None])  # (rows of all three, C)
        if DEAD not in official:  # the official module has them all the same, and truncates them to its longest text
            official[DEAD] = torch.zeros(TEXT_POSITIONS, len(student["encoder.norm.weight"]))  # (M, D)
            official["text_embeddings.position_ids"] = torch.arange(TEXT_POSITIONS)[None]  # (1, M)
    kinds = [student.pop(key, None) for key in ("encoder.text.kind", "encoder.image.kind.weight")]
    if all(kind is not None for kind in kinds):
        official[KINDS] = torch.cat([kinds[0][None], kinds[1]])  # (1 + image kinds, D)
    theirs = {ours: old for old, ours in NAMES.items()}
    if "classifier.0.weight" in student:  # VQA's reads one pooled state, NLVR2's two
        theirs["classifier."] = "vqa_classifier." if _single(student) else "nlvr2_classifier."
    blocks = {ours: old for old, ours in BLOCK.items()}
    for key, value in student.items():
        if found := re.match(r"encoder\.layers\.(\d+)\.(.*)", key):
            old = next(old + found[2].removeprefix(ours) for ours, old in blocks.items() if found[2].startswith(ours))
            official[f"transformer.blocks.{found[1]}.{old}"] = value
            continue
        ours = next((ours for ours in theirs if key.startswith(ours)), None)
        if ours is None:
            raise ValueError(f"VLMo has no place for {key}")
        official[theirs[ours] + key.removeprefix(ours)] = _without(value, -SINGLE.get(key, 0))
    return official


def _check_tables(image: Tensor | None, cross: Tensor | None, text: Tensor | None) -> None:
    """Check that the table can be split again by its number of rows: (2 s - 1)^2 + 3 of images, 2 across, 392 of texts."""
    if image is None or cross is None or text is None:
        raise ValueError("VLMo's files have the positions of images, of texts, and across; this model lacks some")
    if len(text) != 2 * TEXT_POSITIONS or (math.isqrt(len(image) - 3) ** 2 != len(image) - 3 or len(cross) != 2):
        raise ValueError(
            f"VLMo's files have positions for square images and {TEXT_POSITIONS} tokens, not {len(image)} and {len(text)} distances"
        )


def _without(value: Tensor, single: int) -> Tensor:
    """Remove ``single`` leading dimensions of size 1. A negative number adds them."""
    return value.reshape(value.shape[single:]) if single > 0 else value.reshape((1,) * -single + value.shape)


def _single(student: Mapping[str, Tensor]) -> bool:
    return student["classifier.0.weight"].shape[1] == student["encoder.norm.weight"].shape[0]
