"""Grounding: where in the image a phrase is, by Grad-CAM, without training on boxes (ALBEF, Li et al. 2021, sec. 6.4).

n phrases, h x w grid of the image tower, H x W pixels of an image. A box is left, top, width, height in pixels, as in COCO and
RefCOCO+.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlp.config import Data
from vlp.data.augment import Resize
from vlp.data.by_image import AnnotatedImage, AnnotatedImageDataset
from vlp.data.reading.annotated import Annotated, AnnotatedReader
from vlp.data.reading.shards import RawSample
from vlp.errors import BadSample, UserError
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task
from vlp.tasks.grad_cam import choose_layer, enlarge, grad_cam, mean_over_tokens
from vlp.tasks.metrics import bootstrap
from vlp.tasks.sharded import ShardedBatches

Box = tuple[float, float, float, float]
METRICS = ("pointing", "pointing_chance", "pointing_centre", "accuracy", "accuracy_chance", "accuracy_best")


@dataclass(frozen=True)
class Grounding(Task):
    """Compare the heat map of a phrase with its box.

    The map is the mean over the tokens of the phrase, resized to the image, which the model sees uncropped. ``pointing`` is the
    pointing game: the maximum of the map is inside the box. A flat map misses. ``pointing_chance`` is the score of a random
    point, ``pointing_centre`` that of the image's centre. Where lines have proposals, the one with the largest
    ``sum of the map within / area^0.5`` is chosen (published for RefCOCO+), and ``accuracy`` is the share of phrases for which
    its intersection over union with the box is at least ``overlap``. ``accuracy_chance`` and ``accuracy_best`` are the scores of
    a random proposal and of the best one.

    Args:
        data: A .jsonl with text, box and, optionally, proposals and split. `vlp data world` writes one, and
            `vlp data annotations refcoco` makes one of the official files.
        images: Folder that image paths start from, or shards. None uses the folder of ``data``.
        image: Field that names the image, "key" in a world.
        split: Lines of this split. None uses all lines.
        layer: See `vlp.tasks.grad_cam.choose_layer`.
        power: Exponent of the area.
        overlap: Intersection over union at least.
        batch_size: Images at a time.
        resamples: Bootstrap resamples, over images.
        blind: Whether to evaluate a second time with the images of other samples. A metric that is as high without the right
            image says nothing about reading it. Doubles the cost.
    """

    name = "grounding"
    headline = "pointing"
    baselines = ("pointing_chance", "pointing_centre", "accuracy_chance", "accuracy_best")

    data: str | None = None
    images: str | None = setting(None, changes_result=False)
    image: str = setting("image", changes_result=False)
    split: str | None = "val"
    layer: int | None = None
    power: float = 0.5
    overlap: float = 0.5
    batch_size: int = setting(16, least=1, changes_result=False)
    resamples: int = setting(1000, least=0, changes_result=False)
    blind: bool = setting(True, changes_result=False)

    def validate(self, data: Data) -> None:
        if not len(self._source().open()):
            raise UserError(f"{self.data} has no line; give other data")

    def evaluated_images(self, data: Data) -> AnnotatedReader:
        return self._source().open()

    def _source(self) -> Annotated:
        if not self.data:
            raise UserError(
                "grounding has no data; give data=BOXES.jsonl, such as the grounding.jsonl of vlp data world"
            )
        return Annotated(self.data, self.images, (self.image,), split=self.split)

    def evaluate(self, model: EvalModel) -> Result:
        layer = choose_layer(model.model, self.layer)
        dataset = AnnotatedImageDataset(self._source().open(), _uncropped, model.preprocess, model.data.max_pixels)
        batches = ShardedBatches(model, dataset, self.batch_size)
        rows = []
        for images in batches:
            for line, size, cam in heat_maps(model, images, layer):
                try:
                    rows.append((line.source_row, line.image_id, self._score(line, size, cam)))
                except BadSample as e:
                    batches.skip(dataset.reader.quarantine_entry(0, line.row, str(e)))
        rows, bad = batches.gather(rows)
        if not rows:
            raise UserError(
                f"no line of {self.data} has an image and a box, {len(bad)} were skipped, e.g. {bad[0]['reason']}"
            )
        groups, metrics = np.array([index for _, index, _ in rows]), {}
        for name in METRICS:
            scored = np.array([name in scores for *_, scores in rows])
            if scored.any():
                values = np.array([scores[name] for *_, scores in rows if name in scores])
                metrics[name] = bootstrap(values, groups[scored], model.seed, self.resamples)
        return Result(
            protocol=f"Grad-CAM of the matching logit over cross-attention of fusion layer {layer}, mean over the tokens; "
            f"pointing: the maximum is inside the box; accuracy: of the proposal with the largest sum / area^{self.power:g}, "
            f"intersection over union >= {self.overlap:g}",
            data=self._source().described,
            n={
                "phrases": len(rows),
                "images": len(set(groups.tolist())),
                "with proposals": sum("accuracy" in scores for *_, scores in rows),
            },
            metrics=metrics,
            bad=bad,
        )

    def _score(self, line: RawSample, size: tuple[int, int], cam: Tensor) -> dict[str, float]:
        """Score the (h, w) map of a line.

        Raises:
            BadSample: if the line has no valid box, or an invalid proposal.
        """
        box = read_box(line.meta.get("box"))
        given = line.meta.get("proposals") or ()
        if not isinstance(given, (list, tuple)):
            raise BadSample(f"proposals are {str(given)[:80]}, not a list of boxes")
        proposals = [read_box(proposal) for proposal in given]
        heat = enlarge(cam, *size)  # (H, W)
        scores = {
            "pointing": float(points_into(heat, box)),
            "pointing_chance": overlap_area(box, (0, 0, size[1], size[0])) / (size[0] * size[1]),
            "pointing_centre": float(contains(box, size[1] / 2, size[0] / 2)),
        }
        if proposals:
            hits = [intersection_over_union(proposal, box) >= self.overlap for proposal in proposals]
            scores["accuracy"] = float(hits[choose_box(heat, proposals, self.power)])
            scores |= {"accuracy_chance": sum(hits) / len(hits), "accuracy_best": float(any(hits))}
        return scores


def heat_maps(
    model: EvalModel, images: list[AnnotatedImage], layer: int
) -> list[tuple[RawSample, tuple[int, int], Tensor]]:
    """Compute the map of each phrase about a batch of images.

    Returns:
        Line, (H, W) of its image and (h, w) map of each.

    Raises:
        UserError: if a map is not finite.
    """
    lines = [(line, image.images[0][1]) for image in images for line in image.lines]
    image_of = torch.tensor([n for n, image in enumerate(images) for _ in image.lines], device=model.device)  # (n,)
    encoded = model.encode_images([image.images[0][0] for image in images])
    text = model.encode_texts([line.captions[0] for line, _ in lines])
    maps = mean_over_tokens(grad_cam(model.model, encoded, text, layer, image_of), text.mask).cpu()  # (n, h, w)
    if not maps.isfinite().all():
        raise UserError("the model's heat maps are not finite; choose another checkpoint")
    return [(line, size, cam) for (line, size), cam in zip(lines, maps)]


def _uncropped(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> tuple[Tensor, tuple[int, int]]:
    """Return the whole image at the model's size, and the (H, W) that boxes refer to."""
    return Resize(mode="squash")(pixels, size, interpolation), pixels.shape[:2]


def read_box(given: object) -> Box:
    """Return a box. Raises BadSample unless it is left, top, and a width and a height above 0."""
    if (
        not isinstance(given, (list, tuple))
        or len(given) != 4
        or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in given)
        or min(given[2:]) <= 0
    ):
        raise BadSample(f"the box {str(given)[:80]} is not [left, top, width, height] in pixels")
    return tuple(given)


def points_into(heat: Tensor, box: Box) -> bool:
    """Return whether the centre of the hottest pixel of an (H, W) map is in the box, False for a flat map."""
    if heat.max() == heat.min():
        return False
    y, x = divmod(int(heat.argmax()), heat.shape[1])
    return contains(box, x + 0.5, y + 0.5)


def contains(box: Box, x: float, y: float) -> bool:
    return box[0] <= x < box[0] + box[2] and box[1] <= y < box[1] + box[3]


def choose_box(heat: Tensor, proposals: Sequence[Box], power: float) -> int:
    """Return the number of the proposal with the largest ``sum of (H, W) heat within / area^power``.

    Published with power 0.5. Pixels start at int(left) and int(top). The published code initialises the best score with 0
    instead of -inf, so that a map without heat in any proposal kept the box of the phrase before.
    """
    scores = []
    for left, top, width, height in proposals:
        rows, columns = slice(max(int(top), 0), int(top + height)), slice(max(int(left), 0), int(left + width))
        scores.append(float(heat[rows, columns].sum()) / (width * height) ** power)
    return int(np.argmax(scores))


def overlap_area(a: Box, b: Box) -> float:
    """Return the area in square pixels that two boxes share."""
    width, height = (min(a[n] + a[n + 2], b[n] + b[n + 2]) - max(a[n], b[n]) for n in (0, 1))
    return max(width, 0) * max(height, 0)


def intersection_over_union(a: Box, b: Box) -> float:
    shared = overlap_area(a, b)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)
