"""``vlp data annotations`` converts official annotation files; ``vlp data answers`` lists the answers in annotations."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict

from vlp.commands.output import report_skipped, write_output
from vlp.errors import BadSample, UserError
from vlp.files import local_path


def add_parsers(actions) -> None:
    annotations = actions.add_parser(
        "annotations",
        help="convert official files of VQA, NLVR2, SNLI-VE, ... to the .jsonl that vlp reads",
        epilog="example: vlp data annotations nlvr2 train.json nlvr2.jsonl --split train",
    )
    annotations.add_argument("format", help="vqa2, albef-vqa, visual-genome, nlvr2, snli-ve, refcoco or easy-vqa")
    annotations.add_argument("files", nargs="+", help="files of that format, e.g. QUESTIONS.json ANNOTATIONS.json")
    annotations.add_argument("output", type=local_path, metavar="OUT.jsonl")
    annotations.add_argument("--split", help="write this split into every line")
    annotations.set_defaults(run=run_annotations)

    answers = actions.add_parser(
        "answers",
        help="list the answers of annotations, the most frequent first",
        epilog="example: vlp data answers vqa.jsonl answers.txt --min-count 9",
    )
    answers.add_argument("files", nargs="+", metavar="ANNOTATIONS.jsonl")
    answers.add_argument("output", type=local_path, metavar="OUT.txt")
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
    from vlp.data.preparing.annotations import FORMATS, BadRecord, convert

    if options.format not in FORMATS:
        raise UserError(f"there is no format {options.format!r}; there are {', '.join(FORMATS)}")
    split = {"split": options.split} if options.split else {}
    lines, bad = [], []
    for record in convert(options.format, options.files):
        if isinstance(record, BadRecord):
            bad.append(asdict(record))
        else:
            lines.append(json.dumps(record | split, ensure_ascii=False) + "\n")
    write_output(options.output, "".join(lines))
    print(f"{len(lines):,} annotations in {options.output}")
    report_skipped(options.output, bad)
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
    write_output(options.output, "".join(f"{answer}\n" for answer in listed))
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
