"""``vlp data triples`` and ``vlp data paraphrase``: make the tables that sentence encoders are trained on."""

from __future__ import annotations

import argparse
import os
import sys
from itertools import chain

from vlp.commands.output import report_skipped, write_output
from vlp.errors import UserError
from vlp.files import local_path


def add_parsers(actions) -> None:
    triples = actions.add_parser(
        "triples",
        help="convert NLI lines to (sentence, entailed, contradicted) rows for supervised SimCSE",
        epilog="example: vlp data triples snli_dev.txt snli_test.txt triples.tsv",
    )
    triples.add_argument("files", type=local_path, nargs="+", help="lines label<TAB>premise<TAB>hypothesis")
    triples.add_argument("output", type=local_path, metavar="OUT.tsv")
    triples.set_defaults(run=run_triples)

    paraphrase = actions.add_parser(
        "paraphrase",
        help="make (sentence, paraphrase) rows for CERT; resumable",
        epilog="example: vlp data paraphrase texts.txt pairs.tsv --translator en-de de-en",
    )
    paraphrase.add_argument(
        "input", type=local_path, help="a file with one sentence per line; with --same-image, annotations with captions"
    )
    paraphrase.add_argument("output", type=local_path, metavar="OUT.tsv")
    mode = paraphrase.add_mutually_exclusive_group(required=True)
    mode.add_argument(
        "--translator",
        nargs="+",
        metavar="T",
        help="translators of back-translation, in order: module:function (list of texts -> list of texts), or a MarianMT folder",
    )
    mode.add_argument(
        "--same-image", "--same-picture", action="store_true", help="pair the captions of an image with each other"
    )
    paraphrase.add_argument("--split", help="read only this split of the annotations")
    paraphrase.add_argument("--batch-size", type=int, default=32, help="sentences of a translator call (default: 32)")
    paraphrase.set_defaults(run=run_paraphrase)


def run_triples(options: argparse.Namespace) -> int:
    from vlp.data.reading.sentences import nli_triples
    from vlp.files import resolve

    bad: list[dict] = []
    triples = list(chain.from_iterable(nli_triples(resolve(str(file)), bad) for file in options.files))
    if not triples:
        raise UserError(f"no premise in {options.files[0]} has both an entailment and a contradiction; give NLI data")
    lines = ["\t".join(cells) for cells in [("sentence", "entailed", "contradicted"), *triples]]
    write_output(options.output, "".join(f"{line}\n" for line in lines))
    print(f"{len(triples):,} triples in {options.output}")
    report_skipped(options.output, bad)
    return 0


def run_paraphrase(options: argparse.Namespace) -> int:
    from vlp.data.preparing.formats import read_pairs
    from vlp.data.preparing.paraphrase import back_translate, pair_captions
    from vlp.data.reading.tables import read_lines
    from vlp.files import resolve
    from vlp.tasks.progress import progress_bar

    if options.same_image:
        read = list(read_pairs(options.input, split=options.split))
        print(f"{pair_captions([pair.captions for pair in read], options.output):,} pairs in {options.output}")
        places = [(*pair.source.rsplit(":", 1), pair.problem) for pair in read if pair.problem]
        report_skipped(options.output, [dict(zip(("source", "key", "reason"), place)) for place in places])
        return 0
    sentences = read_lines(resolve(str(options.input)))
    if not sentences:
        raise UserError(f"{options.input} has no sentence; give a file with one sentence per line")
    sys.path.insert(0, os.getcwd())  # the user's translator may be a module of the working directory
    with progress_bar("translating") as progress:
        back_translate(sentences, options.translator, options.output, options.batch_size, progress)
    print(f"{len(sentences):,} paraphrases in {options.output}")
    return 0
