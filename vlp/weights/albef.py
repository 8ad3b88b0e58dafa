"""ALBEF's published checkpoints, in and out.

The official files (pre-training, retrieval and grounding, VQA, NLVR2, visual entailment) and LAVIS's name things alike. They
differ in what they hold: which heads, whether ``bert.`` stands before the text encoder (where that has an MLM head), how
many layers fuse, whether the momentum twin is there (``*_m``; LAVIS drops it on saving) and the queues. All of that shows in
the names, so nothing has to be said about a file. Ours:

  image.model.*  text.model.*  image_projection  text_projection  temperature  itm  mlm   as `vlp.models.albef` has them
  fusion.layers.N      layers of the text encoder from the first with cross-attention on; in NLVR2's files 12: twins, whose
                       keys and values of images are the same and in our models are there once, see `as_twins`
  classifier.0, .2     the two linear layers of NLVR2's and entailment's head
  assignment           the head of NLVR2's text assignment
  decoder.embeddings, .layers.N, .head     VQA's answer decoder, its layers and head named as fusion's and ``mlm``'s

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
# repeats of other tensors, and numbers from 0
DERIVED = re.compile(r"(embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias))$")
FUSION_LAYER = re.compile(r"fusion\.layers\.(\d+)\.(.+)")
SHARED = tuple(f"cross_attention.{part}.{leaf}" for part in ("key", "value") for leaf in ("weight", "bias"))
NO_TWIN = ("itm", "temperature", "assignment")  # what ALBEF keeps no average of
NO_INDEX = -100  # of rows of idx_queue that were never pushed; ours is -1


@dataclass
class AlbefCheckpoint:
    """Everything in a file.

    Args:
        student: the model's tensors, by our names.
        momentum: those of its average; empty where the file has none. ALBEF keeps none of the ITM head and temperature.
        queue: as `vlp.objectives.queues.Queue.load` takes it, with the columns image and text; None where the file has none.
    """

    student: dict[str, Tensor]
    momentum: dict[str, Tensor] = field(default_factory=dict)
    queue: dict[str, Tensor] | None = None

    @property
    def teacher(self) -> dict[str, Tensor]:
        """The whole momentum encoder: what has no average is the student's."""
        return self.student | self.momentum


def load_albef(source: str | Path | Mapping[str, Tensor]) -> AlbefCheckpoint:
    """A checkpoint of ALBEF, official or LAVIS's, by our names; tensors are as they were, temperatures apart, which get shape (1,).

    Args:
        source: a file, see `vlp.weights.reading.read_weights`, or what it holds.

    Raises:
        UserError: if the file cannot be read without running code, or is of another model.
    """
    if isinstance(source, Mapping):
        state, name = dict(source), "the checkpoint"
    else:
        state, name = read_weights(source), str(source)
    fusing = [
        int(found[1]) for key in state if (found := re.match(r"text_encoder\..*layer\.(\d+)\.crossattention", key))
    ]
    if not fusing or min(fusing) == 0 or not any(key.startswith("visual_encoder.") for key in state):
        some = ", ".join(list(state)[:3])
        raise UserError(
            f"{name} is no checkpoint of ALBEF: that has a visual_encoder, and a text_encoder whose last layers have "
            f"crossattention; this one has {some}, ..."
        )
    checkpoint = AlbefCheckpoint({}, {}, _queue({key: state.pop(key) for key in QUEUES if key in state}))
    for key, value in state.items():
        top, dot, rest = key.partition(".")
        twin = top.endswith("_m")
        side = checkpoint.momentum if twin else checkpoint.student
        ours = _ours(top.removesuffix("_m") + dot + rest, min(fusing))
        if ours is None:
            raise UserError(f"{name} holds {key}, which no checkpoint of ALBEF has; choose another file")
        if ours:
            side[ours] = value.reshape(1) if ours == "temperature" else value
    for key, value in state.items():
        if key.endswith("decoder.weight") and not torch.equal(value, _tied(state, key)):
            raise UserError(
                f"{name} predicts words by another matrix than their embeddings ({key}); ALBEF ties the two"
            )
    return checkpoint


def _tied(state: Mapping[str, Tensor], key: str) -> Tensor:
    return state[key.replace("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight")]


def _ours(key: str, split: int) -> str | None:
    """Our name of an official one; empty for what repeats another, None where there is none such."""
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
    """A student for a fusion of ``layers`` that each stand ``images`` times, see `vlp.encoders.fusion.Fusion`.

    Layers that are there once are repeated, as the published code starts NLVR2 from pre-trained weights; twins that are
    there already lose their second copy of keys and values.

    Raises:
        UserError: where twins are to share what is not the same.
    """
    if images == 1:
        return dict(student)
    once = f"fusion.layers.{layers}.norm.weight" not in student
    made = {}
    for key, value in student.items():
        found = FUSION_LAYER.match(key)
        number, name = (int(found[1]), found[2]) if found else (0, key)
        if found and once:
            copies = range(1 if name in SHARED else images)
            made |= {f"fusion.layers.{number * images + n}.{name}": value for n in copies}
        elif not (found and name in SHARED and number % images):
            made[key] = value
        elif not torch.equal(value, student[f"fusion.layers.{number - number % images}.{name}"]):
            raise UserError(
                f"{key} is not that of its twin; layers that look at several images share their keys and values"
            )
    return made


def _queue(found: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """(E, K) queues to rows; a full one, since the published queues start full of random vectors."""
    if not found:
        return None
    size = found["image_queue"].shape[1]
    index = found.get("idx_queue", torch.full((1, size), NO_INDEX)).flatten()
    return {
        "index": torch.where(index == NO_INDEX, -1, index),
        "counters": torch.tensor([int(found["queue_ptr"]), size]),
        "column.image": found["image_queue"].T.contiguous(),
        "column.text": found["text_queue"].T.contiguous(),
    }


def export_albef(checkpoint: AlbefCheckpoint) -> dict[str, Tensor]:
    """The inverse of `load_albef`: official names, for the official code. LAVIS takes them too.

    Twins get their copies of keys and values. Of the momentum encoder only what ALBEF keeps an average of is written. The queue's indices of images have a place in
    the layout of retrieval alone, which has no MLM head.

    Raises:
        UserError: if the queue is not full yet, which the official code could not tell.
    """
    split = 1 + max(int(found[1]) for key in checkpoint.student if (found := re.match(r"text\..*layer\.(\d+)\.", key)))
    official = _official(checkpoint.student, split, "")
    twin = {key: value for key, value in checkpoint.momentum.items() if not key.startswith(NO_TWIN)}
    official |= _official(twin, split, "_m")
    if checkpoint.queue is not None:
        pointer, filled = checkpoint.queue["counters"].tolist()
        index = checkpoint.queue["index"]
        if filled < len(index):
            raise UserError(
                f"the queue holds {filled} of {len(index)} rows; train until it is full, or export without it"
            )
        official |= {f"{n}_queue": checkpoint.queue[f"column.{n}"].T.contiguous() for n in ("image", "text")}
        official["queue_ptr"] = torch.tensor([pointer])
        if "mlm.bias" not in checkpoint.student:
            official["idx_queue"] = torch.where(index < 0, NO_INDEX, index)[None]
    return official


def _official(state: Mapping[str, Tensor], split: int, twin: str) -> dict[str, Tensor]:
    tops = {ours: f"{theirs}{twin}" for theirs, ours in TOPS.items()}
    encoder, decoder = f"text_encoder{twin}.", f"text_decoder{twin}.bert."
    if "mlm.bias" in state:
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
            official[tops[top] + key.removeprefix(top)] = value.reshape(()) if top == "temperature" else value
    return official | _derived(official)


def _with_copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With keys and values of images in every layer: where one has none, those of the layer before it."""
    made = dict(state)
    layers = {int(found[1]) for key in state if (found := FUSION_LAYER.match(key))}
    for number, name in product(sorted(layers), SHARED):
        before = made.get(f"fusion.layers.{number - 1}.{name}")
        if before is not None:
            made.setdefault(f"fusion.layers.{number}.{name}", before)
    return made


def _theirs(names: Mapping[str, str], ours: str) -> str:
    """The official name that begins like one of ``names``."""
    return next(theirs + ours.removeprefix(own) for theirs, own in names.items() if ours.startswith(own))


def _derived(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the official files hold twice: the vocabulary's matrix and bias; and the numbers of the positions."""
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
