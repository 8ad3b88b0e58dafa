"""Names of data sets, protocols and result files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from vlp.data.reading.shards import Source
from vlp.specs.fields import setting_of
from vlp.tasks.base import EvalModel

LONGEST = 100  # characters of a file name, some of which a file system limits to 255 bytes
SPLITS = ("train", "val", "valid", "validation", "dev", "test", "minival")


def data_name(location: str) -> str:
    """Return a short name of a data set: ``data/flickr8k/val`` is flickr8k-val, ``coco/{000..9}.tar`` is coco."""
    parts = [part for part in Path(location).parts if not part.endswith(".tar") and not set(part) & set("*?{}[]/")]
    last = parts[-1] if parts else "data"
    return f"{parts[-2]}-{last}" if last in SPLITS and len(parts) > 1 else last


def protocol_name(model: EvalModel, location: str, setting: str | None) -> str:
    """Return data (without its split), setting and weights, e.g. ``flickr30k-zero-shot@coco-ft``.

    Args:
        location: Location of the evaluated data.
        setting: "zero-shot" or "fine-tuned". None means fine-tuned where the run was trained on data of the same name, and
            unstated elsewhere: data of another name may still be the same data.
    """

    def without_split(data: str) -> str:
        return re.sub(rf"[-_]({'|'.join(SPLITS)})$", "", data_name(data))

    trained_on = {
        without_split(source.shards if isinstance(source, Source) else source.path) for source in model.data.train
    }
    if setting is None and without_split(location) in trained_on:
        setting = "fine-tuned"
    return f"{without_split(location)}-{setting or 'unstated'}@{model.name or 'unnamed'}"


def result_name(name: str, task: Any, assignments: Sequence[str] = ()) -> str:
    """Return the name of the file that keeps the newest result of a task: its name, its data, and what else was changed.

    Args:
        task: The task, a dataclass.
        assignments: ``field=value`` as typed. Those that do not change the result are not part of the name.
    """
    minor = {declared.name for declared in fields(task) if not setting_of(declared).changes_result}
    given = {text.partition("=")[0]: text for text in assignments}
    data = given.pop("data", "").partition("=")[2]
    changed = [text for key, text in given.items() if key.split(".")[0] not in minor]
    found = re.sub(r"[^\w.,=+-]+", "_", "-".join(filter(None, (name, data and data_name(data), *changed))))
    if len(found) <= LONGEST:
        return found
    return f"{found[:LONGEST]}-{hashlib.sha256(found.encode()).hexdigest()[:8]}"
