"""Does a model tell a scene's caption from one with the same words in another order? On a world of `vlp data world`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlp.config import Data
from vlp.data.reading.shards import ShardReader
from vlp.data.stream import EvalDataset, evaluation_batches
from vlp.distributed import gather_objects, world_size
from vlp.errors import UserError
from vlp.files import local_path
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task, evaluating
from vlp.tasks.metrics import bootstrap


@dataclass(frozen=True)
class MinimalPairs(Task):
    """Share of scenes whose own caption scores higher than that of their minimal pair. Chance is 50 %: a tie is half a hit.

    The score is the logit of image-text matching, or the cosine where a model has no head for that.

    Args:
        data: a world; None = the one that ``data.val`` of the experiment is of.
        split: of the world; val has no swapped captions.
        batch_size: scenes at a time.
        resamples: of the bootstrap, over minimal pairs, whose two scenes are drawn together.
    """

    name = "minimal-pairs"
    headline = "accuracy"

    data: str | None = None
    split: str = "val"
    batch_size: int = setting(64, least=1, changes_result=False)
    resamples: int = setting(1000, least=0, changes_result=False)

    def validate(self, data: Data) -> None:
        """Raises UserError where there are no scenes."""
        reader = ShardReader(self._source(data))
        if len(reader) == 0 or "minimal_pair" not in reader.read(*reader.locate(0)).meta:
            raise UserError(f"{self._source(data)} holds no scenes with a minimal pair; make some with vlp data world")

    def evaluated_images(self, data: Data) -> str:
        """The shards, see `vlp.tasks.contamination`."""
        return self._source(data)

    def _source(self, data: Data) -> str:
        world = self.data or (data.val and local_path(data.val).parent)
        if not world:
            raise UserError("minimal-pairs has no data: give data=FOLDER, made by vlp data world")
        return str(Path(world) / self.split)

    def evaluate(self, subject: EvalModel) -> Result:
        """Metrics: ``accuracy``, and by what has been exchanged: ``accuracy_order``, ``_shape``, ``_colour``."""
        data, source = subject.data, self._source(subject.data)
        dataset = EvalDataset(source, data.resize, subject.preprocess, data.max_pixels)
        own, bad = [], []
        with evaluating(subject.model):
            for samples, unusable in evaluation_batches(
                dataset, self.batch_size, data.workers, subject.rank, world_size()
            ):
                bad += unusable
                if not samples:
                    continue
                raws = [raw for _, raw in samples]
                texts = [raw.captions[0] for raw in raws] + [raw.meta["minimal_pair"] for raw in raws]
                true, false = scores(subject, torch.stack([image for image, _ in samples]), texts).chunk(2)
                hits = ((true > false).double() + (true == false) / 2).tolist()
                own += [
                    (raw.source_row, raw.meta["number"] // 2, raw.meta["contrast"], h) for raw, h in zip(raws, hits)
                ]
        found = sorted(row for part in gather_objects(own) for row in part)
        if not found:
            raise UserError(f"{source} holds no usable scene; run `vlp data check` on it")
        _, pairs, contrasts, hits = map(np.array, zip(*found))
        which = {"accuracy": np.ones(len(hits), bool)}
        which |= {f"accuracy_{contrast}": contrasts == contrast for contrast in sorted(set(contrasts.tolist()))}
        return Result(
            protocol=f"own caption against the minimal pair's, by {'the matching logit' if _matches(subject) else 'cosine'}"
            ", a tie is half a hit",
            data=source,
            n={"scenes": len(hits)},
            metrics={name: bootstrap(hits[of], pairs[of], subject.seed, self.resamples) for name, of in which.items()},
            bad=[b for part in gather_objects(bad) for b in part],
        )


def _matches(subject: EvalModel) -> bool:
    return getattr(subject.model, "itm", None) is not None


def scores(subject: EvalModel, pixels: Tensor, texts: list[str]) -> Tensor:
    """(B, 3, H, W) pictures and n texts, whole rounds of the pictures, to (n,) scores on the CPU.

    Raises:
        UserError: if a score is not finite.
    """
    model, device = subject.model, subject.device
    input_ids, mask, _ = subject.tokenizer(texts, subject.data.max_length)
    image = model.encode_image(subject.preprocess.normalise(pixels.to(device)))
    text = model.encode_text(input_ids.to(device), mask.to(device))
    if _matches(subject):
        found = model.match(model.project(image), text)[:, 1]
    else:
        found = (text.embed.unflatten(0, (-1, len(pixels))) * image.embed).sum(-1).flatten()
    if not found.isfinite().all():
        raise UserError("the model's scores are not finite; choose another checkpoint")
    return found.float().cpu()
