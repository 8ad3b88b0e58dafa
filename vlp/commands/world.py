"""``vlp data world``: draw a synthetic data set of coloured shapes."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

from vlp.errors import UserError
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
    world.add_argument(
        "--objects", type=int, nargs="+", choices=range(2, 7), help="numbers of things in a scene (default: 2 3)"
    )
    world.add_argument(
        "--relations",
        nargs="+",
        choices=("left of", "above", "inside"),
        help="relations of things, each with its inverse; only four shapes have room for another one inside, so scenes "
        "of more than four things need the other two (default: all)",
    )
    world.add_argument(
        "--combinations",
        choices=("all", "seen", "novel"),
        default="all",
        help="colours and shapes that go together: seen leaves out a quarter, and novel scenes have one of these "
        "(default: %(default)s)",
    )
    world.add_argument(
        "--val-combinations", choices=("all", "seen", "novel"), help="those of val (default: as --combinations)"
    )
    world.add_argument("--size", type=int, default=64, help="side of an image in pixels (default: %(default)s)")
    world.add_argument(
        "--single",
        type=int,
        default=0,
        help="also draw this many images of single things, and a tenth as many to evaluate, in FOLDER/single: an image "
        "tower learns shapes and colours from their labels (default: none)",
    )
    world.add_argument("--seed", type=int, default=0)
    world.set_defaults(run=run_world)


def run_world(options: argparse.Namespace) -> int:
    from vlp.data.world import World, make, make_single
    from vlp.tasks.progress import progress_bar

    if options.single < 0:
        raise UserError(f"--single {options.single} is not possible; give the number of images")
    given = {"objects": options.objects, "relations": options.relations}
    given = {name: tuple(value) for name, value in given.items() if value is not None}
    world = World(options.size, combinations=options.combinations, **given)
    val_world = replace(world, combinations=options.val_combinations or options.combinations)
    rest = {"seed": options.seed, "workers": os.cpu_count() or 1}
    with progress_bar("drawing and packing") as progress:
        numbers = {"train": options.train, "val": options.val, "noise": options.noise}
        make(options.folder, world, **numbers, val_world=val_world, **rest, progress=progress)
    if options.single:
        val = max(1, options.single // 10)
        with progress_bar("drawing and packing single things") as progress:
            make_single(options.folder / "single", world, train=options.single, val=val, **rest, progress=progress)
    print(
        f"{options.train:,} samples in {options.folder / 'train'}, {options.val:,} in {options.folder / 'val'}, "
        f"questions.jsonl, statements.jsonl, grounding.jsonl and pairs.jsonl in {options.folder}"
    )
    if options.single:
        print(
            f"{options.single:,} images of single things in {options.folder / 'single' / 'train'}, {val:,} to evaluate"
        )
    return 0
