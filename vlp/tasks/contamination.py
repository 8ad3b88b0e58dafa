"""Contamination: images of an evaluation that the run was trained on, found by their bytes.

`vlp data dedup` also compares pixels.
"""

from __future__ import annotations

from pathlib import Path

from vlp.config import Data
from vlp.data.preparing.dedup import AnnotatedCollection, Collection, FileCollection, ShardCollection, same_bytes
from vlp.data.reading.annotated import Annotated, AnnotatedReader
from vlp.data.reading.locations import is_remote
from vlp.data.reading.sentences import Sentences
from vlp.data.reading.shards import Source
from vlp.data.reading.tables import read_json
from vlp.data.reading.tar_streams import WebDatasetStream
from vlp.errors import UserError
from vlp.files import local_path
from vlp.tasks.base import Task
from vlp.tasks.identity import Images

MAX_IMAGES = 1_000_000  # training images, of which only the indexes are read
MAX_NAMED = 20_000  # images that annotations name, which must be read themselves


def has_training_data(run: Path, data: Data) -> bool:
    """Return whether the sources that a run names are still those that it was trained on.

    They are other ones where a relative path is read in another folder, and after the data were replaced.

    Args:
        run: Folder of the run, whose data.json has the fingerprints of its sources. Without it they are taken on trust.
        data: Data settings of the run.
    """
    if not (run / "data.json").is_file():
        return True
    try:
        fingerprints = read_json(run / "data.json")
        readers = [source.open() for source in data.train if not _is_taken_on_trust(source)]
    except UserError:
        return False
    known = fingerprints if isinstance(fingerprints, list) else []
    return all(reader.fingerprint() in known for reader in readers)


def _is_taken_on_trust(source: Source | Annotated | Sentences | WebDatasetStream) -> bool:
    return isinstance(source, WebDatasetStream) or is_remote(source.location)


def contaminated_images(task: Task, data: Data, allow: bool) -> int | None:
    """Count the images of an evaluation that are among the training images of the run.

    Shards that the run was trained on may be evaluated as a whole. The count then equals the number of images, which nobody
    takes for held-out data.

    Args:
        data: Data settings of the run.
        allow: Return the count instead of raising.

    Returns:
        The count, or None if it is not known: there is no run; its data are remote, have moved, or are more than `MAX_IMAGES`
        and `MAX_NAMED`; or the task does not tell its images.

    Raises:
        UserError: if there are such images and ``allow`` is False.
    """
    sources = [source for source in data.train if isinstance(source, (Source, Annotated))]
    if not sources or (evaluated := task.evaluated_images(data)) is None:
        return None
    if any("://" in (source.shards if isinstance(source, Source) else source.images or "") for source in sources):
        return None
    shards = [local_path(source.shards).resolve() for source in sources if isinstance(source, Source)]
    if isinstance(evaluated, str) and local_path(evaluated).resolve() in shards:
        return len(ShardCollection(evaluated))
    asked = _collection(evaluated)
    try:
        trained = [_collection(source.shards if isinstance(source, Source) else source.open()) for source in sources]
    except UserError:  # the training data have moved
        return None
    named = sum(len(images) for images in (asked, *trained) if isinstance(images, AnnotatedCollection))
    if sum(map(len, trained)) > MAX_IMAGES or named > MAX_NAMED:
        return None
    found = {number: (images, other) for images in trained for number, other in same_bytes(asked, images)}
    if found and not allow:
        number, (images, other) = min(found.items(), key=lambda item: item[0])
        raise UserError(
            f"{len(found):,} of the {len(asked):,} images to evaluate were trained on, the first {asked.name(number)} as "
            f"{images.name(other)}; evaluate others, or say allow_contamination=true"
        )
    return len(found)


def _collection(images: Images) -> Collection:
    if isinstance(images, str):
        return ShardCollection(images)
    return AnnotatedCollection(images) if isinstance(images, AnnotatedReader) else FileCollection(images)
