"""What objectives ask of an experiment before it is built: raised as a `UserError` that names the setting."""

from __future__ import annotations

from vlp.config import Data, Experiment
from vlp.data.reading.sentences import Sentences
from vlp.errors import UserError
from vlp.forward import Head


def has_pictures(data: Data) -> bool:
    """Whether any source does; texts alone may train a model that could take pictures, too."""
    return not data.train or any(not isinstance(source, Sentences) for source in data.train)


def need_image(experiment: Experiment, who: str) -> None:
    """Raises UserError where the model has no image tower, or the data no pictures."""
    model = experiment.model
    if getattr(model, "image", None) is None and getattr(model, "towers", None) is None:
        raise UserError(f"{who} needs an image tower; set model.image")
    if not has_pictures(experiment.data):
        raise UserError(f"{who} needs pictures, and data.train names files of texts alone; add shards")


def need_image_views(experiment: Experiment, who: str, count: int | None = 1) -> None:
    """Raises UserError unless there are pictures with ``count`` further views each; None = at least one."""
    need_image(experiment, who)
    views = len(experiment.data.views)
    if views < 1 or count not in (None, views):
        wanted = "at least one further view" if count is None else f"{count} further view{'s' * (count > 1)}"
        raise UserError(f"{who} needs {wanted} of each picture, not {views}; set data.views=(TRANSFORM,)")


def need_contrast(experiment: Experiment, who: str, head: Head = "first") -> None:
    """Raises UserError unless the model has both modalities, and that contrastive head."""
    need_image(experiment, who)
    need_text(experiment, who)
    if not getattr(experiment.model, "itc", True):
        raise UserError(f"{who} needs projections and a temperature; set model.itc=true")
    if head == "vl" and not getattr(experiment.model, "itc_vl", False):
        raise UserError(f"{who} with head='vl' needs a model with a second head; set head=first, or model.itc_vl=true")


def need_momentum(experiment: Experiment, who: str) -> None:
    """Raises UserError where no momentum encoder is kept."""
    if experiment.momentum is None:
        raise UserError(f"{who} needs the momentum encoder; set momentum=MomentumConfig(decay=0.999)")


def need_text(experiment: Experiment, who: str) -> None:
    """Raises UserError where the model has no text tower."""
    model = experiment.model
    if getattr(model, "text", None) is None and getattr(model, "towers", None) is None:
        raise UserError(f"{who} needs a text tower; set model.text")


def need_text_views(experiment: Experiment, who: str) -> None:
    """Raises UserError unless there are texts with a further view each, from ``data.text_views`` or a second column."""
    need_text(experiment, who)
    columns = [
        1 if getattr(s, "join", None) is not None else len(getattr(s, "columns", ())) for s in experiment.data.train
    ]
    if not experiment.data.text_views and min(columns, default=0) < 2:
        raise UserError(f"{who} needs a further view of each text; set data.text_views=(VIEW,), or give two columns")
