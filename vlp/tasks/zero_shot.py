"""Zero-shot classification: a picture belongs to the class whose prompts' mean embedding is nearest (Radford et al. 2021)."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlp.config import Data
from vlp.data.image import decode
from vlp.data.stream import evaluation_batches
from vlp.distributed import gather_objects, world_size
from vlp.errors import BadSample, UserError
from vlp.evaluation import Result, Subject, encode_texts, evaluating, merge
from vlp.metrics import bootstrap

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ZeroShot:
    """Top-1 and top-5 accuracy on a folder of pictures.

    Args:
        data: a folder with one folder of pictures a class, or with a labels.jsonl (image, label, name, optional split).
        split: of labels.jsonl; None = all.
        prompts: "openai" = the 80 templates of CLIP's ImageNet protocol, or templates with ``{}`` for the name, separated by |.
        names: JSON file of {folder or label name: class name}, or None: ImageNet's folders (n01440764) get open_clip's
            names, others are called as they are, with _ for a space.
        batch_size: pictures encoded at a time.
        resamples: of the bootstrap, over pictures.
    """

    data: str = ""
    split: str | None = None
    prompts: str = "openai"
    names: str | None = None
    batch_size: int = 64
    resamples: int = 1000

    def check(self, data: Data) -> None:
        """Raises UserError where there are no pictures, no class names or no prompts."""
        self._read()

    def _read(self) -> tuple[list[tuple[Path, int]], list[str], list[str]]:
        """Pictures with their class numbers, class names, templates."""
        if not self.data:
            raise UserError(
                "zero-shot has no data: give data=FOLDER with a folder of pictures a class, or a labels.jsonl"
            )
        pictures, classes = read_labelled(Path(self.data), self.split)
        return pictures, class_names(classes, self.names), templates_of(self.prompts)

    def __call__(self, subject: Subject) -> Result:
        """Metrics: ``top1``, and ``top5`` where there are more than five classes."""
        began = time.monotonic()
        pictures, names, templates = self._read()
        dataset = Pictures(pictures, subject)
        with evaluating(subject.model):
            classifier = torch.stack([class_embedding(subject, name, templates) for name in names])
            scores, bad = self._scores(subject, dataset, classifier)
        kept = scores.isfinite().all(1)
        labels = torch.tensor([label for _, label in pictures])[kept]
        if not len(labels):
            raise UserError(f"none of the {len(pictures)} pictures in {self.data} can be decoded")
        # as in retrieval, a class that ties with the true one counts as ahead of it
        true = scores[kept].gather(1, labels[:, None])
        rank = (scores[kept] >= true).sum(1) - 1
        groups = np.arange(len(labels))
        metrics = {
            f"top{k}": bootstrap((rank < k).numpy().astype(np.float64), groups, subject.seed, self.resamples)
            for k in (1, 5)
            if k < len(names)
        }
        predicted = scores[kept].argmax(1)
        confusion = torch.bincount(labels * len(names) + predicted, minlength=len(names) ** 2)
        return Result(
            task="zero-shot",
            protocol=f"mean of {len(templates)} normalised prompt embeddings a class, cosine similarity; prompts: {self.prompts}",
            data=self.data,
            n={"images": len(labels), "classes": len(names), "prompts": len(templates)},
            metrics=metrics,
            details={
                "classes": names,
                "confusion": confusion.view(len(names), -1).tolist() if len(names) <= 50 else None,
            },
            bad=bad,
            seconds=time.monotonic() - began,
        )

    def _scores(self, subject: Subject, dataset: Pictures, classifier: Tensor) -> tuple[Tensor, list[dict]]:
        """(n, classes) cosine similarities, -inf where a picture could not be decoded; the same for any number of processes."""
        scores, bad = torch.zeros(len(dataset), len(classifier)), []
        for numbers, pixels, unusable in evaluation_batches(
            dataset, self.batch_size, subject.data.workers, subject.rank, world_size()
        ):
            bad += unusable
            if numbers:
                image = subject.preprocess.normalise(torch.stack(pixels).to(subject.device))
                scores[numbers] = subject.model.encode_image(image).embed.float().cpu() @ classifier.T
        bad = [b for part in gather_objects(bad) for b in part]
        scores = merge(scores)
        scores[[b["number"] for b in bad]] = -torch.inf
        return scores, bad


class Pictures(Dataset):
    """(path, label) -> resized uint8 pixels."""

    def __init__(self, pictures: list[tuple[Path, int]], subject: Subject):
        self.pictures, self.data, self.preprocess = pictures, subject.data, subject.preprocess

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, numbers: list[int]) -> tuple[list[int], list[Tensor], list[dict]]:
        good, pixels, bad = [], [], []
        for n in numbers:
            path = self.pictures[n][0]
            try:
                image = decode(path.read_bytes(), self.data.max_pixels)
                pixels.append(self.data.resize(image, self.preprocess.size, self.preprocess.interpolation))
                good.append(n)
            except (BadSample, OSError) as e:
                bad.append({"number": n, "image": str(path), "reason": str(e)})
        return good, pixels, bad


def read_labelled(folder: Path, split: str | None) -> tuple[list[tuple[Path, int]], list[str]]:
    """([(picture, class number)], class names as the folder has them). Raises UserError where there is neither form."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give data=FOLDER with a folder of pictures a class, or a labels.jsonl")
    if (folder / "labels.jsonl").exists():
        return _read_labels(folder, split)
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    pictures = [
        (path, n)
        for n, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in PICTURES
    ]
    if not pictures or len(classes) < 2:
        raise UserError(f"{folder} holds neither labels.jsonl nor two folders of pictures, one a class")
    return pictures, classes


def _read_labels(folder: Path, split: str | None) -> tuple[list[tuple[Path, int]], list[str]]:
    rows = []
    for number, line in enumerate((folder / "labels.jsonl").read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append(
                (folder / row["image"], int(row["label"]), str(row.get("name", row["label"])), row.get("split"))
            )
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{folder}/labels.jsonl line {number}: expected an object with image, label and name"
            ) from None
    if split is not None:
        rows = [r for r in rows if r[3] == split]
    if not rows:
        raise UserError(f"{folder}/labels.jsonl has no picture" + (f" of split {split!r}" if split else ""))
    labels = sorted({label for _, label, _, _ in rows})
    name_of = {label: name for _, label, name, _ in rows}
    return [(path, labels.index(label)) for path, label, _, _ in rows], [name_of[label] for label in labels]


def class_names(classes: list[str], names: str | None) -> list[str]:
    if names is not None:
        try:
            given = json.loads(Path(names).read_text())
        except (OSError, ValueError) as e:
            raise UserError(f"cannot read class names from {names}: {e}") from None
        if not isinstance(given, dict):
            raise UserError(f"{names} is not an object of {{folder or label name: class name}}")
        if missing := [c for c in classes if c not in given]:
            raise UserError(f"{names} names no class for {', '.join(missing[:5])}; add them")
        return [given[c] for c in classes]
    if all(WNID.fullmatch(c) for c in classes):
        from open_clip import IMAGENET_CLASSNAMES
        from timm.data import ImageNetInfo

        number = {wnid: n for n, wnid in enumerate(ImageNetInfo().label_names())}
        if unknown := [c for c in classes if c not in number]:
            raise UserError(f"{', '.join(unknown[:5])} are not among ImageNet's 1000 classes; give names=FILE.json")
        return [IMAGENET_CLASSNAMES[number[c]] for c in classes]
    return [c.replace("_", " ") for c in classes]


def templates_of(prompts: str) -> list[str]:
    if prompts == "openai":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    templates = prompts.split("|")
    if wrong := [t for t in templates if "{}" not in t]:
        raise UserError(f"the prompt {wrong[0]!r} has no {{}} for the class name; the named set is 'openai'")
    return templates


def class_embedding(subject: Subject, name: str, templates: list[str]) -> Tensor:
    """(E,) unit-norm mean of the prompts' embeddings."""
    embeds = encode_texts(subject, [t.replace("{}", name) for t in templates])
    return torch.nn.functional.normalize(embeds.mean(0), dim=0)
