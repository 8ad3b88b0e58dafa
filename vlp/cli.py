"""``vlp``: the commands that a user types. Bad input ends in one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path

from vlp.commands import configs, show
from vlp.commands.annotations import add_annotation_commands
from vlp.commands.dedup import add_dedup_command
from vlp.commands.progress import progress_bar
from vlp.commands.texts import add_text_commands
from vlp.commands.world import add_world_command
from vlp.errors import UserError

# what a full or forbidden disk answers, to the write of a log line too
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

# name of `vlp eval` -> its module and class, imported only when it runs
TASKS = {
    "retrieval": ("vlp.tasks.retrieval", "Retrieval"),
    "rerank": ("vlp.tasks.rerank", "Rerank"),
    "minimal-pairs": ("vlp.tasks.minimal_pairs", "MinimalPairs"),
    "zero-shot": ("vlp.tasks.zero_shot", "ZeroShot"),
    "knn": ("vlp.tasks.probe", "Knn"),
    "probe": ("vlp.tasks.probe", "LinearProbe"),
    "image-accuracy": ("vlp.tasks.image_accuracy", "ImageAccuracy"),
    "sts": ("vlp.tasks.sentence_similarity", "SentenceSimilarity"),
    "classification": ("vlp.tasks.annotated_classes", "Classes"),
    "vqa": ("vlp.tasks.vqa", "Vqa"),
    "captioning": ("vlp.tasks.captioning", "CaptionQuality"),
    "grounding": ("vlp.tasks.grounding", "Grounding"),
    "masked": ("vlp.tasks.masked", "MaskedPrediction"),
}


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

    train = commands.add_parser("train", help="train an experiment, or continue a run")
    train.add_argument(
        "config", nargs="?", help="a Python config, FILE.py:NAME for another function of it, or an experiment.json"
    )
    train.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.batch_size=256 optim.lr=5e-4")
    train.add_argument("--resume", metavar="RUN", help="continue this run folder where it stopped")
    train.set_defaults(run=run_train)

    evaluate = commands.add_parser("eval", help=f"evaluate a run, or published weights: {', '.join(TASKS)}")
    evaluate.add_argument(
        "what",
        metavar="RUN_OR_WEIGHTS",
        help="a run; a file of ALBEF's or VLMo's weights; a transformers folder (CLIP, ALIGN, SigLIP); open_clip:NAME/TAG_OR_FILE",
    )
    evaluate.add_argument("task", choices=TASKS)
    evaluate.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. data=shards/val ks=1,5,10 tokenizer=bert-base-uncased/"
    )
    evaluate.add_argument(
        "--checkpoint", metavar="STEP", help="of a run: a step, 'best' or 'last' (default: best if there is one)"
    )
    evaluate.set_defaults(run=run_eval)

    cam = commands.add_parser("gradcam", help="draw where the words of captions look in their pictures (ALBEF)")
    cam.add_argument("folder", metavar="RUN", type=Path)
    cam.add_argument("--data", metavar="SHARDS", help="pictures with captions (default: the run's data.val)")
    cam.add_argument("--words", default="", metavar="A,B", help="only captions with these words, and these words alone")
    cam.add_argument("--pictures", type=int, default=6, help="drawn at random (default: %(default)s)")
    cam.add_argument("--layer", type=int, help="of fusion, from 0 (default: a third of the way up)")
    cam.add_argument("--checkpoint", metavar="STEP", help="a step, 'best' or 'last' (default: best if there is one)")
    cam.add_argument("--output", type=Path, metavar="PNG", help="default: RUN/gradcam.png")
    cam.set_defaults(run=run_gradcam)

    ablate = commands.add_parser("ablate", help="train variants over seeds, and tabulate what each change is worth")
    ablate.add_argument("config", help="a Python config, or FILE.py:NAME, that returns a vlp.sweeps.ablation.Ablation")
    ablate.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. seeds=0,1 train.steps=100")
    ablate.set_defaults(run=run_ablate)

    report = commands.add_parser(
        "report", help="write RUN/report.html, or a page that compares all that is given: vlp report runs/*"
    )
    report.add_argument("folders", metavar="RUN", nargs="+", type=Path)
    report.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="of the page that compares several runs (default: runs/comparison)",
    )
    report.set_defaults(run=run_report)

    serve = commands.add_parser("serve", help="search pictures by words in the browser (extra 'serve')")
    serve.add_argument("folder", metavar="RUN")
    serve.add_argument("--data", metavar="SHARDS", help="pictures to search (default: the run's data.val)")
    serve.add_argument("--port", type=int, default=7860)
    serve.set_defaults(run=run_serve)

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


def run_train(options: argparse.Namespace) -> int:
    from vlp.config import Experiment, changed_keys, load_config, load_json
    from vlp.specs.overrides import override
    from vlp.sweeps.stages import Stages, train_stages
    from vlp.train import train

    # with --resume the config may be left out, and then the first override stands in its place
    config, overrides = options.config, options.overrides
    if config and "=" in config:
        config, overrides = None, [config, *overrides]
    if options.resume is None:
        if config is None:
            raise UserError("give a config to train, e.g. vlp train configs/align/demo.py, or --resume RUN")
        wanted = load_config(config, Experiment, Stages)
        if isinstance(wanted, Experiment):
            return train(override(wanted, overrides))
        return train_stages(wanted.overridden(overrides), shlex.join(["vlp", "train", config, *overrides]))
    folder = Path(options.resume)
    saved = load_json(folder / "experiment.json")
    saved = replace(saved, name=folder.name, output=str(folder.parent))
    wanted = override(load_config(config).resolved() if config else saved, overrides)
    if changed := changed_keys(saved, wanted):
        raise UserError(
            f"{folder} was started with other values of {', '.join(changed[:8])}"
            f"{f' and {len(changed) - 8} more' if len(changed) > 8 else ''}; resume without changing them, "
            f"or start a new run with another name=..."
        )
    return train(replace(wanted, name=folder.name, output=str(folder.parent)), resume=True)


def run_ablate(options: argparse.Namespace) -> int:
    from vlp.sweeps.ablation import ablate, load_ablation

    ablation = load_ablation(options.config, options.overrides)
    if not ablate(ablation):
        print(f"stopped; continue with: {shlex.join(['vlp', 'ablate', options.config, *options.overrides])}")
        return 0
    print((ablation.folder / "table.md").read_text() + f"\n{ablation.folder}/table.md and plot.png")
    return 0


def run_eval(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from vlp.loading.load_model import LoadOptions, load_model
    from vlp.specs.overrides import override
    from vlp.tasks.base import result_name
    from vlp.tasks.contamination import leaked
    from vlp.training.validation import check_limits

    module, name = TASKS[options.task]
    task = getattr(importlib.import_module(module), name)()
    names = {field.name for field in fields(task)}
    of_opening = {
        field.name for field in fields(LoadOptions)
    } - names  # what both have, such as max_length, is the task's
    own = [text for text in options.overrides if text.partition("=")[0] not in of_opening]
    task = override(task, own)
    opening = override(LoadOptions(), [text for text in options.overrides if text not in own])
    check_limits(task)
    check_limits(opening)
    opened = load_model(options.what, options.checkpoint, opening)
    subject = opened.subject
    for part, report in opened.reports.items():
        print(f"{part} weights: {report or 'random'}")
    task.check(subject.data)
    seen = leaked(task, subject.data, opening.allow_leak)
    result = replace(task(subject), trained_on=seen)
    path = opened.folder / "eval" / f"{result_name(options.task, task.data, own)}.json"
    table = Table(
        title=f"{options.task} on {result.data}: {', '.join(f'{n:,} {what}' for what, n in result.n.items())}"
    )
    for column in ("metric", "value", "95 % interval"):
        table.add_column(column)
    for metric, i in result.metrics.items():
        value, low, high = i.texts(digits=2)
        table.add_row(metric, value, f"{low} to {high}")
    if subject.rank == 0:
        try:
            result.write(path, subject, opened.step)
        except OSError as e:
            raise UserError(f"cannot write {path}: {e.strerror or e}") from None
        Console().print(table)
        print(
            f"protocol: {f'{result.name}: ' if result.name else ''}{result.protocol}\n{'' if opened.step is None else f'step {opened.step}, '}"
            f"weights {subject.checkpoint[:16]}, {f'{seen:,} of the pictures trained on, ' if seen else ''}left out {len(result.bad)}; written to {path}"
        )
    return 0


def run_gradcam(options: argparse.Namespace) -> int:
    from vlp.loading.run import open_run
    from vlp.tasks.grad_cam import draw_words

    subject, step = open_run(options.folder, options.checkpoint)
    source, path = options.data or subject.data.val, options.output or options.folder / "gradcam.png"
    if not source:
        raise UserError("gradcam has no pictures: give --data SHARDS")
    words = tuple(filter(None, options.words.split(",")))
    captions = draw_words(subject, source, path, words, options.pictures, options.layer)
    print("\n".join([*captions, f"step {step}; wrote {path}"]))
    return 0


def run_report(options: argparse.Namespace) -> int:
    from vlp.report.comparison import write_comparison
    from vlp.report.run import write_report

    if len(options.folders) > 1 or options.output or not (options.folders[0] / "experiment.json").exists():
        path = write_comparison(options.folders, options.output or Path("runs/comparison"))
    else:
        path = write_report(options.folders[0])
    print(f"wrote {path}")
    return 0


def run_serve(options: argparse.Namespace) -> int:
    from vlp.commands.serve import serve

    serve(Path(options.folder), options.data, options.port)
    return 0


def run_pack(options: argparse.Namespace) -> int:
    from vlp.data.formats import read_pairs
    from vlp.data.pack import Packing, pack

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
    from vlp.data.inspect import check, to_lines

    with progress_bar("checking") as progress:
        found = check(options.shards, progress=progress)
    print("\n".join(to_lines(found)))
    return 0 if found.whole else 1


def run_stats(options: argparse.Namespace) -> int:
    from vlp.data.inspect import stats

    print(json.dumps(stats(options.shards, options.grid), indent=1))
    print(f"wrote {options.grid}")
    return 0


def run_tokenizer(options: argparse.Namespace) -> int:
    from vlp.data.inspect import all_captions
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
    from vlp.data.demo import openmoji_pairs
    from vlp.data.formats import read_pairs
    from vlp.data.pack import pack

    openmoji_pairs(options.folder / "drawings", options.hold_out)
    for split in ("train", "val"):
        pairs = read_pairs(options.folder / "drawings" / f"{split}.jsonl")
        with progress_bar(f"packing {split}") as progress:
            manifest = pack(pairs, options.folder / split, workers=os.cpu_count() or 1, progress=progress)
        print(f"{manifest['samples']:,} samples in {options.folder / split}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
