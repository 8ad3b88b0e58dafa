"""Names of data sets, protocols and result files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from vlp.data.reading.locations import is_remote
from vlp.errors import UserError
from vlp.files import RESULT_BYTES, local_path, read_regular
from vlp.specs.fields import setting_of
from vlp.tasks.base import EvalModel, Result

LONGEST = 100  # bytes of a file name, which a file system limits to 255, before a hash and a suffix are added
SPLITS = ("train", "val", "valid", "validation", "dev", "test", "minival")
# names of folders and files that many data sets share, so that they need the name of the folder above
GENERIC = (
    *SPLITS,
    *(f"{split}.jsonl" for split in SPLITS),
    "shards",
    "data",
    "images",
    "annotations",
    "labels",
    "captions",
    "tars",
    "wds",
    "webdataset",
)
TASK_NAME = re.compile(r"\w[\w.,=+ -]{0,99}")


def check_task_names(tasks: Mapping[str, Any]) -> None:
    """Check that the keys of an experiment's ``evaluate`` are plain names, which become names of files.

    Raises:
        UserError: For the first one that is not, such as a path.
    """
    for name in tasks:
        if not TASK_NAME.fullmatch(name):
            raise UserError(
                f"evaluate has the name {name[:200]!r}; give one of up to 100 letters, digits and -, without /"
            )


def data_name(location: str, shared: Sequence[str] = SPLITS) -> str:
    """Return a short name of a data set: ``data/flickr8k/val`` is flickr8k-val, ``coco/{000..9}.tar`` is coco.

    Args:
        shared: Names that many data sets have in common. They are given together with the name of the folder above.
    """
    return "+".join(dict.fromkeys(_name(part, shared) for part in location.split("::") if part)) or "data"


def _name(location: str, shared: Sequence[str]) -> str:
    parts, name = _parts(location), []
    while parts and (not name or name[0].lower() in shared):
        name.insert(0, parts.pop())
    return "-".join(name) or "data"


def _parts(location: str) -> list[str]:
    """Return the folders of an absolute location, without names of shards and patterns."""
    path = location if is_remote(location) else os.path.abspath(local_path(location))
    return [part for part in Path(path).parts if not part.endswith(".tar") and not set(part) & set("*?{}[]/:")]


def _roots(location: str) -> set[tuple[str, ...]]:
    """Return the absolute folders of a data set, without its split: those of ``x/train`` and of ``x/val`` are equal."""
    parts = [_parts(part) for part in location.split("::") if part]
    without = (each[:-1] if each and each[-1].lower() in SPLITS else each for each in parts)
    suffix = re.compile(rf"[-_]({'|'.join(SPLITS)})(?=$|\.)")
    return {(*each[:-1], suffix.sub("", each[-1])) for each in without if each}


def protocol_name(model: EvalModel, location: str, setting: str | None) -> str:
    """Return data with its split, setting and weights, e.g. ``flickr30k-test-zero-shot@coco-ft``.

    Args:
        location: Location of the evaluated data.
        setting: "zero-shot" or "fine-tuned". None means fine-tuned where the run was trained on data in the same folder,
            e.g. on its split train, and unstated elsewhere: data in another folder may still be the same data.
    """
    sources = model.data.train if model.has_training_data else ()
    trained_on = set().union(*(_roots(source.location) for source in sources))
    if setting is None and _roots(location) <= trained_on:
        setting = "fine-tuned"
    return f"{data_name(location, GENERIC)}-{setting or 'unstated'}@{model.name or 'unnamed'}"


def minor_fields(task: Any) -> set[str]:
    """Return the fields of a task, or of its class, that do not change its result."""
    return {declared.name for declared in fields(task) if not setting_of(declared).changes_result}


def result_name(name: str, task: Any, assignments: Sequence[str] = (), before: Any = None) -> str:
    """Return the name of the file that keeps the newest result of a task: its name, its data, and what else was changed.

    Args:
        name: Name of the task.
        task: The task, a dataclass.
        assignments: ``field=value`` as typed. Those that do not change the result are not part of the name.
        before: The task before the assignments. One that leaves a value as it was is not part of the name.
    """
    minor = minor_fields(task)
    if before is not None:
        minor |= {name for name, value in vars(before).items() if vars(task)[name] == value}
    given = {text.partition("=")[0]: text for text in assignments}
    data = given.pop("data", "").partition("=")[2]
    changed = [text for key, text in given.items() if key.split(".")[0] not in minor]
    found = re.sub(r"[^\w.,=+-]+", "_", "-".join(filter(None, (name, data and data_name(data), *changed))))
    if len(found.encode()) <= LONGEST:
        return found
    digest = hashlib.sha256(found.encode()).hexdigest()[:8]
    return f"{found.encode()[:LONGEST].decode(errors='ignore')}-{digest}"


def result_path(folder: Path, name: str, result: Result) -> Path:
    """Return the file of a result: ``NAME.json``, or ``NAME-ID.json`` if that has a result of other data.

    Args:
        folder: Folder of the results.
        name: See `result_name`.
        result: The result.
    """
    path = folder / f"{name}.json"
    try:
        earlier = json.loads(read_regular(path, RESULT_BYTES))
    except (OSError, ValueError, RecursionError):  # no result, or a damaged one, which is replaced
        return path
    if not isinstance(earlier, dict) or not isinstance(earlier.get("data"), str):
        return path
    # results of earlier versions have no identity
    same = earlier["data_id"] == result.data_id if earlier.get("data_id") else earlier["data"] == result.data
    return path if same else folder / f"{name}-{result.data_id[:8]}.json"
