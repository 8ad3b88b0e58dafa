"""Does evaluation data hold pictures that a run was trained on? By their bytes; `vlp data dedup` looks at pixels too."""

from __future__ import annotations

from pathlib import Path

from vlp.config import Data
from vlp.data.dedup import Collection, Files, Shards, same_bytes
from vlp.data.shards import Source
from vlp.errors import UserError

MOST = 1_000_000  # training pictures whose indexes are read for this


def leaked(task, data: Data, allow: bool) -> int | None:
    """How many of the pictures that ``task`` is to evaluate are in the training shards of a run; None = it cannot be told.

    It cannot where there is no run, its shards are no longer at hand, are remote or hold more than `MOST` pictures, or the task does
    not say which pictures it evaluates. Shards that the run was trained on may be evaluated as a whole, which the number then
    says: nobody takes that for held-out data.

    Args:
        task: with ``evaluated(data)``: the location of shards, or the paths of pictures.
        data: of the run.
        allow: give the number, whatever it is.

    Raises:
        UserError: if some are and ``allow`` is False.
    """
    sources = [source.shards for source in data.train if isinstance(source, Source)]
    if not hasattr(task, "evaluated") or not sources or any("://" in shards for shards in sources):
        return None
    of_task = task.evaluated(data)
    if isinstance(of_task, str) and any(Path(of_task).resolve() == Path(shards).resolve() for shards in sources):
        return len(Shards(of_task))
    try:
        trained = [Shards(shards) for shards in sources]
    except UserError:  # the run has moved, or its data has
        return None
    if sum(map(len, trained)) > MOST:
        return None
    asked: Collection = Shards(of_task) if isinstance(of_task, str) else Files(of_task)
    found = {number: (shards, other) for shards in trained for number, other in same_bytes(asked, shards)}
    if found and not allow:
        number, (shards, other) = min(found.items(), key=lambda item: item[0])
        raise UserError(
            f"{len(found):,} of the {len(asked):,} pictures to evaluate were trained on, the first {asked.name(number)} as "
            f"{shards.name(other)} of {shards.reader.location}; evaluate others, or say allow_leak=true"
        )
    return len(found)
