"""Files that commands write from the rows of other files: the usable rows, and a list of those that are not."""

from __future__ import annotations

import json
from pathlib import Path

from vlp.errors import UserError
from vlp.files import write_atomically

MOST_SHOWN = 3


def write_output(path: Path, text: str) -> None:
    """Write a file and the folders above it. Raises UserError if that is impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode(errors="replace"))
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; check the folder") from None


def report_skipped(output: Path, bad: list[dict]) -> None:
    """Write the quarantine entries of unusable rows next to ``output``, and print their number and the first of them.

    The file of an earlier run is removed if there is none.
    """
    path = output.with_name(f"{output.stem}.quarantine.jsonl")
    if not bad:
        path.unlink(missing_ok=True)
        return
    write_output(path, "".join(json.dumps(entry) + "\n" for entry in bad))
    print(f"{len(bad):,} rows skipped, see {path}")
    for entry in bad[:MOST_SHOWN]:
        print(f"  {entry['source']}:{entry['key']}: {entry['reason']}")
