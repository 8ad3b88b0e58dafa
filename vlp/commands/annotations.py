"""``vlp data annotations`` and ``vlp data answers``: official annotations to ours, and the list of what is answered."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from vlp.errors import BadSample, UserError
from vlp.files import write_atomically


def add_annotation_commands(actions) -> None:
    """Adds them to the actions of ``vlp data``."""
    annotations = actions.add_parser(
        "annotations", help="official files of VQA, NLVR2, SNLI-VE, ... -> a .jsonl to train on and to evaluate"
    )
    annotations.add_argument("format", help="vqa2, albef-vqa, visual-genome, nlvr2, snli-ve, refcoco or easy-vqa")
    annotations.add_argument("files", nargs="+", help="of that format, e.g. QUESTIONS.json ANNOTATIONS.json")
    annotations.add_argument("output", type=Path, metavar="OUT.jsonl")
    annotations.add_argument("--split", help="write this into every line")
    annotations.set_defaults(run=run_annotations)

    answers = actions.add_parser("answers", help="annotations -> the list of their answers, the most frequent first")
    answers.add_argument("files", nargs="+", metavar="ANNOTATIONS.jsonl")
    answers.add_argument("output", type=Path, metavar="OUT.txt")
    answers.add_argument("--field", default="answers", help="of the answers (default: %(default)s)")
    answers.add_argument("--split", help="lines of this split alone")
    answers.add_argument("--min-count", type=int, default=1, help="times it was given (default: 1)")
    answers.add_argument("--normalise", action="store_true", help="by VQA's official rules, before counting")
    answers.add_argument(
        "--order",
        choices=("count", "appearance"),
        default="count",
        help="most frequent first (default), or as they first appear in the files, as the classes of published VLMo files are",
    )
    answers.set_defaults(run=run_answers)


def run_annotations(options: argparse.Namespace) -> int:
    from vlp.data.preparing.annotations import FORMATS, convert

    if options.format not in FORMATS:
        raise UserError(f"there is no format {options.format!r}; there are {', '.join(FORMATS)}")
    split = {"split": options.split} if options.split else {}
    lines = [json.dumps(line | split, ensure_ascii=False) + "\n" for line in convert(options.format, options.files)]
    _write(options.output, "".join(lines))
    print(f"{len(lines):,} annotations in {options.output}")
    return 0


def run_answers(options: argparse.Namespace) -> int:
    from vlp.data.reading.annotated import Annotated
    from vlp.data.vqa_answers import normalise_answer

    counts: Counter[str] = Counter()
    for file in options.files:
        counts.update(count_answers(Annotated(file, answers=options.field, split=options.split)))
    if options.normalise:
        given, counts = counts, Counter()
        for answer, count in given.items():
            counts[normalise_answer(answer)] += count
    kept = [answer for answer, count in counts.items() if answer and count >= options.min_count]
    if options.order == "count":
        kept.sort(key=lambda answer: (-counts[answer], answer))
    if not kept:
        raise UserError(
            f"no answer of {', '.join(options.files)} was given {options.min_count} times in {options.field!r}; "
            "name another --field or a lower --min-count"
        )
    _write(options.output, "".join(f"{answer}\n" for answer in kept))
    share = sum(counts[answer] for answer in kept) / counts.total()
    print(f"{len(kept):,} answers in {options.output}, {share:.1%} of all that were given")
    return 0


def count_answers(source) -> Counter[str]:
    """How often each answer was given: by so many annotators, or, where they do not count, in so many lines."""
    from vlp.data.reading.annotated import read_answers

    reader, counts = source.open(), Counter()
    for row in range(len(reader)):
        try:
            answers, annotators = read_answers(reader.lines.record(row).get(source.answers))
        except BadSample:
            continue
        counts.update({answer: count or 1 for (answer, _), count in zip(answers, annotators)})
    return counts


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; check the folder") from None
