"""Names of the spec types in ``experiment.json``.

A file stores the short class name, so that a module may move without making old run folders unreadable. Files written
before short names existed store ``module:Class``; `RENAMED` lists the classes that had another name then.
"""

from __future__ import annotations

import importlib
from dataclasses import is_dataclass
from typing import Any

from vlp.errors import UserError

MODULES = {
    "vlp.config": ("Data", "Experiment", "Logging", "Saving", "Training"),
    "vlp.data.annotated": ("Annotated",),
    "vlp.data.augment": (
        "ColourDistortion",
        "GaussianBlur",
        "RandAugment",
        "RandomResizedCrop",
        "Resize",
        "ResizeCrop",
    ),
    "vlp.data.mixup": ("Mixup",),
    "vlp.data.preprocess": ("Preprocess",),
    "vlp.data.sentences": ("Sentences",),
    "vlp.data.shards": ("Source",),
    "vlp.data.text_views": ("Repetition", "Same"),
    "vlp.encoders.dall_e": ("DallE",),
    "vlp.encoders.decoder": ("Decoder",),
    "vlp.encoders.fusion": ("Fusion",),
    "vlp.encoders.image": ("TimmImage",),
    "vlp.encoders.mome": ("Mome",),
    "vlp.encoders.open_clip": ("OpenClip",),
    "vlp.encoders.patch_targets": ("Pixels", "RandomCodes"),
    "vlp.encoders.text": ("BertText",),
    "vlp.models.albef": ("Albef",),
    "vlp.models.dual": ("Dual",),
    "vlp.models.single": ("Single",),
    "vlp.models.vlmo": ("Vlmo",),
    "vlp.objectives.answer": ("AnswerGeneration", "Captioning"),
    "vlp.objectives.assignment": ("TextAssignment",),
    "vlp.objectives.classification": ("Classification",),
    "vlp.objectives.cutoff": ("Cutoff",),
    "vlp.objectives.geometry": ("Alignment", "Uniformity"),
    "vlp.objectives.instance": ("InstanceDiscrimination",),
    "vlp.objectives.itc": ("ImageTextContrast", "MomentumContrast", "SigmoidContrast"),
    "vlp.objectives.itm": ("ImageTextMatching",),
    "vlp.objectives.masking": ("TextMasking",),
    "vlp.objectives.mim": ("MaskedImage",),
    "vlp.objectives.mlm": ("MaskedText",),
    "vlp.objectives.moco": ("Moco",),
    "vlp.objectives.pairwise": ("NPair", "PairContrast", "Triplet"),
    "vlp.objectives.sentence": ("Cert", "ESimCse", "SimCse"),
    "vlp.objectives.simclr": ("SimClr",),
    "vlp.optim.ema": ("MomentumConfig",),
    "vlp.optim.optimizers": ("AdamW", "Lamb", "Lars", "Sgd"),
    "vlp.optim.schedule": ("Schedule",),
    "vlp.tasks.annotated_classes": ("Classes",),
    "vlp.tasks.captioning": ("CaptionQuality",),
    "vlp.tasks.classification": ("TextAccuracy",),
    "vlp.tasks.grounding": ("Grounding",),
    "vlp.tasks.image_accuracy": ("ImageAccuracy",),
    "vlp.tasks.masked": ("MaskedPrediction",),
    "vlp.tasks.minimal_pairs": ("MinimalPairs",),
    "vlp.tasks.probe": ("Knn", "LinearProbe"),
    "vlp.tasks.rerank": ("Rerank",),
    "vlp.tasks.retrieval": ("Retrieval",),
    "vlp.tasks.sentence_similarity": ("SentenceSimilarity",),
    "vlp.tasks.vqa": ("Vqa",),
    "vlp.tasks.zero_shot": ("ZeroShot",),
}
TYPES = {name: module for module, names in MODULES.items() for name in names}
RENAMED = {"Mix": "Mixup", "Momentum": "MomentumConfig"}
# short class name -> old field name -> its name today
RENAMED_FIELDS: dict[str, dict[str, str]] = {}
# (short class name, field name of today) -> old value -> its value today
RENAMED_VALUES: dict[tuple[str, str], dict[str, str]] = {}


def name_of(cls: type) -> str:
    """Return the short name of a spec type of vlp, ``module:Class`` of any other."""
    if TYPES.get(cls.__name__) == cls.__module__:
        return cls.__name__
    return f"{cls.__module__}:{cls.__qualname__}"


def is_type_name(value: Any) -> bool:
    """Return whether a ``type`` in JSON names a class; a plain dict may have an entry of that name too."""
    return isinstance(value, str) and (value in TYPES or ":" in value)


def class_of(name: str) -> type:
    """Return the class that `name_of` named, also of a file from before short names."""
    module, _, short = name.rpartition(":")
    if module == "" or module.startswith("vlp."):
        short = RENAMED.get(short, short)
        module = TYPES.get(short, module)
    try:
        cls = getattr(importlib.import_module(module), short)
    except (ImportError, AttributeError, ValueError):
        raise UserError(
            f"the experiment needs {name}, which cannot be imported; install what it is part of, or, if it is "
            f"written in the config file itself, move it to a module"
        ) from None
    if not is_dataclass(cls):
        raise UserError(f"the experiment names {name}, which is not a dataclass; the file was altered")
    return cls


def current_fields(cls: type, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a stored spec under the names, and with the values, of today."""
    name = cls.__name__
    renamed = {RENAMED_FIELDS.get(name, {}).get(field, field): value for field, value in fields.items()}
    return {field: _current_value(name, field, value) for field, value in renamed.items()}


def _current_value(name: str, field: str, value: Any) -> Any:
    return RENAMED_VALUES.get((name, field), {}).get(value, value) if isinstance(value, str) else value
