"""``vlp data world``: draw a synthetic data set of coloured shapes."""

from __future__ import annotations

import argparse
import os

from vlp.files import local_path


def add_parsers(actions) -> None:
    world = actions.add_parser(
        "world",
        help="draw and pack a synthetic world of coloured shapes, without a download",
        epilog="example: vlp data world data/world --train 2000",
    )
    world.add_argument("folder", type=local_path)
    world.add_argument(
        "--train", type=int, default=10_000, help="training scenes; even, as they come in pairs (default: %(default)s)"
    )
    world.add_argument(
        "--val", type=int, default=1000, help="validation scenes; even, as they come in pairs (default: %(default)s)"
    )
    world.add_argument(
        "--noise", type=float, default=0.0, help="fraction of training captions that are swapped (default: 0)"
    )
    world.add_argument("--size", type=int, default=64, help="side of an image in pixels (default: %(default)s)")
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
        f"questions.jsonl, statements.jsonl, grounding.jsonl and pairs.jsonl in {options.folder}"
    )
    return 0
