"""``vlp data``: make and inspect shards."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from vlp.commands import annotations, dedup, texts, world
from vlp.errors import UserError
from vlp.files import local_path
from vlp.tasks.progress import progress_bar


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "data", help="make and inspect shards", epilog="example: vlp data pack captions.csv shards/train"
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for add in (add_pack, add_check, add_stats, add_tokenizer, add_demo):
        add(actions)
    for module in (annotations, dedup, texts, world):
        module.add_parsers(actions)


def add_pack(actions) -> None:
    pack = actions.add_parser(
        "pack",
        help="pack image-text pairs into shards",
        epilog="example: vlp data pack captions.csv shards/train --image-root photos",
    )
    pack.add_argument(
        "annotations",
        help="CSV, TSV, JSONL, Karpathy json, COCO captions json, ALBEF json list, or a folder with a jsonl",
    )
    pack.add_argument("folder", type=local_path, help="folder to write the shards to")
    pack.add_argument(
        "--image-root",
        type=local_path,
        help="folder that image paths are relative to (default: that of the annotations)",
    )
    pack.add_argument(
        "--format", choices=("csv", "tsv", "jsonl", "karpathy", "coco", "albef"), help="default: detected"
    )
    pack.add_argument("--split", help="pack only this split of the annotations")
    pack.add_argument("--shard-samples", type=int, default=1000, help="samples of a shard (default: %(default)s)")
    pack.add_argument("--max-side", type=int, help="scale larger images down to this many pixels")
    pack.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per CPU)")
    pack.set_defaults(run=run_pack)


def run_pack(options: argparse.Namespace) -> int:
    from vlp.data.preparing.formats import read_pairs
    from vlp.data.preparing.pack import Packing, pack

    if options.image_root and not options.image_root.is_dir():
        raise UserError(f"--image-root {options.image_root} is not a folder; give the one that image paths start from")
    packing = Packing(options.shard_samples, options.max_side)
    pairs = read_pairs(options.annotations, options.image_root, options.format, options.split)
    with progress_bar("packing") as progress:
        manifest = pack(pairs, options.folder, packing, options.workers, progress)
    print(f"{manifest['samples']:,} samples in {len(manifest['shards'])} shards in {options.folder}")
    if manifest["left_out"]:
        print(f"{manifest['left_out']} left out, see {options.folder}/quarantine.jsonl")
    return 0


def add_check(actions) -> None:
    check = actions.add_parser(
        "check",
        help="count samples, undecodable images and duplicate keys; verify checksums",
        epilog="example: vlp data check shards/train",
    )
    check.add_argument("shards")
    check.set_defaults(run=run_check)


def run_check(options: argparse.Namespace) -> int:
    """Return 0 if the shards are undamaged, 1 if not."""
    from vlp.data.preparing.inspect import check, to_lines

    with progress_bar("checking") as progress:
        found = check(options.shards, progress=progress)
    print("\n".join(to_lines(found)))
    return 0 if found.whole else 1


def add_stats(actions) -> None:
    stats = actions.add_parser(
        "stats",
        help="print image sizes and caption lengths; draw a grid of samples as PNG",
        epilog="example: vlp data stats shards/train --grid samples.png",
    )
    stats.add_argument("shards")
    stats.add_argument("--grid", type=local_path, default=Path("samples.png"))
    stats.set_defaults(run=run_stats)


def run_stats(options: argparse.Namespace) -> int:
    from vlp.data.preparing.inspect import stats

    with progress_bar("reading samples") as progress:
        found = stats(options.shards, options.grid, progress=progress)
    print(json.dumps(found, indent=1))
    print(f"wrote {options.grid}")
    return 0


def add_tokenizer(actions) -> None:
    tokenizer = actions.add_parser(
        "tokenizer",
        help="train a WordPiece tokenizer on the captions of shards",
        epilog="example: vlp data tokenizer shards/train tokenizer --vocab-size 8000",
    )
    tokenizer.add_argument("shards")
    tokenizer.add_argument("folder", type=local_path, help="folder to write the tokenizer to")
    tokenizer.add_argument("--vocab-size", type=int, default=8000, help="tokens (default: %(default)s)")
    tokenizer.set_defaults(run=run_tokenizer)


def run_tokenizer(options: argparse.Namespace) -> int:
    from vlp.data.preparing.inspect import all_captions
    from vlp.data.text import train_tokenizer

    if options.vocab_size < 6:
        raise UserError(f"--vocab-size {options.vocab_size}: five tokens are special ones; give more, such as 8000")
    with progress_bar("reading captions") as progress:
        captions = list(all_captions(options.shards, progress))
    if not captions:
        raise UserError(f"the shards at {options.shards} have no captions; run `vlp data check` on them")
    tokenizer = train_tokenizer(captions, options.vocab_size)
    try:
        tokenizer.save(options.folder)
    except OSError as e:
        raise UserError(f"cannot write {options.folder}: {e.strerror or e}; check the folder") from None
    print(f"{tokenizer.vocab_size:,} tokens in {options.folder}; use it with data.tokenizer={options.folder}")
    return 0


def add_demo(actions) -> None:
    demo = actions.add_parser(
        "demo",
        help="draw and pack the demo's images and names (extra 'demo')",
        epilog="example: vlp data demo data/openmoji --hold-out motif",
    )
    demo.add_argument("folder", type=local_path)
    demo.add_argument(
        "--hold-out",
        choices=("emoji", "motif"),
        default="emoji",
        help="split by base emoji (default), or by motif, which keeps the variants of a drawing (man, woman, person) together",
    )
    demo.set_defaults(run=run_demo)


def run_demo(options: argparse.Namespace) -> int:
    from vlp.data.preparing.demo import openmoji_pairs
    from vlp.data.preparing.formats import read_pairs
    from vlp.data.preparing.pack import pack

    openmoji_pairs(options.folder / "drawings", options.hold_out)
    for split in ("train", "val"):
        pairs = read_pairs(options.folder / "drawings" / f"{split}.jsonl")
        with progress_bar(f"packing {split}") as progress:
            manifest = pack(pairs, options.folder / split, workers=os.cpu_count() or 1, progress=progress)
        print(f"{manifest['samples']:,} samples in {options.folder / split}")
    return 0
