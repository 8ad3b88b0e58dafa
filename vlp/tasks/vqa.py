"""Questions about pictures: how often is the answer right? By ranking a list, by writing, or by a classifier.

Q questions, A answers of the list, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vlp.config import Data
from vlp.data.by_image import AnnotatedImageDataset
from vlp.data.reading.annotated import Annotated, AnnotatedReader, read_list, to_evaluate, word
from vlp.data.reading.shards import RawSample
from vlp.data.stream import evaluation_batches
from vlp.data.vqa_answers import accuracy
from vlp.distributed import gather_objects, world_size
from vlp.errors import UserError
from vlp.specs.fields import setting
from vlp.tasks.answering import Say, classifying, ranking, writing
from vlp.tasks.base import EvalModel, Result, Task, evaluating
from vlp.tasks.metrics import Interval, bootstrap
from vlp.tasks.mistakes import SHOWN, mistakes, mixed_up
from vlp.tasks.question_prior import QuestionPrior
from vlp.tasks.requirements import need_reader
from vlp.tasks.submission import check_submission, need_ids, write_submission


@dataclass(frozen=True)
class Vqa(Task):
    """Answers to the questions of annotations, each once, with every picture encoded once for all of its questions.

    Args:
        data: annotations; None = those of the training, of which ``split`` is to be evaluated. Fields are named as there.
        images: folder of pictures, or shards, if not as in training.
        split: lines of ``data``; None = all.
        how: "rank" a list (published: ALBEF), "write" freely by beam search, or "classify" (VLMo); None = as the model can, in
            this order.
        answers: file with the list, one a line or a json list; None = the classes of the training, or all its answers.
        k: candidates of ranking, see `vlp.encoders.generate.rank`.
        double_first: of ranking; as published.
        beams: of writing.
        max_answer: tokens of a written answer.
        metric: "vqa" = the official accuracy, of questions with several annotators; "exact" = the share of equal answers; None =
            by what the data have.
        submission: where to write results.json for the server: an answer to exactly the questions of the split.
        batch_size: pictures at a time.
        questions: at a time.
        resamples: of the bootstrap, over pictures.
    """

    name = "vqa"
    headline = "accuracy"

    data: str | None = None
    images: str | None = setting(None, changes_result=False)
    split: str | None = None
    how: Literal["rank", "write", "classify"] | None = None
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

    def validate(self, data: Data) -> None:
        """Raises UserError where there are no questions."""
        reader = self._source(data).open()
        if not len(reader):
            raise UserError(f"{self._source(data).path} holds no question; give other data")
        if self.submission:
            check_submission(self.submission)
            need_ids(reader.column("question_id"), "question_id")

    def evaluated_images(self, data: Data) -> AnnotatedReader:
        """The annotations, see `vlp.tasks.contamination`."""
        return self._source(data).open()

    def _source(self, data: Data) -> Annotated:
        source = _questions(to_evaluate(data.train, self.data, self.images, self.split))
        if source.text is None:
            raise UserError("vqa needs the field of the question: set text of the annotations that were trained on")
        return source

    def evaluate(self, subject: EvalModel) -> Result:
        """Metrics: ``accuracy`` (also ``accuracy_TYPE`` of each answer type), of the ``prior`` that has not seen the pictures, and
        ``answerable``: what a model that always chose the best of its list would reach. None where no answers are known."""
        need_reader(subject, "vqa", pictures=1)
        source, how = self._source(subject.data), self._how(subject)
        prior = QuestionPrior(trained) if (trained := _trained(subject.data)) else None
        known = [] if how == "write" else self._list(source, prior, how, subject)
        say = self._say(how, subject, known)
        dataset = AnnotatedImageDataset(source.open(), subject.data.resize, subject.preprocess, subject.data.max_pixels)
        own, bad = [], []
        with evaluating(subject.model):
            for pictured, unusable in evaluation_batches(
                dataset, self.batch_size, subject.data.workers, subject.rank, world_size()
            ):
                bad += unusable
                if pictured:
                    own += self._answer(subject, pictured, say)
        found = sorted((row for part in gather_objects(own) for row in part), key=lambda row: row[0].source_row)
        bad = [b for part in gather_objects(bad) for b in part]
        if not found:
            raise UserError(f"{source.path} holds no question with a picture, e.g. {bad[0]['reason']}")
        lines, said = [line for line, _ in found], [answer for _, answer in found]
        if self.submission:
            ids = [line.meta.get("question_id") for line in lines]
            need_ids(ids, "question_id")
            answers = [{"question_id": number, "answer": answer} for number, answer in zip(ids, said)]
            write_submission(self.submission, json.dumps(answers), bad, subject.rank)
        metrics, details = self._metrics(lines, said, known, source, prior, subject)
        return Result(
            protocol=self._protocol(how, known, lines, source),
            data=source.described,
            n={"questions": len(lines), "images": len({line.image_id for line in lines})},
            metrics=metrics,
            details=details,
            bad=bad,
        )

    def _how(self, subject: EvalModel) -> str:
        decoder = getattr(subject.model, "decoder", None)
        can = ["rank", "write"] if decoder is not None and decoder.source == "fusion" else []
        can += ["classify"] if getattr(subject.model, "classifier", None) is not None else []
        if not can or self.how not in (None, *can):
            raise UserError(
                f"vqa: the model cannot {self.how or 'answer'}: it needs "
                f"{'a classifier' if self.how == 'classify' else 'a decoder (model.decoder) or a classifier'}"
            )
        return self.how or can[0]

    def _list(self, source: Annotated, prior: QuestionPrior | None, how: str, subject: EvalModel) -> list[str]:
        """The answers that are ranked or classified. Raises UserError where there is no list of them, or not of the model."""
        if self.answers:
            known = read_list(self.answers)
        elif source.classes:
            known = source.class_list()
        elif how == "rank" and prior and prior.answers:
            known = prior.answers
        else:
            raise UserError("vqa: the list of answers is not known; give answers=FILE, made by vlp data answers")
        if how == "classify" and len(known) != subject.model.classifier[-1].out_features:
            raise UserError(
                f"vqa: {len(known)} answers for a classifier of {subject.model.classifier[-1].out_features}; "
                "give answers=FILE with those that it was trained on, in their order"
            )
        return list(known)

    def _say(self, how: str, subject: EvalModel, known: list[str]) -> Say:
        if how == "rank":
            return ranking(subject, known, self.k, self.double_first)
        return writing(subject, self.beams, self.max_answer) if how == "write" else classifying(subject, known)

    def _answer(self, subject: EvalModel, pictured: list, say: Say) -> list[tuple[RawSample, str]]:
        """The answers to all questions of a batch of pictures."""
        pixels = torch.stack([picture.images[0] for picture in pictured]).to(subject.device)
        image = subject.model.encode_image(subject.preprocess.normalise(pixels))
        asked = [(n, line) for n, picture in enumerate(pictured) for line in picture.lines]
        found = []
        for start in range(0, len(asked), self.questions):
            rows, lines = zip(*asked[start : start + self.questions])
            ids, mask, _ = subject.tokenizer([line.captions[0] for line in lines], subject.data.max_length)
            asked_of = torch.tensor(rows, device=subject.device) - rows[0]
            given = ids.to(subject.device), mask.to(subject.device), asked_of
            found += zip(lines, say(image[rows[0] : rows[-1] + 1], *given))
        return found

    def _protocol(self, how: str, known: list[str], lines: list[RawSample], source: Annotated) -> str:
        ways = {
            "rank": f"the likeliest whole answer of the {min(self.k, len(known))} whose first token is likeliest, of a list of {len(known):,}"
            + (", the first token counted twice" if self.double_first else ""),
            "write": f"written with {self.beams} beams, {self.max_answer} tokens at most",
            "classify": f"the highest of {len(known):,} classes",
        }
        official = "VQA's official accuracy, min(1, matches / 3) over all but one annotator"
        measure = official if self._metric(lines, source) == "vqa" else "share of answers equal to the only right one"
        return f"{ways[how]}; {measure}"

    def _metric(self, lines: list[RawSample], source: Annotated) -> str:
        return self.metric or ("vqa" if any(len(_said(line, source)) > 1 for line in lines) else "exact")

    def _metrics(
        self,
        lines: list[RawSample],
        said: list[str],
        known: list[str],
        source: Annotated,
        prior: QuestionPrior | None,
        subject: EvalModel,
    ) -> tuple[dict[str, Interval], dict[str, Any]]:
        score = self._score(lines, source, subject)
        told = [n for n, line in enumerate(lines) if line.answers]
        groups = np.array([lines[n].image_id for n in told])
        if not told:
            return {}, {"answers": len(said)}

        def mean(values: Iterable[float], of: np.ndarray | slice = slice(None)) -> Interval:
            return bootstrap(np.array(list(values))[of], groups[of], subject.seed, self.resamples)

        scores = [score(lines[n], said[n]) for n in told]
        metrics = {"accuracy": mean(scores)}
        kinds = np.array([str(lines[n].meta.get("answer_type", "")) for n in told])
        metrics |= {f"accuracy_{kind}": mean(scores, kinds == kind) for kind in sorted(set(kinds) - {""})}
        if prior:
            metrics["prior"] = mean(score(lines[n], prior(lines[n].captions[0])) for n in told)
        among = set(known)
        unknown = [n for n in told if known and among.isdisjoint(dict(lines[n].answers))]
        if known:
            best = (max((score(lines[n], a) for a, _ in lines[n].answers if a in among), default=0.0) for n in told)
            metrics["answerable"] = mean(best)
        true = [line.answers[0][0] if line.answers else "" for line in lines]
        wrong = [n for n, hit in zip(told, scores) if not hit]
        taken = [true[n] if hit else said[n] for n, hit in zip(told, scores)]  # right in other words is right
        details = mistakes(source, [(lines[n], said[n], true[n]) for n in wrong]) | {
            "confused": mixed_up(taken, [true[n] for n in told]),
            "not_in_list": {"questions": len(unknown), "answers": [true[n] for n in unknown[:SHOWN]]},
        }
        return metrics, details

    def _score(
        self, lines: list[RawSample], source: Annotated, subject: EvalModel
    ) -> Callable[[RawSample, str], float]:
        """From 0 to 1, how right an answer to the question of a line is."""
        if self._metric(lines, source) == "vqa":
            return lambda line, answer: accuracy(answer, _said(line, source))
        tokenizer = subject.tokenizer

        def written(answer: str) -> str:  # as a decoder would write it: in its case, and with its spaces
            return tokenizer.text(tokenizer.target_rows([answer])[0])

        return lambda line, answer: float(
            answer in dict(line.answers) or written(answer) in [written(each) for each, _ in line.answers]
        )


def _said(line: RawSample, source: Annotated) -> list[str]:
    """What each annotator said."""
    given = line.meta.get(source.answers)
    return [word(each) for each in given] if isinstance(given, list) else [answer for answer, _ in line.answers]


def _questions(source: Annotated) -> Annotated:
    """One class a question is one answer too, and an answer that is no class is a wrong one, not a bad sample."""
    return replace(source, answers=source.answers or source.label or "answers", label=None)


def _trained(data: Data) -> list[Annotated]:
    """What the run was trained on, as far as it is there."""
    sources = [_questions(source) for source in data.train if isinstance(source, Annotated)]
    return [source for source in sources if Path(source.path).expanduser().is_file()]
