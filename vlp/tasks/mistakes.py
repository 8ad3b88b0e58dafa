"""What a report shows of annotated lines that a model has wrong: the lines, and what it takes for what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlp.data.annotated import Annotated
from vlp.data.shards import RawSample

SHOWN = 100  # lines
PAIRS = 20


def mistakes(source: Annotated, wrong: Sequence[tuple[RawSample, str, str]]) -> dict[str, Any]:
    """``wrong``, the first lines of (line, what was said, what is true), and ``pictures``, where the names of theirs lead to."""
    return {
        "pictures": source.images or str(Path(source.path).parent),
        "wrong": [
            {
                "line": line.key,
                "asked": " ".join(line.captions),
                "said": said,
                "true": true,
                "pictures": [line.meta[field] for field in source.image],
            }
            for line, said, true in wrong[:SHOWN]
        ],
    }


def mixed_up(said: Sequence[str], true: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs that are mixed up most often, as `vlp.tasks.probe.confused` has them of classes."""
    of = Counter(true)
    pairs = Counter((t, s) for t, s in zip(true, said) if t != s)
    return [{"true": t, "guessed": s, "count": n, "of": of[t]} for (t, s), n in pairs.most_common(PAIRS)]
