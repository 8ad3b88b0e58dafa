"""``vlp data dedup``: pictures that stand twice in shards, or that evaluation data shares with them."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from vlp.errors import UserError

SHOWN = 10


def add_dedup_command(actions) -> None:
    dedup = actions.add_parser("dedup", help="pictures that stand twice, or that evaluation data shares with training")
    dedup.add_argument("shards", help="shards, or a folder of pictures")
    dedup.add_argument(
        "--against",
        metavar="SHARDS_OR_FOLDER",
        help="look for pictures of SHARDS that are in these too, e.g. a test set",
    )
    dedup.add_argument("--output", type=Path, metavar="FILE.jsonl", help="also write every pair found, a line each")
    dedup.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    dedup.set_defaults(run=run_dedup)


def run_dedup(options: argparse.Namespace) -> int:
    """0 where there is none, 1 where there are some."""
    from vlp.commands.progress import progress_bar
    from vlp.data.preparing.dedup import find_twins, open_collection
    from vlp.data.reading.shards import write_atomically

    a = open_collection(options.shards)
    b = open_collection(options.against) if options.against else None
    with progress_bar("looking at pictures") as progress:
        twins, bad = find_twins(a, b, max(1, options.workers), progress)
    count = {by: sum(twin.by == by for twin in twins) for by in ("bytes", "pixels")}
    where = f"are in {options.against} too" if b else "stood before"
    print(
        f"{len(a):,} pictures of {options.shards}: {count['bytes']:,} {where} by their bytes, {count['pixels']:,} more by their pixels"
    )
    if bad:
        print(f"{bad:,} could not be decoded and were compared by their bytes alone")
    for twin in twins[:SHOWN]:
        print(f"  {twin.first} = {twin.second} ({twin.by})")
    if len(twins) > SHOWN:
        print(f"  and {len(twins) - SHOWN:,} more{'' if options.output else '; --output FILE.jsonl lists all'}")
    if options.output:
        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(options.output, "".join(json.dumps(asdict(twin)) + "\n" for twin in twins).encode())
        except OSError as e:
            raise UserError(f"cannot write {options.output}: {e.strerror or e}; give another --output") from None
        print(f"wrote {options.output}")
    return 1 if twins else 0
