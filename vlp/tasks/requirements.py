"""What a task needs of a model. Each function raises UserError for a model that lacks it, and says what to do."""

from __future__ import annotations

from vlp.config import Data
from vlp.errors import UserError
from vlp.models.base import Modality
from vlp.tasks.base import EvalModel


def need_tokenizer(data: Data, task: str) -> None:
    """Require a tokenizer among the data settings, before the model is loaded."""
    if not data.tokenizer:
        raise UserError(_no_text(task))


def need_embeddings(model: EvalModel, task: str) -> None:
    """Require images, texts, and embeddings of both in one space."""
    if model.tokenizer is None:
        raise UserError(_no_text(task))
    if model.preprocess is None:
        raise UserError(_no_image(task))
    if not model.model.can_contrast:
        raise UserError(f"{task} compares embeddings, and this model has no contrastive head; choose one that has")


def need_images_with_texts(model: EvalModel, task: str, num_images: int) -> None:
    """Require a model that reads each text together with ``num_images`` images."""
    if model.tokenizer is None or model.preprocess is None:
        raise UserError(
            f"{task} needs a model of images and texts; give tokenizer=FOLDER for weights that come without one"
        )
    if (expected := model.model.num_images) != num_images:
        raise UserError(
            f"{task} gives {num_images} image{'s' * (num_images > 1)} with each text, and this model reads {expected}; "
            f"evaluate it on data with {expected}"
        )


def need_features(model: EvalModel, task: str, modality: Modality) -> None:
    """Require features of one modality that do not depend on the other."""
    if modality == "image" and model.preprocess is None:
        raise UserError(_no_image(task))
    if modality == "text" and model.tokenizer is None:
        raise UserError(_no_text(task))
    if not model.model.can_encode(modality):
        raise UserError(
            f"{task} needs features of {modality}s, and this model reads images and texts only together; evaluate it with "
            "classification or vqa, or evaluate the run that it started from"
        )


def need_length(model: EvalModel, max_length: int) -> None:
    """Require that the text tower takes texts of ``max_length`` tokens."""
    longest = model.model.text.max_length
    if not 1 <= max_length <= longest:
        raise UserError(f"max_length={max_length} but the text tower takes 1 to {longest} tokens; set max_length")


def _no_text(task: str) -> str:
    return (
        f"{task} needs a text tower and its tokenizer; give tokenizer=FOLDER for weights that come without one, or "
        "evaluate images with knn or probe"
    )


def _no_image(task: str) -> str:
    return f"{task} needs an image tower, and this model has none; evaluate it with sts"
