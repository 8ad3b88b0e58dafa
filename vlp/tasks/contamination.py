"""Does evaluation data hold pictures that a run was trained on? By their bytes; `vlp data dedup` looks at pixels too."""

from __future__ import annotations

from vlp.config import Data
from vlp.data.preparing.dedup import AnnotatedCollection, Collection, FileCollection, ShardCollection, same_bytes
from vlp.data.reading.annotated import Annotated, AnnotatedReader
from vlp.data.reading.shards import Source
from vlp.errors import UserError
from vlp.files import local_path
from vlp.tasks.base import Images, Task

MOST = 1_000_000  # training pictures whose indexes are read for this
MOST_NAMED = 20_000  # pictures of annotations, which are read themselves


def contaminated_images(task: Task, data: Data, allow: bool) -> int | None:
    """How many of the pictures that ``task`` is to evaluate were among the training pictures of a run; None = it cannot be told.

    It cannot where there is no run, its data are no longer at hand, are remote or more than `MOST` and `MOST_NAMED`, or the task does
    not say which pictures it evaluates. Shards that the run was trained on may be evaluated as a whole, which the number then
    says: nobody takes that for held-out data.

    Args:
        task: with ``evaluated(data)``: the location of shards, the paths of pictures, or annotations that name them.
        data: of the run.
        allow: give the number, whatever it is.

    Raises:
        UserError: if some are and ``allow`` is False.
    """
    sources = [source for source in data.train if isinstance(source, (Source, Annotated))]
    if not sources or (of_task := task.evaluated_images(data)) is None:
        return None
    if any("://" in (source.shards if isinstance(source, Source) else source.images or "") for source in sources):
        return None
    shards = [local_path(source.shards).resolve() for source in sources if isinstance(source, Source)]
    if isinstance(of_task, str) and local_path(of_task).resolve() in shards:
        return len(ShardCollection(of_task))
    asked = _pictures(of_task)
    try:
        trained = [_pictures(source.shards if isinstance(source, Source) else source.open()) for source in sources]
    except UserError:  # the run has moved, or its data has
        return None
    named = sum(len(pictures) for pictures in (asked, *trained) if isinstance(pictures, AnnotatedCollection))
    if sum(map(len, trained)) > MOST or named > MOST_NAMED:
        return None
    found = {number: (pictures, other) for pictures in trained for number, other in same_bytes(asked, pictures)}
    if found and not allow:
        number, (pictures, other) = min(found.items(), key=lambda item: item[0])
        raise UserError(
            f"{len(found):,} of the {len(asked):,} pictures to evaluate were trained on, the first {asked.name(number)} as "
            f"{pictures.name(other)}; evaluate others, or say allow_contamination=true"
        )
    return len(found)


def _pictures(of: Images) -> Collection:
    if isinstance(of, str):
        return ShardCollection(of)
    return AnnotatedCollection(of) if isinstance(of, AnnotatedReader) else FileCollection(of)
