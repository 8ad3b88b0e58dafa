"""Semantic textual similarity: correlation of the cosine of two sentences with human similarity scores.

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
from vlp.distributed import gather_objects
from vlp.errors import UserError
from vlp.files import local_path
from vlp.losses.geometry import uniformity
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task
from vlp.tasks.features import Features, select_features
from vlp.tasks.metrics import Interval, bootstrap, percentiles, resampled_spearman, spearman
from vlp.tasks.requirements import need_features, need_length, need_tokenizer
from vlp.tasks.sharded import gather_rows, length_batches

Pairs = list[tuple[float, str, str]]  # (score, sentence, sentence)

STANDARD = ("sts12", "sts13", "sts14", "sts15", "sts16", "stsb-test", "sick-test")


@dataclass(frozen=True)
class SentenceSimilarity(Task):
    """Spearman's correlation of cosine similarities with human scores, by SimCSE's protocol (Gao et al. 2021, app. B).

    All pairs of a file are ranked together (the "all" setting), without a regressor on top. Metrics are Spearman's rho of each
    task, their ``mean``, and ``alignment`` and ``uniformity``, of which lower is better.

    Args:
        data: Folder with TASK.tsv files of lines ``score<TAB>sentence<TAB>sentence``. Further columns are not read.
        tasks: Files that the mean is over.
        geometry: Files for the alignment of pairs scored above 4 and the uniformity of all distinct sentences. The paper takes
            all of STS-B. Empty computes neither.
        features: "pooled", the output of the tower, or "embed", the output of the head that the loss reads.
        max_length: Tokens of a sentence. None uses ``data.max_length`` of the run. Longer sentences are truncated and counted.
        batch_size: Sentences encoded at a time.
        resamples: Bootstrap resamples, over pairs.
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
        self._read()
        need_tokenizer(data, self.name)

    def _read(self) -> dict[str, Pairs]:
        if not self.data or not self.tasks:
            raise UserError(f"sts has no data; give data=FOLDER with {', '.join(self.tasks or STANDARD)} as .tsv files")
        names = dict.fromkeys(self.tasks + self.geometry)  # each once, in this order
        files = {name: read_pairs(local_path(self.data) / f"{name}.tsv") for name in names}
        if self.geometry and not any(score > 4 for name in self.geometry for score, _, _ in files[name]):
            raise UserError(f"no pair of {', '.join(self.geometry)} scores above 4; set geometry= to skip alignment")
        return files

    def evaluate(self, model: EvalModel) -> Result:
        files = self._read()
        need_features(model, self.name, "text")
        max_length = model.data.max_length if self.max_length is None else self.max_length
        need_length(model, max_length)
        sentences = sorted({sentence for pairs in files.values() for _, *both in pairs for sentence in both})
        rows, truncated = self._encode(model, sentences, max_length)
        number = {sentence: n for n, sentence in enumerate(sentences)}
        metrics, resampled = {}, []
        for i, name in enumerate(self.tasks):
            scores, a, b = zip(*files[name])
            x, y = (rows[[number[sentence] for sentence in side]].double() for side in (a, b))  # (n, D)
            cosines = (x * y).sum(1).numpy()
            resampled.append(resampled_spearman(cosines, np.array(scores), model.seed + i, self.resamples))
            metrics[name] = percentiles(spearman(cosines, np.array(scores)), resampled[-1], percent=False)
        mean = float(np.mean([metrics[name].value for name in self.tasks]))
        metrics["mean"] = percentiles(mean, np.mean(resampled, axis=0), percent=False)
        protocol = (
            f"Spearman of cosines over all pairs of a file, {self.features} features, at most {max_length} tokens; mean of "
            f"{', '.join(self.tasks)}"
        )
        if self.geometry:
            close = [(number[a], number[b]) for name in self.geometry for score, a, b in files[name] if score > 4]
            x, y = rows[[a for a, _ in close]], rows[[b for _, b in close]]
            distinct = sorted({number[s] for name in self.geometry for _, *both in files[name] for s in both})
            metrics["alignment"] = alignment_interval(x, y, model.seed, self.resamples)
            metrics["uniformity"] = uniformity_interval(rows[distinct], model.seed)
            protocol += f"; alignment (pairs above 4) and uniformity of {' + '.join(self.geometry)}"
        return Result(
            protocol=protocol,
            data=self.data,
            n={
                "pairs": sum(len(files[name]) for name in self.tasks),
                "sentences": len(sentences),
                "truncated sentences": truncated,
            },
            metrics=metrics,
            details={"pairs": {name: len(files[name]) for name in self.tasks}},
        )

    def _encode(self, model: EvalModel, sentences: list[str], max_length: int) -> tuple[Tensor, int]:
        """Return (s, D) unit-norm features, and how many sentences were truncated."""
        own, truncated = [], 0
        for positions in length_batches(torch.tensor([len(s) for s in sentences]), self.batch_size):
            texts = [sentences[n] for n in positions.tolist()]
            input_ids, mask, over = model.tokenizer(texts, max_length)
            encoded = model.model.encode_text(input_ids.to(model.device), mask.to(model.device))
            features = select_features(encoded, self.features).float().cpu()  # (B, D)
            own.append((positions, F.normalize(features, dim=1)))
            truncated += over
        rows = gather_rows(len(sentences), own)
        if not (finite := rows.isfinite().all(1)).all():
            sentence = sentences[int(finite.int().argmin())]
            raise UserError(f"the features of {sentence!r} are not finite; evaluate an earlier checkpoint")
        return rows, sum(gather_objects(truncated))


def read_pairs(path: Path) -> Pairs:
    """Read lines of ``score<TAB>sentence<TAB>sentence``.

    Raises:
        UserError: for another line, naming it.
    """
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in path.parent.glob("*.tsv")))
        raise UserError(f"no file {path}; the folder has {names or 'no .tsv'}")
    pairs, lines = [], Lines(path)
    for index, number in enumerate(lines.numbers):
        try:
            score, a, b = lines[index].split("\t")[:3]
            pairs.append((float(score), a.strip(), b.strip()))
        except ValueError:
            raise UserError(f"{path} line {number}: expected score, sentence and sentence, separated by tabs") from None
        if not (math.isfinite(pairs[-1][0]) and a.strip() and b.strip()):
            raise UserError(f"{path} line {number}: the score is not finite, or a sentence is empty; drop the line")
    if len(pairs) < 2:
        raise UserError(f"{path} has {len(pairs)} pairs; a correlation needs two or more")
    return pairs


def alignment_interval(x: Tensor, y: Tensor, seed: int, resamples: int) -> Interval:
    """Return `vlp.losses.geometry.alignment` of unit-norm (n, D) pairs, resampled over pairs."""
    distances = (x - y).double().square().sum(1).numpy()
    found = bootstrap(distances, np.arange(len(distances)), seed, resamples)
    return Interval(found.value, found.low, found.high, percent=False)


def uniformity_interval(x: Tensor, seed: int, parts: int = 20) -> Interval:
    """Return `vlp.losses.geometry.uniformity` of (s, D) unit-norm rows.

    A bootstrap over all pairs would take hours. The interval is instead the normal one from the spread over ``parts`` random
    parts of the rows. It has no width if there are fewer than two rows for each part.
    """
    value = float(uniformity(x))
    if len(x) < 2 * parts:
        return Interval(value, value, value, percent=False)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    spread = np.std([float(uniformity(x[part])) for part in order.tensor_split(parts)], ddof=1)
    half = 1.96 * float(spread) / math.sqrt(parts)
    return Interval(value, value - half, value + half, percent=False)
