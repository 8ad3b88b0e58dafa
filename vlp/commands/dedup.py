"""``vlp data dedup``: find duplicate images within shards, or between shards and evaluation data."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict

from vlp.errors import UserError
from vlp.files import local_path

MAX_PRINTED = 10


def add_parsers(actions) -> None:
    dedup = actions.add_parser(
        "dedup",
        help="find duplicate images, also between training and evaluation data",
        epilog="example: vlp data dedup shards/train --against shards/val",
    )
    dedup.add_argument("shards", help="shards, or a folder of images")
    dedup.add_argument(
        "--against",
        metavar="SHARDS_OR_FOLDER",
        help="find the images of SHARDS that are in this data too, e.g. in a test set",
    )
    dedup.add_argument(
        "--output", type=local_path, metavar="FILE.jsonl", help="write every pair of duplicates, one per line"
    )
    dedup.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per CPU)")
    dedup.set_defaults(run=run_dedup)


def run_dedup(options: argparse.Namespace) -> int:
    """Return 0 without duplicates, 1 with duplicates."""
    from vlp.data.preparing.dedup import find_twins, open_collection
    from vlp.data.workers import most_workers
    from vlp.files import write_atomically
    from vlp.tasks.progress import progress_bar

    a = open_collection(options.shards)
    b = open_collection(options.against) if options.against else None
    with progress_bar("comparing images") as progress:
        twins, bad = find_twins(a, b, most_workers(options.workers, len(a)), progress)
    count = {by: sum(twin.by == by for twin in twins) for by in ("bytes", "pixels")}
    where = f"are in {options.against} too" if b else "duplicate an earlier image"
    print(
        f"{len(a):,} images of {options.shards}: {count['bytes']:,} {where} by their bytes, "
        f"{count['pixels']:,} more by their pixels"
    )
    if bad:
        print(f"{bad:,} could not be decoded and were compared only by their bytes")
    for twin in twins[:MAX_PRINTED]:
        print(f"  {twin.first} = {twin.second} ({twin.by})")
    if len(twins) > MAX_PRINTED:
        print(f"  and {len(twins) - MAX_PRINTED:,} more{'' if options.output else '; --output FILE.jsonl lists all'}")
    if options.output:
        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(options.output, "".join(json.dumps(asdict(twin)) + "\n" for twin in twins).encode())
        except OSError as e:
            raise UserError(f"cannot write {options.output}: {e.strerror or e}; give another --output") from None
        print(f"wrote {options.output}")
    return 1 if twins else 0
