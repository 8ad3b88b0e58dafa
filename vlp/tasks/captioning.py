"""Captioning: captions written by beam search, scored by CIDEr-D (Vedantam et al. 2015)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from vlp.config import Data
from vlp.data.reading.shards import RawSample
from vlp.data.stream import EvalDataset
from vlp.encoders.generate import beam_search
from vlp.errors import UserError
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task
from vlp.tasks.metrics import Interval, bootstrap
from vlp.tasks.sharded import ShardedBatches
from vlp.tasks.submission import check_submission, write_submission

MAX_EXAMPLES = 100  # that a result keeps


@dataclass(frozen=True)
class CaptionQuality(Task):
    """Write a caption for every image of shards, and compare it with the image's own captions by CIDEr-D.

    Words are found by a regular expression, in lower case without punctuation. Published numbers use the Penn Treebank
    tokenizer, which needs Java, and differ slightly. The metric is ``cider``, which is not a fraction: values of 1.3 and more
    are published on COCO as 130.

    Args:
        data: Shards. None uses ``data.val`` of the experiment.
        beams: Beams of the search. BLIP uses 3.
        max_length: Tokens of a caption at most.
        min_length: Tokens of a caption at least.
        length_penalty: See `vlp.encoders.generate.beam_search`.
        submission: File for ``[{"image_id": ..., "caption": ...}]``, as COCO's server takes it. The id is the json's
            ``image_id``, or Karpathy's ``cocoid``, or else the sample's key. The server accepts only complete submissions.
        batch_size: Images at a time.
        resamples: Bootstrap resamples, over images.
        blind: Whether to evaluate a second time with the images of other samples. A metric that is as high without the right
            image says nothing about reading it. Doubles the cost.
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
    blind: bool = setting(True, changes_result=False)

    def metric_names(self) -> tuple[str, ...]:
        return ("cider",)

    def validate(self, data: Data) -> None:
        self._source(data)
        if not 0 <= self.min_length <= self.max_length:
            raise UserError(f"captioning: min_length is {self.min_length}; give 0 or more, and at most max_length")
        if self.submission:
            check_submission(self.submission)
        _scorer()

    def evaluated_images(self, data: Data) -> str:
        return self._source(data)

    def _source(self, data: Data) -> str:
        if not (source := self.data or data.val):
            raise UserError("captioning has no data; give data=SHARDS, or set data.val")
        return source

    def for_blind(self) -> CaptionQuality:
        return replace(self, submission=None)

    def evaluate(self, model: EvalModel) -> Result:
        if not model.model.can_caption:
            raise UserError("captioning needs a decoder that reads images: model.decoder=Decoder(source='image')")
        source = self._source(model.data)
        dataset = EvalDataset(source, model.data.resize, model.preprocess, model.data.max_pixels)
        batches = ShardedBatches(model, dataset, self.batch_size)
        rows = []
        for samples in batches:
            captions = self.write_captions(model, [image for image, _ in samples])
            # the pixels stay in this process
            rows += [
                (raw.source_row, raw.image_id, image_name(raw), raw.captions, caption)
                for (_, raw), caption in zip(samples, captions)
            ]
        rows, bad = batches.gather(rows)
        if not rows:
            raise UserError(f"{source} has no usable image; run `vlp data check` on it")
        if self.submission:
            answers = [{"image_id": name, "caption": caption} for _, _, name, _, caption in rows]
            write_submission(self.submission, json.dumps(answers), bad)
        scored = [(image_id, references, caption) for _, image_id, _, references, caption in rows if references]
        metrics = {}
        if scored:  # a test set may keep its references back
            image_ids, references, captions = map(list, zip(*scored))
            mean = bootstrap(cider(captions, references), np.array(image_ids), model.seed, self.resamples)
            metrics["cider"] = Interval(mean.value, mean.low, mean.high, percent=False)
        return Result(
            protocol=f"beams {self.beams}, {self.min_length} to {self.max_length} tokens, by log-probability / tokens ^ "
            f"{self.length_penalty:g}; CIDEr-D of pycocoevalcap on lower-case words, not of the Penn Treebank tokenizer",
            data=source,
            n={"images": len(scored)},
            metrics=metrics,
            details={"examples": [{"caption": c, "true": r} for _, r, c in scored[:MAX_EXAMPLES]]},
            bad=bad,
        )

    def write_captions(self, model: EvalModel, images: list[Tensor]) -> list[str]:
        """Write a caption for each resized (3, H, W) uint8 image."""
        network, tokenizer = model.model, model.tokenizer
        found = beam_search(
            network.decoder,
            network.describe(model.encode_images(images)),
            tokenizer.cls_id,
            tokenizer.sep_id,
            self.max_length,
            self.beams,
            self.min_length,
            self.length_penalty,
        )
        return [tokenizer.text(ids) for ids in found]


def image_name(raw: RawSample) -> int | str:
    """Return COCO's number of an image, by its own annotations or by Karpathy's, or else the sample's key."""
    return raw.meta.get("image_id", raw.meta.get("cocoid", raw.key))


def cider(captions: list[str], references: list[tuple[str, ...]]) -> np.ndarray:
    """Return (n,) CIDEr-D of each caption against its references. Words that are rare in all references weigh more.

    Raises:
        UserError: if the package that computes it is not installed.
    """
    true = {n: [words(text) for text in texts] for n, texts in enumerate(references)}
    return np.asarray(_scorer()().compute_score(true, {n: [words(text)] for n, text in enumerate(captions)})[1])


def words(text: str) -> str:
    return " ".join(re.findall(r"[\w']+", text.lower()))


def _scorer() -> type:
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        raise UserError("CIDEr needs pycocoevalcap: pip install 'vlp[captioning]'") from None
    return Cider
