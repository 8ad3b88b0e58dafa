"""What objectives require of an experiment. Each check raises a `UserError` that names the setting to change."""

from __future__ import annotations

from vlp.config import Data, Experiment
from vlp.data.reading.annotated import Annotated
from vlp.data.reading.sentences import Sentences
from vlp.errors import UserError
from vlp.forward import Head


def has_images(data: Data) -> bool:
    """Return whether any training source has images."""
    return not data.train or any(not isinstance(source, Sentences) for source in data.train)


def require_image(experiment: Experiment, who: str) -> None:
    """Raise UserError if the model has no image tower, or the data no images."""
    if not experiment.model.has_image:
        raise UserError(f"{who} needs an image tower; set model.image")
    if not has_images(experiment.data):
        raise UserError(f"{who} needs images, and data.train names files of texts only; add shards")


def require_image_views(experiment: Experiment, who: str, count: int | None = 1) -> None:
    """Raise UserError unless every image has ``count`` further views; None accepts any number above 0."""
    require_image(experiment, who)
    views = len(experiment.data.views)
    if views < 1 or count not in (None, views):
        wanted = "at least one further view" if count is None else f"{count} further view{'s' * (count > 1)}"
        raise UserError(f"{who} needs {wanted} of each image, not {views}; set data.views=(TRANSFORM,)")


def require_text(experiment: Experiment, who: str) -> None:
    """Raise UserError if the model has no text tower."""
    if not experiment.model.has_text:
        raise UserError(f"{who} needs a text tower; set model.text")


def text_columns(experiment: Experiment) -> int:
    """Return how many texts each sample has before ``data.text_views`` adds views: the columns of `Sentences`."""
    columns = [
        len(source.columns) if isinstance(source, Sentences) and source.join is None else 1
        for source in experiment.data.train
    ]
    return max(1, min(columns, default=1))


def require_text_views(experiment: Experiment, who: str) -> None:
    """Raise UserError unless every text has a further view, from ``data.text_views`` or from a second column."""
    require_text(experiment, who)
    if not experiment.data.text_views and text_columns(experiment) < 2:
        raise UserError(f"{who} needs a further view of each text; set data.text_views=(VIEW,), or give two columns")


def require_labels(experiment: Experiment, who: str, soft: bool = False) -> None:
    """Raise UserError unless every training source gives a class for each sample.

    Args:
        soft: Accept soft targets, from `Annotated` answers, in place of classes.
    """
    classes = experiment.model.classes
    for source in experiment.data.train:
        if soft and isinstance(source, Annotated) and source.answers and source.classes:
            continue
        if not source.label:
            raise UserError(f"{who} needs labels of {classes} classes; set label of the source {source.location}")
        if isinstance(source, Sentences) and len(source.classes) != classes:
            raise UserError(
                f"{who} needs labels of {classes} classes, and the source {source.location} has {len(source.classes)}; set its "
                f"classes, or model.classes"
            )


def require_contrast(experiment: Experiment, who: str, head: Head = "first") -> None:
    """Raise UserError unless the model embeds both modalities with the given contrastive head."""
    require_image(experiment, who)
    require_text(experiment, who)
    if not experiment.model.itc:
        raise UserError(f"{who} needs projections and a temperature; set model.itc=true")
    if head == "vl" and not experiment.model.itc_vl:
        raise UserError(f"{who} with head='vl' needs a model with a second head; set head=first, or model.itc_vl=true")


def require_rows(experiment: Experiment, who: str) -> None:
    """Raise UserError unless every sample has a row of its own among all samples, the same in each epoch."""
    if experiment.data.stream is not None:
        raise UserError(
            f"{who} keeps a row for each sample, and a WebDatasetStream has no rows; give Sources to data.train"
        )


def require_momentum(experiment: Experiment, who: str) -> None:
    """Raise UserError if the run keeps no momentum encoder."""
    if experiment.momentum is None:
        raise UserError(f"{who} needs the momentum encoder; set momentum=MomentumConfig(decay=0.999)")
