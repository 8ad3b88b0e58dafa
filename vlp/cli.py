"""``vlp``: the commands that a user types. Bad input ends in one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from pathlib import Path

from vlp.commands import ablate, configs, evaluate, gradcam, report, serve, show, train
from vlp.commands.annotations import add_annotation_commands
from vlp.commands.dedup import add_dedup_command
from vlp.commands.progress import progress_bar
from vlp.commands.texts import add_text_commands
from vlp.commands.world import add_world_command
from vlp.errors import UserError

# what a full or forbidden disk answers, to the write of a log line too
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are the parallelism
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except UserError as e:
        print(f"vlp: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    except OSError as e:
        if e.errno not in REFUSED:
            raise
        where = f"{e.filename}: " if e.filename else ""
        print(f"vlp: {where}{e.strerror}; free some space, or choose a folder that is yours", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vlp: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlp", description="Vision-language pre-training.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train.add_parser(commands)
    evaluate.add_parser(commands)
    gradcam.add_parser(commands)

    ablate.add_parser(commands)
    report.add_parser(commands)
    serve.add_parser(commands)

    show.add_parser(commands)
    configs.add_parser(commands)
    add_data_commands(
        commands.add_parser("data", help="make and inspect shards").add_subparsers(required=True, metavar="ACTION")
    )
    return parser


def add_data_commands(actions) -> None:
    pack = actions.add_parser("pack", help="image-text pairs -> shards")
    pack.add_argument(
        "annotations",
        help="CSV, TSV, JSONL, Karpathy json, COCO captions json, ALBEF json list, or a folder with a jsonl",
    )
    pack.add_argument("folder", type=Path, help="where the shards go")
    pack.add_argument(
        "--image-root", type=Path, help="folder that image paths start from (default: that of the annotations)"
    )
    pack.add_argument(
        "--format", choices=("csv", "tsv", "jsonl", "karpathy", "coco", "albef"), help="default: found out"
    )
    pack.add_argument("--split", help="only this split, where the annotations have one")
    pack.add_argument("--shard-samples", type=int, default=1000)
    pack.add_argument("--max-side", type=int, help="scale larger pictures down to this many pixels")
    pack.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    pack.set_defaults(run=run_pack)

    check = actions.add_parser("check", help="count samples, dead images, duplicate keys; verify checksums")
    check.add_argument("shards")
    check.set_defaults(run=run_check)

    stats = actions.add_parser("stats", help="sizes, caption lengths, a grid of samples as PNG")
    stats.add_argument("shards")
    stats.add_argument("--grid", type=Path, default=Path("samples.png"))
    stats.set_defaults(run=run_stats)

    tokenizer = actions.add_parser("tokenizer", help="train a WordPiece tokenizer on the captions of shards")
    tokenizer.add_argument("shards")
    tokenizer.add_argument("folder", type=Path, help="where the tokenizer goes")
    tokenizer.add_argument("--vocab-size", type=int, default=8000)
    tokenizer.set_defaults(run=run_tokenizer)

    demo = actions.add_parser("demo", help="draw and pack the demo's pictures and names (extra 'demo')")
    demo.add_argument("folder", type=Path)
    demo.add_argument(
        "--hold-out",
        choices=("emoji", "motif"),
        default="emoji",
        help="split by base emoji (default), or so that a drawing's variants (man, woman, person) are on one side too",
    )
    demo.set_defaults(run=run_demo_data)

    add_annotation_commands(actions)
    add_dedup_command(actions)
    add_text_commands(actions)
    add_world_command(actions)


def run_pack(options: argparse.Namespace) -> int:
    from vlp.data.preparing.formats import read_pairs
    from vlp.data.preparing.pack import Packing, pack

    if options.image_root and not options.image_root.is_dir():
        raise UserError(f"--image-root {options.image_root} is not a folder; give the one that image paths start from")
    packing = Packing(options.shard_samples, options.max_side)
    pairs = list(read_pairs(options.annotations, options.image_root, options.format, options.split))
    with progress_bar("packing") as progress:
        manifest = pack(pairs, options.folder, packing, options.workers, progress)
    print(f"{manifest['samples']:,} samples in {len(manifest['shards'])} shards in {options.folder}")
    if manifest["left_out"]:
        print(f"{manifest['left_out']} left out, see {options.folder}/quarantine.jsonl")
    return 0


def run_check(options: argparse.Namespace) -> int:
    from vlp.data.preparing.inspect import check, to_lines

    with progress_bar("checking") as progress:
        found = check(options.shards, progress=progress)
    print("\n".join(to_lines(found)))
    return 0 if found.whole else 1


def run_stats(options: argparse.Namespace) -> int:
    from vlp.data.preparing.inspect import stats

    print(json.dumps(stats(options.shards, options.grid), indent=1))
    print(f"wrote {options.grid}")
    return 0


def run_tokenizer(options: argparse.Namespace) -> int:
    from vlp.data.preparing.inspect import all_captions
    from vlp.data.text import train_tokenizer

    if options.vocab_size < 6:
        raise UserError(f"--vocab-size {options.vocab_size}: five tokens are special ones; give more, such as 8000")
    captions = list(all_captions(options.shards))
    if not captions:
        raise UserError(f"the shards at {options.shards} hold no caption; run `vlp data check` on them")
    tokenizer = train_tokenizer(captions, options.vocab_size)
    try:
        tokenizer.save(options.folder)
    except OSError as e:
        raise UserError(f"cannot write {options.folder}: {e.strerror or e}; check the folder") from None
    print(f"{tokenizer.vocab_size:,} tokens in {options.folder}; use it with data.tokenizer={options.folder}")
    return 0


def run_demo_data(options: argparse.Namespace) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
