"""Semantic textual similarity: does the cosine of two sentences rise with what people say of them?

n pairs, s distinct sentences, D width of the features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.config import Data
from vlp.data.reading.tables import Lines
from vlp.distributed import gather_objects, world_size
from vlp.errors import UserError
from vlp.files import local_path
from vlp.losses.geometry import uniformity
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task, evaluating
from vlp.tasks.metrics import Interval, bootstrap, percentiles, resampled_spearman, spearman
from vlp.tasks.probe import Features, chosen, gather_rows
from vlp.tasks.requirements import need_alone

Pairs = list[tuple[float, str, str]]  # (score, sentence, sentence)

NO_TEXT = (
    "sentence similarity needs a text tower, and its tokenizer: give tokenizer=FOLDER for weights that bring none, or "
    "evaluate pictures with knn or probe"
)
STANDARD = ("sts12", "sts13", "sts14", "sts15", "sts16", "stsb-test", "sick-test")


@dataclass(frozen=True)
class SentenceSimilarity(Task):
    """Spearman's correlation of cosine similarities with people's scores, by SimCSE's protocol (Gao et al. 2021, app. B).

    All pairs of a file are ranked together (the "all" setting), without a regressor on top.

    Args:
        data: folder with TASK.tsv files of lines ``score<TAB>sentence<TAB>sentence``; further columns are not read.
        tasks: files that the mean is over.
        geometry: files of the alignment of pairs scored above 4, and of the uniformity of all distinct sentences; the
            paper takes all of STS-B. () = neither.
        features: "pooled", the tower's own output, or "embed", what the head makes of it for the loss.
        max_length: tokens of a sentence; None = data.max_length of the run. Longer ones are cut, and counted.
        batch_size: sentences encoded at a time.
        resamples: of the bootstraps, over pairs.
    """

    name = "sts"
    headline = "mean"
    lower_is_better = ("alignment", "uniformity")

    data: str = ""
    tasks: tuple[str, ...] = STANDARD
    geometry: tuple[str, ...] = ("stsb-train", "stsb-dev", "stsb-test")
    features: Features = "pooled"
    max_length: int | None = setting(None, least=2)
    batch_size: int = setting(128, least=1, changes_result=False)
    resamples: int = setting(1000, least=0, changes_result=False)

    def validate(self, data: Data) -> None:
        """Raises UserError where a file is missing or cannot be read, or there is no tokenizer."""
        self._read()
        if not data.tokenizer:
            raise UserError(NO_TEXT)

    def _read(self) -> dict[str, Pairs]:
        if not self.data or not self.tasks:
            raise UserError(f"sts has no data: give data=FOLDER with {', '.join(self.tasks or STANDARD)} as .tsv files")
        files = {
            name: read_pairs(local_path(self.data) / f"{name}.tsv")
            for name in {**dict.fromkeys(self.tasks + self.geometry)}
        }
        if self.geometry and not any(score > 4 for name in self.geometry for score, _, _ in files[name]):
            raise UserError(
                f"no pair of {', '.join(self.geometry)} scores above 4; set geometry= to leave alignment out"
            )
        return files

    def evaluate(self, subject: EvalModel) -> Result:
        """Metrics: Spearman's rho of each task and their ``mean``; ``alignment`` and ``uniformity``, lower is better."""
        files = self._read()
        if subject.tokenizer is None:
            raise UserError(NO_TEXT)
        need_alone(subject, "sts", "text")
        longest = getattr(getattr(subject.model, "text", None), "max_length", math.inf)
        if not 1 <= self._tokens(subject.data) <= longest:
            raise UserError(f"max_length={self._tokens(subject.data)} but the text tower takes 1 to {longest} tokens")
        sentences = sorted({sentence for pairs in files.values() for _, *both in pairs for sentence in both})
        rows, cut = self._encode(subject, sentences)
        number = {sentence: n for n, sentence in enumerate(sentences)}
        metrics, resampled = {}, []
        for i, name in enumerate(self.tasks):
            scores, a, b = zip(*files[name])
            cosines = (rows[[number[s] for s in a]].double() * rows[[number[s] for s in b]].double()).sum(1).numpy()
            resampled.append(resampled_spearman(cosines, np.array(scores), subject.seed + i, self.resamples))
            metrics[name] = percentiles(spearman(cosines, np.array(scores)), resampled[-1], percent=False)
        mean = float(np.mean([metrics[name].value for name in self.tasks]))
        metrics["mean"] = percentiles(mean, np.mean(resampled, axis=0), percent=False)
        protocol = (
            f"Spearman of cosines over all pairs of a file, {self.features} features, at most {self._tokens(subject.data)} "
            f"tokens; mean of {', '.join(self.tasks)}"
        )
        if self.geometry:
            pairs = [(number[a], number[b]) for name in self.geometry for score, a, b in files[name] if score > 4]
            x, y = rows[[a for a, _ in pairs]], rows[[b for _, b in pairs]]
            of_geometry = sorted({number[s] for name in self.geometry for _, *both in files[name] for s in both})
            metrics["alignment"] = alignment_interval(x, y, subject.seed, self.resamples)
            metrics["uniformity"] = uniformity_interval(rows[of_geometry], subject.seed)
            protocol += f"; alignment (pairs above 4) and uniformity of {' + '.join(self.geometry)}"
        return Result(
            protocol=protocol,
            data=self.data,
            n={
                "pairs": sum(len(files[name]) for name in self.tasks),
                "sentences": len(sentences),
                "cut sentences": cut,
            },
            metrics=metrics,
            details={"pairs": {name: len(files[name]) for name in self.tasks}},
        )

    def _tokens(self, data: Data) -> int:
        return data.max_length if self.max_length is None else self.max_length

    def _encode(self, subject: EvalModel, sentences: list[str]) -> tuple[Tensor, int]:
        """(s, D) unit-norm features, and how many sentences were cut; the same for any number of processes."""
        order = sorted(range(len(sentences)), key=lambda n: len(sentences[n]))  # little padding
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        own, cut = [], 0
        with evaluating(subject.model):
            for numbers in batches[subject.rank :: world_size()]:
                texts = [sentences[n] for n in numbers]
                input_ids, mask, over = subject.tokenizer(texts, self._tokens(subject.data))
                encoded = subject.model.encode_text(input_ids.to(subject.device), mask.to(subject.device))
                own.append((numbers, F.normalize(chosen(encoded, self.features), dim=1)))
                cut += over
        rows = gather_rows(len(sentences), own)
        if not (finite := rows.isfinite().all(1)).all():
            sentence = sentences[int(finite.int().argmin())]
            raise UserError(f"the features of {sentence!r} are not finite; evaluate an earlier checkpoint")
        return rows, sum(gather_objects(cut))


def read_pairs(path: Path) -> Pairs:
    """Raises UserError, naming the line, for what is not ``score<TAB>sentence<TAB>sentence``."""
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.tsv")))
        raise UserError(f"no file {path}; the folder has {there or 'no .tsv'}")
    pairs, lines = [], Lines(path)
    for index, number in enumerate(lines.numbers):
        try:
            score, a, b = lines[index].split("\t")[:3]
            pairs.append((float(score), a.strip(), b.strip()))
        except ValueError:
            raise UserError(f"{path} line {number}: expected score, sentence and sentence, apart by tabs") from None
        if not (math.isfinite(pairs[-1][0]) and a.strip() and b.strip()):
            raise UserError(f"{path} line {number}: the score is not finite, or a sentence is empty; drop the line")
    if len(pairs) < 2:
        raise UserError(f"{path} has {len(pairs)} pairs; a correlation needs two or more")
    return pairs


def alignment_interval(x: Tensor, y: Tensor, seed: int, resamples: int) -> Interval:
    """`vlp.losses.geometry.alignment` of unit-norm (n, D) pairs, resampled over pairs."""
    distances = (x - y).double().square().sum(1).numpy()
    found = bootstrap(distances, np.arange(len(distances)), seed, resamples)
    return Interval(found.value, found.low, found.high, percent=False)


def uniformity_interval(x: Tensor, seed: int, parts: int = 20) -> Interval:
    """`vlp.losses.geometry.uniformity` of (s, D) unit-norm rows.

    Resampling all pairs a thousand times would take hours: the interval is the normal one from the spread over ``parts``
    random parts of the rows, or without width where there are too few rows.
    """
    value = float(uniformity(x))
    if len(x) < 2 * parts:
        return Interval(value, value, value, percent=False)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    spread = np.std([float(uniformity(x[part])) for part in order.tensor_split(parts)], ddof=1)
    half = 1.96 * float(spread) / math.sqrt(parts)
    return Interval(value, value - half, value + half, percent=False)
