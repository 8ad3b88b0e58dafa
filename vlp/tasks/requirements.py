"""What a task needs of a model. Each function raises UserError for a model that lacks it, and says what to do."""

from __future__ import annotations

from vlp.errors import UserError
from vlp.tasks.base import EvalModel


def need_both(subject: EvalModel, task: str) -> None:
    """Raises UserError unless the model sees pictures and reads texts, and puts both into one space."""
    if subject.tokenizer is None:
        raise UserError(
            f"{task} needs a text tower and its tokenizer, and there is none here: give tokenizer=FOLDER for weights "
            "that bring none, or evaluate pictures alone with knn or probe"
        )
    if subject.preprocess is None:
        raise UserError(f"{task} needs pictures too, and there is no image tower here; evaluate it with sts")
    if not getattr(subject.model, "itc", True):
        raise UserError(f"{task} compares embeddings, and this model has no head for contrast; choose one that has")


def need_reader(subject: EvalModel, task: str, pictures: int) -> None:
    """Raises UserError unless the model reads a text together with so many pictures."""
    if subject.tokenizer is None or subject.preprocess is None:
        raise UserError(
            f"{task} needs a model of pictures and texts; give tokenizer=FOLDER for weights that bring none"
        )
    if (own := getattr(subject.model, "num_images", 1)) != pictures:
        raise UserError(
            f"{task} gives {pictures} picture{'s' * (pictures > 1)} with each text, and this model looks at {own}; evaluate it "
            f"on data with {own}"
        )


def need_alone(subject: EvalModel, task: str, modality: str) -> None:
    """Raises UserError where the model reads pictures, or texts, only together: it has no features of either by itself."""
    encoder = getattr(subject.model, "encoder", None)
    if modality not in getattr(encoder, "alone", (modality,)):
        raise UserError(
            f"{task} needs features of {modality}s by themselves, and this model reads pictures and texts together only; "
            "evaluate it with classification or vqa, or the run that it started from"
        )
