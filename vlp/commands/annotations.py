"""``vlp data annotations`` converts official annotation files; ``vlp data answers`` lists the answers in annotations."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from vlp.errors import BadSample, UserError
from vlp.files import write_atomically


def add_parsers(actions) -> None:
    annotations = actions.add_parser(
        "annotations", help="convert official files of VQA, NLVR2, SNLI-VE, ... to the .jsonl that vlp reads"
    )
    annotations.add_argument("format", help="vqa2, albef-vqa, visual-genome, nlvr2, snli-ve, refcoco or easy-vqa")
    annotations.add_argument("files", nargs="+", help="files of that format, e.g. QUESTIONS.json ANNOTATIONS.json")
    annotations.add_argument("output", type=Path, metavar="OUT.jsonl")
    annotations.add_argument("--split", help="write this split into every line")
    annotations.set_defaults(run=run_annotations)

    answers = actions.add_parser("answers", help="list the answers of annotations, the most frequent first")
    answers.add_argument("files", nargs="+", metavar="ANNOTATIONS.jsonl")
    answers.add_argument("output", type=Path, metavar="OUT.txt")
    answers.add_argument("--field", default="answers", help="field with the answers (default: %(default)s)")
    answers.add_argument("--split", help="read only lines of this split")
    answers.add_argument("--min-count", type=int, default=1, help="fewest occurrences of a listed answer (default: 1)")
    answers.add_argument(
        "--normalise", action="store_true", help="apply the official VQA normalisation before counting"
    )
    answers.add_argument(
        "--order",
        choices=("count", "appearance"),
        default="count",
        help="most frequent first (default), or in order of first appearance, as in published VLMo checkpoints",
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
        raw, counts = counts, Counter()
        for answer, count in raw.items():
            counts[normalise_answer(answer)] += count
    listed = [answer for answer, count in counts.items() if answer and count >= options.min_count]
    if options.order == "count":
        listed.sort(key=lambda answer: (-counts[answer], answer))
    if not listed:
        raise UserError(
            f"no answer of {', '.join(options.files)} was given {options.min_count} times in {options.field!r}; "
            "name another --field or a lower --min-count"
        )
    _write(options.output, "".join(f"{answer}\n" for answer in listed))
    share = sum(counts[answer] for answer in listed) / counts.total()
    print(f"{len(listed):,} answers in {options.output}, {share:.1%} of all that were given")
    return 0


def count_answers(source) -> Counter[str]:
    """Count each answer of an `vlp.data.reading.annotated.Annotated` source.

    An answer counts once for each annotator that gave it, or once for each line if the line has no numbers of annotators.
    """
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
