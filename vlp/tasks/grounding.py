"""Grounding: where in the picture is what a phrase names? By Grad-CAM, without ever having been told (ALBEF, sec. 6.4).

n phrases, h x w the grid of an image tower, H x W the pixels of a picture. A box is left, top, width, height in pixels, as
COCO and RefCOCO+ write it.
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
from vlp.data.stream import evaluation_batches
from vlp.distributed import gather_objects, world_size
from vlp.errors import BadSample, UserError
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task, evaluating
from vlp.tasks.grad_cam import choose_layer, enlarged, grad_cam, mean_over
from vlp.tasks.metrics import bootstrap

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Grounding(Task):
    """Does the heat map of a phrase find its box?

    The map is the mean over the phrase's tokens, scaled up to the picture, which the model sees whole, whatever its shape.
    The pointing game asks whether the map's maximum is inside the box; a map without a maximum misses. Where lines have
    proposals, the one with the largest ``sum of the map within / area^0.5`` is chosen (published for RefCOCO+); it is right
    if intersection over union with the box is at least ``overlap``.

    Args:
        data: a .jsonl with text, box and, optionally, proposals and split; `vlp data world` writes one, and `vlp data annotations
            refcoco` makes one of the official files.
        images: folder that pictures' paths start from, or shards; None = the folder of ``data``.
        image: the field that names the picture; in a world "key".
        split: lines of this split; None = all.
        layer: see `vlp.tasks.grad_cam.choose_layer`.
        power: of the area.
        overlap: least intersection over union.
        batch_size: pictures at a time.
        resamples: of the bootstrap, over pictures.
    """

    name = "grounding"
    headline = "pointing"

    data: str | None = None
    images: str | None = setting(None, changes_result=False)
    image: str = setting("image", changes_result=False)
    split: str | None = "val"
    layer: int | None = None
    power: float = 0.5
    overlap: float = 0.5
    batch_size: int = setting(16, least=1, changes_result=False)
    resamples: int = setting(1000, least=0, changes_result=False)

    def validate(self, data: Data) -> None:
        """Raises UserError where there is no line, or the file cannot be read."""
        if not len(self._source().open()):
            raise UserError(f"{self.data} holds no line; give other data")

    def evaluated_images(self, data: Data) -> AnnotatedReader:
        """The annotations, see `vlp.tasks.contamination`."""
        return self._source().open()

    def _source(self) -> Annotated:
        if not self.data:
            raise UserError(
                "grounding has no data: give data=BOXES.jsonl, such as the grounding.jsonl of vlp data world"
            )
        return Annotated(self.data, self.images, (self.image,), split=self.split)

    def evaluate(self, subject: EvalModel) -> Result:
        """Metrics: ``pointing``, beside what a random point (``pointing_chance``) and the centre (``pointing_centre``) would
        have; and of lines with proposals ``accuracy``, beside a random one and the best one there is (``_chance``, ``_best``).
        """
        data = subject.data
        layer = choose_layer(subject.model, self.layer)
        dataset = AnnotatedImageDataset(self._source().open(), _whole, subject.preprocess, data.max_pixels)
        own, bad = [], []
        with evaluating(subject.model):
            for pictures, unusable in evaluation_batches(
                dataset, self.batch_size, data.workers, subject.rank, world_size()
            ):
                bad += unusable
                for line, size, cam in self._maps(subject, pictures, layer):
                    try:
                        own.append((line.source_row, line.image_id, self._judge(line, size, cam)))
                    except BadSample as e:
                        bad.append(dataset.reader.quarantine_entry(0, line.row, str(e)))
        found = sorted((row for part in gather_objects(own) for row in part), key=lambda row: row[0])
        bad = [b for part in gather_objects(bad) for b in part]
        if not found:
            raise UserError(
                f"no line of {self.data} has a picture and a box, {len(bad)} were left out, e.g. {bad[0]['reason']}"
            )
        groups, metrics = np.array([index for _, index, _ in found]), {}
        for name in ("pointing", "pointing_chance", "pointing_centre", "accuracy", "accuracy_chance", "accuracy_best"):
            some = np.array([name in judged for _, _, judged in found])
            if some.any():
                values = np.array([judged[name] for _, _, judged in found if name in judged])
                metrics[name] = bootstrap(values, groups[some], subject.seed, self.resamples)
        return Result(
            protocol=f"Grad-CAM of the matching logit over cross-attention of fusion layer {layer}, mean over the tokens; "
            f"pointing: the maximum is inside the box; accuracy: of the proposal with the largest sum / area^{self.power:g}, "
            f"intersection over union >= {self.overlap:g}",
            data=self._source().described,
            n={
                "phrases": len(found),
                "pictures": len(set(groups.tolist())),
                "with proposals": sum("accuracy" in judged for _, _, judged in found),
            },
            metrics=metrics,
            bad=bad,
        )

    def _maps(self, subject: EvalModel, pictures: list[AnnotatedImage], layer: int):
        """Each line with the (height, width) of its picture and its (h, w) map."""
        if not pictures:
            return
        model, device = subject.model, subject.device
        pixels = torch.stack([picture.images[0][0] for picture in pictures]).to(device)
        image = model.encode_image(subject.preprocess.normalise(pixels))
        lines = [(line, picture.images[0][1]) for picture in pictures for line in picture.lines]
        of = torch.tensor([n for n, picture in enumerate(pictures) for _ in picture.lines], device=device)
        ids, mask, _ = subject.tokenizer([line.captions[0] for line, _ in lines], subject.data.max_length)
        text = model.encode_text(ids.to(device), mask.to(device))
        maps = mean_over(grad_cam(model, image, text, layer, of), text.mask).cpu()
        if not maps.isfinite().all():
            raise UserError("the model's heat maps are not finite; choose another checkpoint")
        yield from ((line, size, cam) for (line, size), cam in zip(lines, maps))

    def _judge(self, line: RawSample, size: tuple[int, int], cam: Tensor) -> dict[str, float]:
        """Raises BadSample where there is no box, or one is none."""
        box = read_box(line.meta.get("box"))
        given = line.meta.get("proposals") or ()
        if not isinstance(given, (list, tuple)):
            raise BadSample(f"proposals are {str(given)[:80]}, not a list of boxes")
        proposals = [read_box(proposal) for proposal in given]
        heat = enlarged(cam, *size)
        judged = {
            "pointing": float(points_into(heat, box)),
            "pointing_chance": overlap_area(box, (0, 0, size[1], size[0])) / (size[0] * size[1]),
            "pointing_centre": float(contains(box, size[1] / 2, size[0] / 2)),
        }
        if proposals:
            overlaps = [intersection_over_union(proposal, box) for proposal in proposals]
            right = [found >= self.overlap for found in overlaps]
            judged["accuracy"] = float(right[choose_box(heat, proposals, self.power)])
            judged |= {"accuracy_chance": sum(right) / len(right), "accuracy_best": float(any(right))}
        return judged


def _whole(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> tuple[Tensor, tuple[int, int]]:
    """The whole picture as the model takes it, and the (height, width) that boxes refer to."""
    return Resize(mode="squash")(pixels, size, interpolation), pixels.shape[:2]


def read_box(given: object) -> Box:
    """Raises BadSample unless it is left, top, and a width and a height above 0."""
    if (
        not isinstance(given, (list, tuple))
        or len(given) != 4
        or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in given)
        or min(given[2:]) <= 0
    ):
        raise BadSample(f"the box {str(given)[:80]} is not [left, top, width, height] in pixels")
    return tuple(given)


def points_into(heat: Tensor, box: Box) -> bool:
    """Whether the middle of the hottest pixel of (H, W) is in the box; a flat map has none."""
    if heat.max() == heat.min():
        return False
    y, x = divmod(int(heat.argmax()), heat.shape[1])
    return contains(box, x + 0.5, y + 0.5)


def contains(box: Box, x: float, y: float) -> bool:
    return box[0] <= x < box[0] + box[2] and box[1] <= y < box[1] + box[3]


def choose_box(heat: Tensor, proposals: Sequence[Box], power: float) -> int:
    """The number of the proposal with the largest ``sum of (H, W) heat within / area^power``; published with power 0.5.

    Pixels are those from int(left) and int(top) on. The best score starts at -inf, the published one at 0, so that a map
    without heat in any proposal left the box of the phrase before.
    """
    scores = []
    for left, top, width, height in proposals:
        rows, columns = slice(max(int(top), 0), int(top + height)), slice(max(int(left), 0), int(left + width))
        scores.append(float(heat[rows, columns].sum()) / (width * height) ** power)
    return int(np.argmax(scores))


def overlap_area(a: Box, b: Box) -> float:
    """Square pixels that two boxes share."""
    width, height = (min(a[n] + a[n + 2], b[n] + b[n + 2]) - max(a[n], b[n]) for n in (0, 1))
    return max(width, 0) * max(height, 0)


def intersection_over_union(a: Box, b: Box) -> float:
    shared = overlap_area(a, b)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)
