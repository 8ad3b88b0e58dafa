"""Conversion of official annotation files to the lines that `vlp.data.reading.annotated.Annotated` reads by default.

A line has image (or image0 and image1), text, answers or label, and further fields that evaluators use: question_id,
question_type, answer_type. Paths of images are those of the official folders.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from vlp.data.reading.tables import Lines, first_line, read_json
from vlp.data.vqa_answers import normalise_answer
from vlp.errors import BadSample, UserError
from vlp.files import resolve

VG_WEIGHT = 0.5  # weight of a Visual Genome answer; the weight of a VQA answer is its share of the annotators (ALBEF)


def expecting(expected: str) -> Callable:
    """Turn the lookup errors of a reader into a UserError that names the file and the expected content."""

    def wrap(read: Callable[..., Iterator[dict]]):
        @wraps(read)
        def checked(*files: Path) -> Iterator[dict]:
            try:
                yield from read(*files)
            except (KeyError, TypeError, AttributeError, IndexError, ValueError) as e:
                lacks = f"there is no {e}" if isinstance(e, KeyError) else f"its structure differs ({e})"
                raise UserError(f"{' '.join(map(str, files))}: expected {expected}; {lacks}") from None

        return checked

    return wrap


@expecting("VQA v2's questions, and its annotations where there are some")
def vqa2(questions: Path, annotations: Path | None = None) -> Iterator[dict]:
    """Read ``v2_OpenEnded_mscoco_*_questions.json`` and ``v2_mscoco_*_annotations.json``; a test set has no annotations."""
    asked = read_json(questions)
    told = {a["question_id"]: a for a in read_json(annotations)["annotations"]} if annotations else {}
    if annotations and (missing := {q["question_id"] for q in asked["questions"]} ^ told.keys()):
        raise UserError(
            f"{len(missing)} questions are in only one of {questions} and {annotations}; give two files of the same split"
        )
    folder = asked["data_subtype"].replace("-dev", "")  # test-dev2015 is part of test2015
    for question in asked["questions"]:
        image = f"{folder}/COCO_{folder}_{question['image_id']:012d}.jpg"
        line = {"image": image, "text": question["question"], "question_id": question["question_id"]}
        if annotations:
            found = told[question["question_id"]]
            line["answers"] = [answer["answer"] for answer in found["answers"]]
            line |= {name: found[name] for name in ("multiple_choice_answer", "question_type", "answer_type")}
        yield line


@expecting("ALBEF's list of objects with image, question, and answer, dataset or question_id")
def albef_vqa(*files: Path) -> Iterator[dict]:
    """Read any number of ALBEF's ``vqa_train.json``, ``vqa_val.json``, ``vg_qa.json``, ``vqa_test.json``."""
    for file in files:
        for record in _list(file):
            line = {"image": record["image"], "text": record["question"]}
            line |= {name: record[name] for name in ("question_id", "dataset") if name in record}
            if "answer" in record:
                genome = record.get("dataset") == "vg"
                line["answers"] = {record["answer"]: VG_WEIGHT} if genome else record["answer"]
            yield line


@expecting("Visual Genome's question_answers.json and image_data.json")
def visual_genome(questions: Path, images: Path) -> Iterator[dict]:
    """Read Visual Genome's questions, with answers normalised by VQA's rules."""
    paths = {image["image_id"]: "/".join(image["url"].split("/")[-2:]) for image in read_json(images)}
    for image in read_json(questions):
        for qa in image["qas"]:
            line = {"image": paths[image["id"]], "text": qa["question"], "question_id": qa["qa_id"]}
            yield line | {"answers": {normalise_answer(qa["answer"]): VG_WEIGHT}}


@expecting("NLVR2's lines with sentence, label and identifier, or ALBEF's list with images, sentence and label")
def nlvr2(file: Path) -> Iterator[dict]:
    """Read NLVR2's ``train.json``, ``dev.json``, ``test1.json``; label is True or False."""
    for record in _list(file):
        if "images" in record:
            images = record["images"]
        else:
            split, name = record["identifier"].split("-")[0], record["identifier"].rsplit("-", 1)[0]
            folder = f"images/train/{record['directory']}" if split == "train" else split
            images = [f"{folder}/{name}-img{n}.png" for n in (0, 1)]
        line = {"image0": images[0], "image1": images[1], "text": record["sentence"]}
        if "label" in record:  # hidden tests have no label
            line["label"] = str(record["label"])
        yield line | {name: record[name] for name in ("identifier",) if name in record}


@expecting(
    "SNLI-VE's lines with Flickr30K_ID, sentence2 and gold_label, or ALBEF's list with image, sentence and label"
)
def snli_ve(file: Path) -> Iterator[dict]:
    """Read ``snli_ve_train.jsonl``; label is entailment, neutral or contradiction."""
    for record in _list(file):
        if "Flickr30K_ID" in record:
            image, text, label = f"{record['Flickr30K_ID']}.jpg", record["sentence2"], record["gold_label"]
        else:
            image, text, label = (
                f"{record['image']}.jpg",
                record["sentence"],
                record["label"],
            )  # ALBEF leaves the extension out
        yield {"image": image, "text": text, "label": label}


@expecting(
    "ALBEF's list of objects with image, text and ref_id, then RefCOCO+'s refs(unc).p, instances.json and dets.json"
)
def refcoco(
    file: Path, references: Path | None = None, instances: Path | None = None, detections: Path | None = None
) -> Iterator[dict]:
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
    for record in _list(file):
        line = {"image": record["image"], "text": record["text"]} | record
        if references:
            reference = told[record["ref_id"]]
            line |= {"split": reference["split"], "box": boxes[reference["ann_id"]]}
            if detections:
                line["proposals"] = proposals[reference["image_id"]]
        yield line


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


@expecting("the folder data of the package easy_vqa, with train/questions.json and test/questions.json")
def easy_vqa(folder: Path) -> Iterator[dict]:
    """Read ``pip:easy_vqa/data``; split is train or test."""
    for split in ("train", "test"):
        for question, answer, image in read_json(folder / split / "questions.json"):
            yield {"image": f"{split}/images/{image}.png", "text": question, "answers": answer, "split": split}


FORMATS = {
    "vqa2": vqa2,
    "albef-vqa": albef_vqa,
    "visual-genome": visual_genome,
    "nlvr2": nlvr2,
    "snli-ve": snli_ve,
    "refcoco": refcoco,
    "easy-vqa": easy_vqa,
}


def convert(format: str, files: Iterable[str]) -> Iterator[dict]:
    """Yield the lines of official files, which may be ``pip:PACKAGE/path``.

    Raises:
        UserError: if a file is not of the format, or contains no annotation.
    """
    files = [resolve(file) for file in files]
    try:
        lines = FORMATS[format](*files)
        yield next(lines)
    except StopIteration:
        raise UserError(f"{' '.join(map(str, files))} contains no annotation") from None
    yield from lines


def _list(file: Path) -> list[Any]:
    """Read a json list, or one object per line."""
    if first_line(file).lstrip().startswith("["):
        return read_json(file)
    lines = Lines(file)
    try:
        return [lines.record(index) for index in range(len(lines))]
    except BadSample as e:
        raise UserError(f"{file}: expected one object per line; {e}") from None
