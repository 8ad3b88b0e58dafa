"""Visual question answering: accuracy of ranked, written or classified answers.

P images of a batch, Q questions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from vlp.config import Data
from vlp.data.by_image import AnnotatedImage, AnnotatedImageDataset
from vlp.data.reading.annotated import Annotated, AnnotatedReader, read_list, to_evaluate, word
from vlp.data.reading.shards import RawSample
from vlp.data.vqa_answers import accuracy
from vlp.errors import UserError
from vlp.specs.fields import setting
from vlp.tasks.answering import Answerer, classifying, ranking, writing
from vlp.tasks.base import EvalModel, Result, Task
from vlp.tasks.details import MAX_WRONG, answer_confusions, wrong_predictions
from vlp.tasks.metrics import Interval, bootstrap
from vlp.tasks.question_prior import QuestionPrior
from vlp.tasks.requirements import need_images_with_texts
from vlp.tasks.sharded import ShardedBatches
from vlp.tasks.submission import check_submission, need_ids, write_submission

Mode = Literal["rank", "write", "classify"]


@dataclass(frozen=True)
class Vqa(Task):
    """Accuracy of the answers to annotated questions. An image is encoded once for all its questions.

    Metrics are ``accuracy``, and ``accuracy_TYPE`` of each answer type; ``prior``, the accuracy of a baseline that reads only
    the question; and ``answerable``, the accuracy of always choosing the best answer of the list. There are no metrics if no
    answers are known, as for a test set.

    Args:
        data: Annotations. None uses those of the training, with ``split``. Fields are named as there.
        images: Folder of images, or shards, if not the same as in training.
        split: Lines of this split. None uses all lines.
        mode: "rank" ranks a list (published for ALBEF), "write" writes freely by beam search, "classify" uses a classifier
            (VLMo). None takes the first of these that the model can do.
        answers: File with the list of answers, one a line or a JSON list. None uses the classes of the training, or all its
            answers.
        k: Candidates of ranking, see `vlp.encoders.generate.rank`.
        double_first: Whether ranking counts the first token twice, as the published code does.
        beams: Beams of writing.
        max_answer: Tokens of a written answer at most.
        metric: "vqa", the official accuracy for questions with several annotators, or "exact", the share of equal answers. None
            chooses by the data.
        submission: File for the server's results.json, with an answer to each question of the split.
        batch_size: Images at a time.
        questions: Questions at a time.
        resamples: Bootstrap resamples, over images.
        blind: Whether to evaluate a second time with the images of other samples. A metric that is as high without the right
            image says nothing about reading it. Doubles the cost.
    """

    name = "vqa"
    headline = "accuracy"
    baselines = ("prior", "answerable")

    data: str | None = None
    images: str | None = setting(None, changes_result=False)
    split: str | None = None
    mode: Mode | None = None
    answers: str | None = None
    k: int = setting(128, least=1)
    double_first: bool = False
    beams: int = setting(3, least=1)
    max_answer: int = setting(10, least=1)
    metric: Literal["vqa", "exact"] | None = None
    submission: str | None = setting(None, changes_result=False)
    batch_size: int = setting(32, least=1, changes_result=False)
    questions: int = setting(64, least=1, changes_result=False)
    resamples: int = setting(1000, least=0, changes_result=False)
    blind: bool = setting(True, changes_result=False)

    def validate(self, data: Data) -> None:
        reader = self._source(data).open()
        if not len(reader):
            raise UserError(f"{self._source(data).path} has no question; give other data")
        if self.submission:
            check_submission(self.submission)
            need_ids(reader.column("question_id"), "question_id")

    def evaluated_images(self, data: Data) -> AnnotatedReader:
        return self._source(data).open()

    def _source(self, data: Data) -> Annotated:
        source = _answers_of(to_evaluate(data.train, self.data, self.images, self.split))
        if source.text is None:
            raise UserError("vqa needs the field of the question; set text of the annotations that were trained on")
        return source

    def for_blind(self) -> Vqa:
        return replace(self, submission=None)

    def evaluate(self, model: EvalModel) -> Result:
        need_images_with_texts(model, self.name, num_images=1)
        source, mode = self._source(model.data), self._mode(model)
        trained = training_annotations(model.data)
        prior = QuestionPrior(trained) if trained else None
        candidates = [] if mode == "write" else self._candidates(source, prior, mode, model)
        answerer = self._answerer(mode, model, candidates)
        dataset = AnnotatedImageDataset(source.open(), model.data.resize, model.preprocess, model.data.max_pixels)
        batches = ShardedBatches(model, dataset, self.batch_size)
        rows = []
        for images in batches:
            rows += [(line.source_row, line, answer) for line, answer in self._answer(model, images, answerer)]
        rows, bad = batches.gather(rows)
        if not rows:
            raise UserError(f"{source.path} has no question with an image, e.g. {bad[0]['reason']}; give other data")
        lines, predictions = [line for _, line, _ in rows], [answer for *_, answer in rows]
        if self.submission:
            ids = [line.meta.get("question_id") for line in lines]
            need_ids(ids, "question_id")
            answers = [{"question_id": number, "answer": answer} for number, answer in zip(ids, predictions)]
            write_submission(self.submission, json.dumps(answers), bad)
        metrics, details = self._metrics(lines, predictions, candidates, source, prior, model)
        return Result(
            protocol=self._protocol(mode, candidates, lines, source),
            data=source.described,
            n={"questions": len(lines), "images": len({line.image_id for line in lines})},
            metrics=metrics,
            details=details,
            bad=bad,
        )

    def _mode(self, model: EvalModel) -> Mode:
        can: list[Mode] = ["rank", "write"] if model.model.can_answer else []
        can += ["classify"] if model.model.num_classes is not None else []
        if not can or self.mode not in (None, *can):
            needed = "a classifier" if self.mode == "classify" else "a decoder (model.decoder) or a classifier"
            raise UserError(f"vqa: the model cannot {self.mode or 'answer'}; it needs {needed}")
        return self.mode or can[0]

    def _candidates(self, source: Annotated, prior: QuestionPrior | None, mode: Mode, model: EvalModel) -> list[str]:
        """Return the answers that are ranked or classified.

        Raises:
            UserError: if there is no list of them, or it does not fit the classifier.
        """
        if self.answers:
            candidates = read_list(self.answers)
        elif source.classes:
            candidates = source.class_list()
        elif mode == "rank" and prior and prior.answers:
            candidates = prior.answers
        else:
            raise UserError("vqa: the list of answers is not known; give answers=FILE, made by vlp data answers")
        if mode == "classify" and len(candidates) != model.model.num_classes:
            raise UserError(
                f"vqa: {len(candidates)} answers for a classifier of {model.model.num_classes}; give answers=FILE with those "
                "that it was trained on, in their order"
            )
        return list(candidates)

    def _answerer(self, mode: Mode, model: EvalModel, candidates: list[str]) -> Answerer:
        if mode == "rank":
            return ranking(model, candidates, self.k, self.double_first)
        return writing(model, self.beams, self.max_answer) if mode == "write" else classifying(model, candidates)

    def _answer(
        self, model: EvalModel, images: list[AnnotatedImage], answerer: Answerer
    ) -> list[tuple[RawSample, str]]:
        """Answer all questions about a batch of images, ``questions`` at a time."""
        encoded = model.encode_images([image.images[0] for image in images])
        asked = [(n, line) for n, image in enumerate(images) for line in image.lines]
        answered = []
        for start in range(0, len(asked), self.questions):
            image_of, lines = zip(*asked[start : start + self.questions])
            ids, mask = model.tokenize([line.captions[0] for line in lines])  # (Q, L)
            # only the images of these questions
            own = torch.tensor(image_of, device=model.device) - image_of[0]
            answered += zip(lines, answerer(encoded[image_of[0] : image_of[-1] + 1], ids, mask, own))
        return answered

    def _protocol(self, mode: Mode, candidates: list[str], lines: list[RawSample], source: Annotated) -> str:
        modes = {
            "rank": f"the likeliest whole answer of the {min(self.k, len(candidates))} whose first token is likeliest, of a list of "
            f"{len(candidates):,}" + (", the first token counted twice" if self.double_first else ""),
            "write": f"written with {self.beams} beams, {self.max_answer} tokens at most",
            "classify": f"the highest of {len(candidates):,} classes",
        }
        official = "VQA's official accuracy, min(1, matches / 3) over all but one annotator"
        measure = official if self._metric(lines, source) == "vqa" else "share of answers equal to the only right one"
        return f"{modes[mode]}; {measure}"

    def _metric(self, lines: list[RawSample], source: Annotated) -> str:
        several = any(len(annotators(line, source)) > 1 for line in lines)
        return self.metric or ("vqa" if several else "exact")

    def _metrics(
        self,
        lines: list[RawSample],
        predictions: list[str],
        candidates: list[str],
        source: Annotated,
        prior: QuestionPrior | None,
        model: EvalModel,
    ) -> tuple[dict[str, Interval], dict[str, Any]]:
        score = self._score(lines, source, model)
        known = [n for n, line in enumerate(lines) if line.answers]  # questions whose answer is known
        groups = np.array([lines[n].image_id for n in known])
        if not known:
            return {}, {"answers": len(predictions)}

        def mean(values: Iterable[float], subset: np.ndarray | slice = slice(None)) -> Interval:
            return bootstrap(np.array(list(values))[subset], groups[subset], model.seed, self.resamples)

        scores = [score(lines[n], predictions[n]) for n in known]
        metrics = {"accuracy": mean(scores)}
        kinds = np.array([str(lines[n].meta.get("answer_type", "")) for n in known])
        metrics |= {f"accuracy_{kind}": mean(scores, kinds == kind) for kind in sorted(set(kinds) - {""})}
        if prior:
            metrics["prior"] = mean(score(lines[n], prior(lines[n].captions[0])) for n in known)
        listed = set(candidates)
        unlisted = [n for n in known if candidates and listed.isdisjoint(dict(lines[n].answers))]
        if candidates:
            best = (max((score(lines[n], a) for a, _ in lines[n].answers if a in listed), default=0.0) for n in known)
            metrics["answerable"] = mean(best)
        truths = [line.answers[0][0] if line.answers else "" for line in lines]
        wrong = [n for n, hit in zip(known, scores) if not hit]
        # an answer that is correct in other words is not a confusion
        taken_for = [truths[n] if hit else predictions[n] for n, hit in zip(known, scores)]
        details = wrong_predictions(source, [(lines[n], predictions[n], truths[n]) for n in wrong]) | {
            "confused": answer_confusions(taken_for, [truths[n] for n in known]),
            "not_in_list": {"questions": len(unlisted), "answers": [truths[n] for n in unlisted[:MAX_WRONG]]},
        }
        return metrics, details

    def _score(self, lines: list[RawSample], source: Annotated, model: EvalModel) -> Callable[[RawSample, str], float]:
        """Return a function that scores an answer to the question of a line, from 0 to 1."""
        if self._metric(lines, source) == "vqa":
            return lambda line, answer: accuracy(answer, annotators(line, source))
        tokenizer = model.tokenizer

        def as_written(answer: str) -> str:  # in the case and with the spaces of the decoder
            return tokenizer.text(tokenizer.target_rows([answer])[0])

        return lambda line, answer: float(
            answer in dict(line.answers) or as_written(answer) in [as_written(each) for each, _ in line.answers]
        )


def annotators(line: RawSample, source: Annotated) -> list[str]:
    """Return the answer of each annotator."""
    given = line.meta.get(source.answers)
    return [word(each) for each in given] if isinstance(given, list) else [answer for answer, _ in line.answers]


def _answers_of(source: Annotated) -> Annotated:
    """Read classes as answers. An answer outside the list of classes is then wrong, and not an unusable sample."""
    return replace(source, answers=source.answers or source.label or "answers", label=None)


def training_annotations(data: Data) -> list[AnnotatedReader]:
    """Open the annotations that the run was trained on, as far as they can still be opened."""
    readers = []
    for source in data.train:
        if isinstance(source, Annotated):
            with suppress(UserError):  # the training data have moved
                readers.append(_answers_of(source).open())
    return readers
