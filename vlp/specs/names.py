"""Names of the spec types in ``experiment.json``.

A file stores the short class name, so that a module may move without making old run folders unreadable. Files from before
short names store ``module:Class``. `RENAMED`, `RENAMED_FIELDS` and `RENAMED_VALUES` lead from names of earlier versions to
those of today.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vlp.errors import UserError

MODULES = {
    "vlp.config": ("Data", "Experiment", "Logging", "Saving", "Training"),
    "vlp.data.reading.annotated": ("Annotated",),
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
    "vlp.data.reading.sentences": ("Sentences",),
    "vlp.data.reading.shards": ("Source",),
    "vlp.data.reading.tar_streams": ("WebDatasetStream",),
    "vlp.data.text_views": ("Repetition", "Same"),
    "vlp.encoders.conv": ("ConvImage",),
    "vlp.encoders.dall_e": ("DallE",),
    "vlp.encoders.decoder": ("Decoder",),
    "vlp.encoders.fusion": ("Fusion",),
    "vlp.encoders.hybrid": ("HybridImage",),
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
    "vlp.objectives.barlow_twins": ("BarlowTwins",),
    "vlp.objectives.byol": ("Byol", "Predictor"),
    "vlp.objectives.classification": ("Classification",),
    "vlp.objectives.cutoff": ("Cutoff",),
    "vlp.objectives.dcl": ("Dcl",),
    "vlp.objectives.geometry": ("Alignment", "Uniformity"),
    "vlp.objectives.instance": ("InstanceDiscrimination",),
    "vlp.objectives.itc": ("ImageTextContrast", "MomentumContrast", "SigmoidContrast"),
    "vlp.objectives.itm": ("ImageTextMatching",),
    "vlp.objectives.masking": ("TextMasking",),
    "vlp.objectives.mim": ("MaskedImage",),
    "vlp.objectives.mlm": ("MaskedText",),
    "vlp.objectives.moco": ("Moco",),
    "vlp.objectives.pairwise": ("NPair", "PairContrast", "Triplet", "Tuplet"),
    "vlp.objectives.sentence": ("Cert", "ESimCse", "SimCse"),
    "vlp.objectives.simclr": ("SimClr",),
    "vlp.objectives.vicreg": ("VicReg",),
    "vlp.optim.ema": ("MomentumConfig",),
    "vlp.optim.optimizers": ("AdamW", "Lamb", "Lars", "Sgd"),
    "vlp.optim.schedule": ("Schedule",),
    "vlp.tasks.pair_classification": ("PairClassification",),
    "vlp.tasks.captioning": ("CaptionQuality",),
    "vlp.tasks.text_accuracy": ("TextAccuracy",),
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
RENAMED = {"Classes": "PairClassification", "Mix": "Mixup", "Momentum": "MomentumConfig"}
# short class name -> old field name -> its name today
RENAMED_FIELDS: dict[str, dict[str, str]] = {
    "Data": {"sep": "add_sep", "clean": "clean_captions"},
    "ImageTextMatching": {"same_picture": "duplicates"},
    "Logging": {"samples": "sample_keys"},
    "Moco": {"same_picture": "duplicates"},
    "MomentumContrast": {"same_picture": "duplicates"},
    "PairContrast": {"others": "num_others"},
    "Repetition": {"of": "unit"},
    "TextAssignment": {"none": "neither"},
    "TextMasking": {"of": "unit", "spared": "exclude"},
    "Training": {"mix": "mixup"},
    "Vqa": {"how": "mode"},
}
SCOPES = {"all": "global", "process": "local"}
# (short class name, field name of today) -> old value -> its value today
RENAMED_VALUES: dict[tuple[str, str], dict[str, str]] = {
    ("Captioning", "mean_over"): SCOPES,
    ("ImageTextMatching", "candidates"): SCOPES,
    ("ImageTextMatching", "duplicates"): {"left_out": "mask"},
    ("MaskedText", "mean_over"): SCOPES,
    ("Moco", "duplicates"): {"left_out": "mask"},
    ("MomentumContrast", "keys"): SCOPES,
}

# short class name -> field that files from before the field lack -> its value in them, where that is not the default
ADDED_FIELDS: dict[str, dict[str, Any]] = {"Albef": {"grid_positions": "none"}}

NO_TYPES: Mapping[str, type] = MappingProxyType({})


def name_of(cls: type) -> str:
    """Return the short name of a spec type of vlp, ``module:Class`` of any other."""
    if TYPES.get(cls.__name__) == cls.__module__:
        return cls.__name__
    return f"{cls.__module__}:{cls.__qualname__}"


def is_type_name(value: Any) -> bool:
    """Return whether a ``type`` in JSON names a class. A plain dict in a file of an earlier version may have a ``type`` too."""
    return isinstance(value, str) and (value in TYPES or value in RENAMED or ":" in value)


def is_own(name: str) -> bool:
    """Return whether ``module:Class`` names a class outside vlp."""
    module = name.rpartition(":")[0]
    return module != "" and module.partition(".")[0] != "vlp"


def class_of(name: str, own_types: Mapping[str, type] = NO_TYPES) -> type:
    """Return the class that `name_of` named, also if a file stores it under an earlier name.

    Only the modules of `MODULES` are ever imported, so a file cannot choose code to run.

    Args:
        name: Short name of a type of vlp, or ``module:Class``.
        own_types: Name -> class of the user's own types, which the caller has imported and trusts.

    Raises:
        UserError: If the name is neither a type of vlp nor in ``own_types``.
    """
    if name in own_types:
        return own_types[name]
    if short := _type_of_vlp(name):
        return getattr(importlib.import_module(TYPES[short]), short)  # reflection: the class by its stored name
    if is_own(name):
        raise UserError(
            f"the experiment uses its own code ({name}); give --config CONFIG.py, the config that it comes from, or "
            f"--trust-code to run the code in its folder if you trust that"
        )
    raise UserError(
        f"the experiment was written by another version of vlp: {name} is not in the table of vlp/specs/names.py"
    )


def _type_of_vlp(name: str) -> str | None:
    """Return the short name of today. Files from before short names store ``vlp.module:Class``."""
    module, _, short = name.rpartition(":")
    short = RENAMED.get(short, short)
    return short if short in TYPES and (module == "" or module.startswith("vlp.")) else None


def current_fields(cls: type, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a stored spec with the names and values of today. Renames of a class apply to its subclasses."""
    for name in [base.__name__ for base in reversed(cls.__mro__)]:
        new_names = RENAMED_FIELDS.get(name, {})
        fields = {new_names.get(field, field): value for field, value in fields.items()}
        fields = ADDED_FIELDS.get(name, {}) | fields
        for field, value in fields.items():
            if isinstance(value, str):
                fields[field] = RENAMED_VALUES.get((name, field), {}).get(value, value)
    return fields
