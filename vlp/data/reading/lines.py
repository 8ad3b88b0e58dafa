"""A file of lines, by number: only where they begin is in memory, so that any line is read at the same cost."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path

import numpy as np

from vlp.errors import BadSample, UserError


class Lines:
    """The handle is opened when first needed, and not pickled.

    Attributes:
        bounds: (n, 2) int64, where each line begins and ends in the file, in bytes; may be cut down to some of the lines.
        sha256: of the file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            content = path.read_bytes()
        except OSError as e:
            raise UserError(f"{path} cannot be read ({e.strerror})") from None
        ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + 1
        at = np.concatenate([[0], ends, [] if content.endswith(b"\n") or not content else [len(content)]])
        self.bounds = np.stack([at[:-1], at[1:]], 1).astype(np.int64)
        self.sha256 = hashlib.sha256(content).hexdigest()

    @cached_property
    def _file(self):
        return open(self.path, "rb")

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, number: int) -> str:
        begin, end = self.bounds[number].tolist()
        text = os.pread(self._file.fileno(), end - begin, begin).decode("utf-8-sig", errors="replace")
        return text.strip("\r\n")

    def record(self, number: int) -> dict:
        """A line of a .jsonl. Raises BadSample where it is no object."""
        try:
            record = json.loads(self[number])
        except (ValueError, RecursionError) as e:
            raise BadSample(f"json does not parse ({e})") from None
        if not isinstance(record, dict):
            raise BadSample("json is not an object")
        return record

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_file"}
