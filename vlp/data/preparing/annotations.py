"""Conversion of official annotation files to the lines that `vlp.data.reading.annotated.Annotated` reads by default.

A line has image (or image0 and image1), text, answers or label, and further fields that evaluators use: question_id,
question_type, answer_type. Paths of images are those of the official folders.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vlp.data.reading.annotated import read_answers, word
from vlp.data.reading.tables import Lines, as_text, first_line, is_json_lines, read_json
from vlp.data.vqa_answers import normalise_answer
from vlp.errors import BadSample, UserError
from vlp.files import resolve

VG_WEIGHT = 0.5  # weight of a Visual Genome answer; the weight of a VQA answer is its share of the annotators (ALBEF)


Record = tuple[str, Callable[[], dict]]  # file and place of a record, and the function that converts it
Lookup = (KeyError, TypeError, AttributeError, IndexError, ValueError)  # errors of content that has another structure


@dataclass(frozen=True)
class BadRecord:
    """A record of an official file that cannot be used: where it is, and why."""

    source: str
    key: str
    reason: str


def vqa2(questions: Path, annotations: Path | None = None) -> Iterator[Record]:
    """Read ``v2_OpenEnded_mscoco_*_questions.json`` and ``v2_mscoco_*_annotations.json``; a test set has no annotations."""
    asked = read_json(questions)
    given = read_json(annotations)["annotations"] if annotations else []
    told = {a["question_id"]: a for a in given if isinstance(a, dict) and "question_id" in a}
    ids = [q["question_id"] for q in asked["questions"] if isinstance(q, dict) and "question_id" in q]
    malformed = len(given) - len(told) + len(asked["questions"]) - len(ids)
    if annotations and len(missing := set(ids) ^ told.keys()) > malformed:
        raise UserError(
            f"{len(missing)} questions are in only one of {questions} and {annotations}; give two files of the same split"
        )
    folder = asked["data_subtype"].replace("-dev", "")  # test-dev2015 is part of test2015

    def convert(question: dict) -> dict:
        image = f"{folder}/COCO_{folder}_{question['image_id']:012d}.jpg"
        line = {"image": image, "text": question["question"], "question_id": question["question_id"]}
        if annotations:
            found = told[question["question_id"]]
            line["answers"] = [answer["answer"] for answer in found["answers"]]
            line |= {name: found[name] for name in ("multiple_choice_answer", "question_type", "answer_type")}
        return line

    yield from _records(questions, asked["questions"], convert, "questions")


def albef_vqa(*files: Path) -> Iterator[Record]:
    """Read any number of ALBEF's ``vqa_train.json``, ``vqa_val.json``, ``vg_qa.json``, ``vqa_test.json``."""

    def convert(record: dict) -> dict:
        line = {"image": record["image"], "text": record["question"]}
        line |= {name: record[name] for name in ("question_id", "dataset") if name in record}
        if "answer" in record:
            genome = record.get("dataset") == "vg"
            line["answers"] = {as_text(record["answer"], "answer"): VG_WEIGHT} if genome else record["answer"]
        return line

    for file in files:
        yield from _list(file, convert)


def visual_genome(questions: Path, images: Path) -> Iterator[Record]:
    """Read Visual Genome's questions, with answers normalised by VQA's rules."""
    paths: dict[Any, str] = {}
    for image in read_json(images):
        with suppress(*Lookup):  # a question about an image without a path is a bad record
            paths[image["image_id"]] = "/".join(image["url"].split("/")[-2:])

    def convert(pair: tuple[Any, dict]) -> dict:
        image, qa = pair
        line = {"image": paths[image], "text": qa["question"], "question_id": qa["qa_id"]}
        return line | {"answers": {normalise_answer(as_text(qa["answer"], "answer")): VG_WEIGHT}}

    for number, image in enumerate(read_json(questions)):
        try:
            pairs = [(image["id"], qa) for qa in image["qas"]]
        except Lookup as e:
            yield f"{questions}:[{number}]", partial(_fail, _lacks(e))
            continue
        yield from _records(questions, pairs, convert, f"[{number}].qas")


def nlvr2(file: Path) -> Iterator[Record]:
    """Read NLVR2's ``train.json``, ``dev.json``, ``test1.json``; label is True or False."""

    def convert(record: dict) -> dict:
        if "images" in record:
            images = record["images"]
        else:
            split, name = record["identifier"].split("-")[0], record["identifier"].rsplit("-", 1)[0]
            folder = f"images/train/{record['directory']}" if split == "train" else split
            images = [f"{folder}/{name}-img{n}.png" for n in (0, 1)]
        line = {"image0": images[0], "image1": images[1], "text": record["sentence"]}
        if "label" in record:  # hidden tests have no label
            line["label"] = record["label"] if record["label"] is None else str(record["label"])
        return line | {name: record[name] for name in ("identifier",) if name in record}

    yield from _list(file, convert)


def snli_ve(file: Path) -> Iterator[Record]:
    """Read ``snli_ve_train.jsonl``; label is entailment, neutral or contradiction."""

    def convert(record: dict) -> dict:
        if "Flickr30K_ID" in record:
            image, text, label = record["Flickr30K_ID"], record["sentence2"], record["gold_label"]
        else:
            image, text, label = record["image"], record["sentence"], record["label"]
        # ALBEF's lists leave the extension out, too
        return {"image": image if image is None else f"{image}.jpg", "text": text, "label": label}

    yield from _list(file, convert)


def refcoco(
    file: Path, references: Path | None = None, instances: Path | None = None, detections: Path | None = None
) -> Iterator[Record]:
    """Read ALBEF's ``refcoco+_train.json`` and similar files; further fields are kept.

    ``refs(unc).p`` and ``instances.json`` add the box of each phrase and its split (train, val, testA, testB).
    ``dets.json`` adds the proposals of its image.
    """
    if references and not instances:
        raise UserError(f"{references} names boxes that instances.json contains; give both files")
    told, boxes, proposals = {}, {}, {}
    if references:
        told = {reference["ref_id"]: reference for reference in read_plain_pickle(references)}
        boxes = {a["id"]: a["bbox"] for a in read_json(instances)["annotations"]}
    if detections:
        proposals = {int(image): [found[:4] for found in each] for image, each in read_json(detections).items()}

    def convert(record: dict) -> dict:
        line = {"image": record["image"], "text": record["text"]} | record
        if references:
            reference = told[record["ref_id"]]
            line |= {"split": reference["split"], "box": boxes[reference["ann_id"]]}
            if detections:
                line["proposals"] = proposals[reference["image_id"]]
        return line

    yield from _list(file, convert)


class _Plain(pickle.Unpickler):
    """Unpickler of numbers, texts, lists and dicts. It refuses every other name, which could run code."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_plain_pickle(file: Path) -> Any:
    """Read a pickle of plain data, the only form in which RefCOCO's references are published.

    Raises:
        UserError: if the pickle contains anything else.
    """
    try:
        with open(file, "rb") as stream:
            return _Plain(stream, encoding="latin1").load()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from None
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} is not a pickle of plain lists and numbers ({error}); none of its code was run"
        ) from None


def easy_vqa(folder: Path) -> Iterator[Record]:
    """Read ``pip:easy_vqa/data``; split is train or test."""

    def convert(split: str, record: list) -> dict:
        question, answer, image = record
        return {"image": f"{split}/images/{image}.png", "text": question, "answers": answer, "split": split}

    for split in ("train", "test"):
        file = folder / split / "questions.json"
        yield from _records(file, read_json(file), partial(convert, split))


@dataclass(frozen=True)
class Format:
    """An official format.

    Args:
        read: Function from the files to their records.
        expected: Description of the files, for error messages.
    """

    read: Callable[..., Iterator[Record]]
    expected: str


FORMATS = {
    "vqa2": Format(vqa2, "VQA v2's questions, and its annotations where there are some"),
    "albef-vqa": Format(albef_vqa, "ALBEF's list of objects with image, question, and answer, dataset or question_id"),
    "visual-genome": Format(visual_genome, "Visual Genome's question_answers.json and image_data.json"),
    "nlvr2": Format(
        nlvr2, "NLVR2's lines with sentence, label and identifier, or ALBEF's list with images, sentence and label"
    ),
    "snli-ve": Format(
        snli_ve,
        "SNLI-VE's lines with Flickr30K_ID, sentence2 and gold_label, or ALBEF's list with image, sentence and label",
    ),
    "refcoco": Format(
        refcoco,
        "ALBEF's list of objects with image, text and ref_id, then RefCOCO+'s refs(unc).p, instances.json and dets.json",
    ),
    "easy-vqa": Format(
        easy_vqa, "the folder data of the package easy_vqa, with train/questions.json and test/questions.json"
    ),
}


def convert(format: str, files: Iterable[str]) -> Iterator[dict | BadRecord]:
    """Yield the lines of official files, which may be ``pip:PACKAGE/path``, and the records that cannot be used.

    Raises:
        UserError: if a file is not of the format, or contains no annotation that can be used.
    """
    files = [resolve(file) for file in files]
    expected, names = FORMATS[format].expected, " ".join(map(str, files))
    bad, usable = [], 0
    try:
        for place, to_line in FORMATS[format].read(*files):
            try:
                line = _checked(to_line())
            except (BadSample, *Lookup) as e:
                source, _, key = place.rpartition(":")
                bad.append(BadRecord(source, key, str(e) if isinstance(e, BadSample) else _lacks(e)))
                continue
            usable += 1
            yield line
    except Lookup as e:
        raise UserError(f"{names}: expected {expected}; {_lacks(e)}") from None
    if not usable:
        if not bad:
            raise UserError(f"{names} contains no annotation")
        raise UserError(f"{bad[0].source}:{bad[0].key}: expected {expected}; {bad[0].reason}")
    yield from bad


def _checked(line: dict) -> dict:
    """Return the line. Raise BadSample if an image, text, answer or label is missing or has another type."""
    for name in ("image", "image0", "image1", "text"):
        if name in line and not as_text(line[name], name):
            raise BadSample(f"no {name!r}")
    if "answers" in line and not read_answers(line["answers"])[0]:
        raise BadSample("no answer")
    if "label" in line and not word(line["label"]):
        raise BadSample("no label")
    return line


def _lacks(error: Exception) -> str:
    return f"there is no {error}" if isinstance(error, KeyError) else f"its structure differs ({error})"


def _fail(reason: str) -> dict:
    raise BadSample(reason)


def _records(file: Path, records: Iterable[Any], convert: Callable[[Any], dict], name: str = "") -> Iterator[Record]:
    """Yield each record of a list with its place, ``FILE:NAME[3]``."""
    for number, record in enumerate(records):
        yield f"{file}:{name}[{number}]", partial(convert, record)


def _list(file: Path, convert: Callable[[Any], dict]) -> Iterator[Record]:
    """Read a json list, or one object per line."""
    if first_line(file).lstrip().startswith("[") and not is_json_lines(file):
        yield from _records(file, read_json(file), convert)
        return
    lines = Lines(file)

    def convert_line(index: int) -> dict:
        return convert(lines.record(index))

    for index, number in enumerate(lines.numbers):
        yield f"{file}:{number}", partial(convert_line, index)
