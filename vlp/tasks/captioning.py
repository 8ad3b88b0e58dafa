"""Captions written by beam search, and how much they have in common with those of people (CIDEr, Vedantam et al. 2015)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import numpy as np
import torch

from vlp.config import Data
from vlp.data.reading.shards import RawSample
from vlp.data.stream import EvalDataset, evaluation_batches
from vlp.distributed import gather_objects, world_size
from vlp.encoders.generate import beam_search
from vlp.errors import UserError
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task, evaluating
from vlp.tasks.metrics import Interval, bootstrap
from vlp.tasks.submission import check_submission, write_submission

EXAMPLES = 100


@dataclass(frozen=True)
class CaptionQuality(Task):
    """A caption for every picture of shards, compared with its own ones by CIDEr-D.

    The words are those of a regular expression, lower case without punctuation: the published numbers are of the Penn Treebank
    tokenizer, which needs Java, and differ a little.

    Args:
        data: shards; None = ``data.val`` of the experiment.
        beams: of the search; BLIP's is 3.
        max_length: tokens.
        min_length: tokens.
        length_penalty: see `vlp.encoders.generate.beam_search`.
        submission: where to write ``[{"image_id": ..., "caption": ...}]``, as COCO's server takes it; the id is the json's
            ``image_id``, or Karpathy's ``cocoid``, or else the sample's key. The server takes none but all pictures.
        batch_size: pictures at a time.
        resamples: of the bootstrap, over pictures.
    """

    name = "captioning"
    headline = "cider"

    data: str | None = None
    beams: int = setting(3, least=1)
    max_length: int = setting(20, least=2)
    min_length: int = 5
    length_penalty: float = 1.0
    submission: str | None = setting(None, changes_result=False)
    batch_size: int = setting(32, least=1, changes_result=False)
    resamples: int = setting(1000, least=0, changes_result=False)

    def validate(self, data: Data) -> None:
        """Raises UserError where there is no data, or the package that scores is not there."""
        self._source(data)
        if not 0 <= self.min_length <= self.max_length:
            raise UserError("captioning: min_length is 0 or more, and at most max_length")
        if self.submission:
            check_submission(self.submission)
        _scorer()

    def evaluated_images(self, data: Data) -> str:
        """The shards, see `vlp.tasks.contamination`."""
        return self._source(data)

    def _source(self, data: Data) -> str:
        if not (source := self.data or data.val):
            raise UserError("captioning has no data: give data=SHARDS, or set data.val")
        return source

    def evaluate(self, subject: EvalModel) -> Result:
        """Metric: ``cider``, which is no fraction: 1.3 and more are published on COCO as 130."""
        decoder, source = getattr(subject.model, "decoder", None), self._source(subject.data)
        if decoder is None or decoder.source != "image":
            raise UserError("captioning needs layers that write about pictures: model.decoder=Decoder(source='image')")
        dataset = EvalDataset(source, subject.data.resize, subject.preprocess, subject.data.max_pixels)
        own, bad = [], []
        with evaluating(subject.model):
            for samples, unusable in evaluation_batches(
                dataset, self.batch_size, subject.data.workers, subject.rank, world_size()
            ):
                bad += unusable
                if samples:
                    own += zip((raw for _, raw in samples), self._captions(subject, [image for image, _ in samples]))
        # what the pictures hold does not travel
        own = [(raw.source_row, raw.image_id, picture_id(raw), raw.captions, said) for raw, said in own]
        found = sorted((row for part in gather_objects(own) for row in part), key=lambda row: row[0])
        if not found:
            raise UserError(f"{source} holds no usable picture; run `vlp data check` on it")
        bad = [b for part in gather_objects(bad) for b in part]
        if self.submission:
            answers = [{"image_id": image, "caption": said} for _, _, image, _, said in found]
            write_submission(self.submission, json.dumps(answers), bad, subject.rank)
        told = [(index, captions, said) for _, index, _, captions, said in found if captions]
        scores = cider([said for _, _, said in told], [captions for _, captions, _ in told])
        mean = bootstrap(scores, np.array([index for index, _, _ in told]), subject.seed, self.resamples)
        return Result(
            protocol=f"beams {self.beams}, {self.min_length} to {self.max_length} tokens, by log-probability / tokens ^ "
            f"{self.length_penalty:g}; CIDEr-D of pycocoevalcap on lower-case words, not of the Penn Treebank tokenizer",
            data=source,
            n={"images": len(told)},
            metrics={"cider": Interval(mean.value, mean.low, mean.high, percent=False)},
            details={"examples": [{"caption": said, "true": captions} for _, captions, said in told[:EXAMPLES]]},
            bad=bad,
        )

    def _captions(self, subject: EvalModel, images: list[torch.Tensor]) -> list[str]:
        model, tokenizer = subject.model, subject.tokenizer
        pixels = torch.stack(images).to(subject.device)
        described = model.describe(model.encode_image(subject.preprocess.normalise(pixels)))
        found = beam_search(
            model.decoder,
            described,
            tokenizer.cls_id,
            tokenizer.sep_id,
            self.max_length,
            self.beams,
            self.min_length,
            self.length_penalty,
        )
        return [tokenizer.text(ids) for ids in found]


def picture_id(raw: RawSample) -> int | str:
    """COCO's number of a picture, by its own annotations or by Karpathy's; the key of one that has none."""
    return raw.meta.get("image_id", raw.meta.get("cocoid", raw.key))


def cider(said: list[str], true: list[tuple[str, ...]]) -> np.ndarray:
    """(n,) CIDEr-D of each text against its own references; rare words, by all references, weigh more.

    Raises:
        UserError: if the package that computes it is not installed.
    """
    references = {n: [words(text) for text in texts] for n, texts in enumerate(true)}
    return np.asarray(_scorer()().compute_score(references, {n: [words(text)] for n, text in enumerate(said)})[1])


def words(text: str) -> str:
    return " ".join(re.findall(r"[\w']+", text.lower()))


def _scorer() -> type:
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        raise UserError("CIDEr needs pycocoevalcap: pip install 'vlp[captioning]'") from None
    return Cider
