"""Read and write published ALBEF checkpoints.

The official files (pre-training, retrieval and grounding, VQA, NLVR2, visual entailment) and those of LAVIS use the same names.
They differ in their parts: heads, a prefix ``bert.`` of the text encoder (with an MLM head), number of fusion layers, momentum
encoder (``*_m``) and queues. The names show all of that. Two things are peculiar to LAVIS. Its BERT has no token types, which
is the same as token types of zero. And it saves no frozen parameters, but finds them by their first name only: of the momentum
encoder, the second names of shared parameters are left (``decoder.weight``, keys and values of NLVR2's twins). They are
skipped. The names here:

  image.model.*  text.model.*  image_projection  text_projection  temperature  itm  mlm   as in `vlp.models.albef`
  fusion.layers.N      layers of the text encoder from the first one with cross-attention on. NLVR2's files have 12, in twins
                       with equal keys and values of images, which are stored once here, see `as_twins`
  classifier.0, .2     the two linear layers of the heads for NLVR2 and entailment
  assignment           the head of NLVR2's text assignment
  decoder.embeddings, .layers.N, .head     VQA's answer decoder, with layers named as in fusion and the head as ``mlm``

K rows of a queue, E embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from vlp.errors import UserError
from vlp.weights.bert import BERT_LAYER
from vlp.weights.reading import read_weights

TOPS = {
    "visual_encoder": "image.model",
    "vision_proj": "image_projection",
    "text_proj": "text_projection",
    "temp": "temperature",
    "itm_head": "itm",
    "cls_head": "classifier",
    "ta_head": "assignment",
}
HEAD = {"transform.dense.": "dense.", "transform.LayerNorm.": "norm.", "bias": "bias"}
QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr")
TYPES = "embeddings.token_type_embeddings.weight"
# Repetitions of other tensors, and position numbers.
DERIVED = re.compile(r"(embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias))$")
FUSION_LAYER = re.compile(r"fusion\.layers\.(\d+)\.(.+)")
SHARED = tuple(f"cross_attention.{part}.{leaf}" for part in ("key", "value") for leaf in ("weight", "bias"))
NOT_AVERAGED = ("itm", "temperature", "assignment")  # parts without a copy in ALBEF's momentum encoder
NO_INDEX = -100  # in idx_queue, for rows that were never pushed; -1 here


@dataclass
class AlbefCheckpoint:
    """The content of a checkpoint file.

    Args:
        student: Tensors of the model by the names of this module.
        momentum: Tensors of the momentum encoder, without the ITM head and the temperature. Empty if the file has none.
        queue: In the format of `vlp.objectives.queues.Queue.load`, with the columns image and text. None if the file has none.
        lavis: Whether LAVIS wrote the file. Its texts end with ``[SEP]``, those of ALBEF do not.
    """

    student: dict[str, Tensor]
    momentum: dict[str, Tensor] = field(default_factory=dict)
    queue: dict[str, Tensor] | None = None
    lavis: bool = False

    @property
    def teacher(self) -> dict[str, Tensor]:
        """The whole momentum encoder. Parts without an average are those of the student."""
        return self.student | self.momentum


def load_albef(source: str | Path | Mapping[str, Tensor]) -> AlbefCheckpoint:
    """Read an ALBEF checkpoint, official or of LAVIS. Tensors do not change, but temperatures get shape (1,).

    Args:
        source: A file, see `vlp.weights.reading.read_weights`, or its tensors.

    Raises:
        UserError: if the file cannot be read without running code, or is of another model.
    """
    if isinstance(source, Mapping):
        state, name = dict(source), "the checkpoint"
    else:
        state, name = read_weights(source), str(source)
    # the layers with cross-attention: the first of them is the first fusion layer
    fusing = [
        int(found[1]) for key in state if (found := re.match(r"text_encoder\..*layer\.(\d+)\.crossattention", key))
    ]
    if not fusing or min(fusing) == 0 or not any(key.startswith("visual_encoder.") for key in state):
        some = ", ".join(list(state)[:3])
        raise UserError(
            f"{name} is not an ALBEF checkpoint, which has a visual_encoder, and a text_encoder whose last layers have "
            f"crossattention; it has {some}, ..."
        )
    if not any(key.startswith("visual_encoder_m.") for key in state):  # what LAVIS leaves of it
        state = {key: value for key, value in state.items() if not key.partition(".")[0].endswith("_m")}
    queue = _queue({key: state.pop(key) for key in QUEUES if key in state})
    checkpoint = AlbefCheckpoint({}, {}, queue, lavis=not any(key.endswith(TYPES) for key in state))
    for key, value in state.items():
        top, dot, rest = key.partition(".")
        target = checkpoint.momentum if top.endswith("_m") else checkpoint.student
        ours = _ours(top.removesuffix("_m") + dot + rest, min(fusing))
        if ours is None:
            raise UserError(f"{name} has {key}, which is unknown in ALBEF checkpoints; choose another file")
        if ours:
            target[ours] = value.reshape(1) if ours == "temperature" else value
    # the heads here have no matrix of their own, so an untied one would be lost
    for key, value in state.items():
        if key.endswith("decoder.weight") and not torch.equal(value, _tied(state, key)):
            raise UserError(
                f"{name} predicts words by another matrix than their embeddings ({key}), which ALBEF ties; choose "
                "another file"
            )
    if checkpoint.lavis:
        for part in ("text.model.", "decoder."):
            if (words := checkpoint.student.get(f"{part}embeddings.word_embeddings.weight")) is not None:
                checkpoint.student[part + TYPES] = words.new_zeros(2, words.shape[1])
    return checkpoint


def _tied(state: Mapping[str, Tensor], key: str) -> Tensor:
    return state[key.replace("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight")]


def _ours(key: str, split: int) -> str | None:
    """Translate an official name. Empty for a repetition of another tensor, None for an unknown name."""
    top, _, rest = key.partition(".")
    if top in TOPS:
        return f"{TOPS[top]}.{rest}" if rest else TOPS[top]
    if top not in ("text_encoder", "text_decoder"):
        return None
    if DERIVED.search(key):
        return ""
    rest = rest.removeprefix("bert.")
    decodes = top == "text_decoder"
    if found := re.match(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)$", rest):
        number, part, leaf = int(found[1]), found[2], found[3]
        if number < split and not decodes:
            return f"text.model.{rest}"
        if part not in BERT_LAYER:
            return None
        where = f"decoder.layers.{number}" if decodes else f"fusion.layers.{number - split}"
        return f"{where}.{BERT_LAYER[part]}.{leaf}"
    if rest.startswith("cls.predictions."):
        head = rest.removeprefix("cls.predictions.")
        names = [head.replace(old, new) for old, new in HEAD.items() if head.startswith(old)]
        return f"{'decoder.head' if decodes else 'mlm'}.{names[0]}" if names else None
    if rest.startswith("embeddings."):
        return f"decoder.{rest}" if decodes else f"text.model.{rest}"
    return None


def as_twins(student: Mapping[str, Tensor], layers: int, images: int) -> dict[str, Tensor]:
    """Return the tensors for a fusion whose layers are repeated for each of several images.

    Single layers are repeated, as the published code does when NLVR2 starts from pre-trained weights. Layers that are twins
    already lose their second copy of keys and values.

    Args:
        student: Tensors by the names of this module.
        layers: Number of fusion layers, repetitions not counted.
        images: Repetitions of each layer, see `vlp.encoders.fusion.Fusion`.

    Raises:
        UserError: if the keys or values of twins differ.
    """
    if images == 1:
        return dict(student)
    is_single = f"fusion.layers.{layers}.norm.weight" not in student
    twins = {}
    for key, value in student.items():
        found = FUSION_LAYER.match(key)
        number, name = (int(found[1]), found[2]) if found else (0, key)
        if found and is_single:
            copies = range(1 if name in SHARED else images)
            twins |= {f"fusion.layers.{number * images + n}.{name}": value for n in copies}
        elif not (found and name in SHARED and number % images):
            twins[key] = value
        elif not torch.equal(value, student[f"fusion.layers.{number - number % images}.{name}"]):
            raise UserError(
                f"{key} differs from that of its twin, and twins share the keys and values of images; choose another file"
            )
    return twins


def _queue(found: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Transpose the (E, K) queues to rows. They count as full, since published queues start with random vectors."""
    if not found:
        return None
    size = found["image_queue"].shape[1]
    index = found.get("idx_queue", torch.full((1, size), NO_INDEX)).flatten()  # (K,)
    return {
        "index": torch.where(index == NO_INDEX, -1, index),
        "counters": torch.tensor([int(found["queue_ptr"]), size]),
        "column.image": found["image_queue"].T.contiguous(),  # (K, E)
        "column.text": found["text_queue"].T.contiguous(),  # (K, E)
    }


def export_albef(checkpoint: AlbefCheckpoint) -> dict[str, Tensor]:
    """Return a checkpoint by official names, for the official code and LAVIS. The inverse of `load_albef`.

    Twins get their copies of keys and values. Parts that ALBEF's momentum encoder lacks are not written. The image ids of the
    queue are written only without an MLM head, since only the layout of retrieval has them.

    Raises:
        UserError: if the queue is not full yet: the official code cannot represent that.
        ValueError: if a part has no place in ALBEF's layout.
    """
    split = 1 + max(int(found[1]) for key in checkpoint.student if (found := re.match(r"text\..*layer\.(\d+)\.", key)))
    official = _official(checkpoint.student, split, "")
    momentum = {key: value for key, value in checkpoint.momentum.items() if not key.startswith(NOT_AVERAGED)}
    official |= _official(momentum, split, "_m")
    if checkpoint.queue is not None:
        pointer, filled = checkpoint.queue["counters"].tolist()
        index = checkpoint.queue["index"]
        if filled < len(index):
            raise UserError(
                f"the queue has {filled} of {len(index)} rows; train until it is full, or export without it"
            )
        official |= {f"{n}_queue": checkpoint.queue[f"column.{n}"].T.contiguous() for n in ("image", "text")}
        official["queue_ptr"] = torch.tensor([pointer])
        if "mlm.bias" not in checkpoint.student:
            official["idx_queue"] = torch.where(index < 0, NO_INDEX, index)[None]
    return official


def _official(state: Mapping[str, Tensor], split: int, suffix: str) -> dict[str, Tensor]:
    tops = {ours: f"{theirs}{suffix}" for theirs, ours in TOPS.items()}
    encoder, decoder = f"text_encoder{suffix}.", f"text_decoder{suffix}.bert."
    if "mlm.bias" in state:  # then the text encoder is a BertForMaskedLM
        encoder += "bert."
    official = {}
    for key, value in _with_copies(state).items():
        if found := re.match(r"(fusion|decoder)\.layers\.(\d+)\.(.+)\.(weight|bias)$", key):
            number, part = int(found[2]), _theirs(BERT_LAYER, found[3])
            tower, first = (encoder, split) if found[1] == "fusion" else (decoder, 0)
            official[f"{tower}encoder.layer.{first + number}.{part}.{found[4]}"] = value
        elif found := re.match(r"(mlm|decoder\.head)\.(.*)", key):
            tower = encoder if found[1] == "mlm" else decoder
            official[f"{tower.removesuffix('bert.')}cls.predictions.{_theirs(HEAD, found[2])}"] = value
        elif found := re.match(r"(text\.model|decoder)\.(.*)", key):
            official[(encoder if found[1] == "text.model" else decoder) + found[2]] = value
        else:
            top = next((ours for ours in tops if key == ours or key.startswith(f"{ours}.")), None)
            if top is None:
                raise ValueError(f"ALBEF has no place for {key}")
            official[tops[top] + key.removeprefix(top)] = value.reshape(()) if top == "temperature" else value  # 0-dim
    return official | _derived(official)


def _with_copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with keys and values of images in every layer. A twin gets those of the layer before it."""
    copied = dict(state)
    layers = {int(found[1]) for key in state if (found := FUSION_LAYER.match(key))}
    for number, name in product(sorted(layers), SHARED):
        before = copied.get(f"fusion.layers.{number - 1}.{name}")
        if before is not None:
            copied.setdefault(f"fusion.layers.{number}.{name}", before)
    return copied


def _theirs(names: Mapping[str, str], ours: str) -> str:
    """Translate a name by the one of ``names`` that it begins with."""
    return next(theirs + ours.removeprefix(own) for theirs, own in names.items() if ours.startswith(own))


def _derived(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the redundant tensors of official files: the vocabulary's matrix and bias, and the position numbers."""
    derived = {}
    for key, value in official.items():
        if found := re.match(r"(text_\w+\.(?:bert\.)?embeddings\.)position_embeddings\.weight$", key):
            derived[f"{found[1]}position_ids"] = torch.arange(len(value))[None]
        if found := re.match(r"(text_\w+\.)cls\.predictions\.bias$", key):
            derived[f"{found[1]}cls.predictions.decoder.bias"] = value
            derived[f"{found[1]}cls.predictions.decoder.weight"] = official[
                f"{found[1]}bert.embeddings.word_embeddings.weight"
            ]
    return derived
