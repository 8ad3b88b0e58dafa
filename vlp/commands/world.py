"""``vlp data world``: make a synthetic world."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_world_command(actions) -> None:
    """Adds it to the actions of ``vlp data``."""
    world = actions.add_parser("world", help="draw and pack a synthetic world of coloured shapes; needs no download")
    world.add_argument("folder", type=Path)
    world.add_argument(
        "--train", type=int, default=10_000, help="scenes (default: %(default)s); even, they come in pairs"
    )
    world.add_argument("--val", type=int, default=1000, help="scenes (default: %(default)s); likewise")
    world.add_argument(
        "--noise", type=float, default=0.0, help="share of train's captions that are swapped (default: 0)"
    )
    world.add_argument("--size", type=int, default=64, help="pixels of a picture's side (default: %(default)s)")
    world.add_argument("--seed", type=int, default=0)
    world.set_defaults(run=run_world)


def run_world(options: argparse.Namespace) -> int:
    from vlp.commands.progress import progress_bar
    from vlp.data.world import World, make

    world = World(options.size)
    with progress_bar("drawing and packing") as progress:
        make(
            options.folder,
            world,
            train=options.train,
            val=options.val,
            noise=options.noise,
            seed=options.seed,
            workers=os.cpu_count() or 1,
            progress=progress,
        )
    print(
        f"{options.train:,} samples in {options.folder / 'train'}, {options.val:,} in {options.folder / 'val'}, "
        f"questions.jsonl, statements.jsonl, grounding.jsonl and pairs.jsonl beside them"
    )
    return 0
