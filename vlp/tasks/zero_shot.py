"""Zero-shot classification: a picture belongs to the class whose prompts' mean embedding is nearest (Radford et al. 2021)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlp.config import Data
from vlp.data.reading.benchmarks import CifarImage
from vlp.data.reading.labelled import FORMS, LabelledImages, read_labelled
from vlp.errors import UserError
from vlp.files import local_path
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task, evaluating
from vlp.tasks.embeddings import encode_texts
from vlp.tasks.metrics import bootstrap
from vlp.tasks.mistakes import confused
from vlp.tasks.probe import encode_pictures
from vlp.tasks.requirements import need_both

WNID = re.compile(r"n\d{8}")
NO_TEXT = (
    "zero-shot needs a text tower to read the classes' names, and its tokenizer: give tokenizer=FOLDER for weights that "
    "bring none, or use knn or probe"
)


@dataclass(frozen=True)
class ZeroShot(Task):
    """Top-1 and top-5 accuracy on a folder of pictures.

    Args:
        data: a folder with one folder of pictures a class, or with a labels.jsonl (image, label, name, optional split);
            CIFAR's binary version; ObjectNet with its mappings, of which the 113 classes that ImageNet has too count.
        split: of labels.jsonl, or the folder data/SPLIT; None = all. CIFAR's is test.
        prompts: a set of `PROMPTS`, or templates with ``{}`` for the name, separated by |; None = "cifar" for CIFAR, else
            "openai".
        names: JSON file of {folder or label name: class name}, or None: ImageNet's folders get open_clip's names, whether
            called n01440764 or, as ImageNet-V2's, 0 to 999; others are called as they are, with _ for a space. The model
            chooses among the classes that the folder has: of ImageNet-R and -A 200.
        batch_size: pictures encoded at a time.
        resamples: of the bootstrap, over pictures.
    """

    name = "zero-shot"
    headline = "top1"

    data: str = ""
    split: str | None = None
    prompts: str | None = None
    names: str | None = None
    batch_size: int = setting(64, least=1, changes_result=False)
    resamples: int = setting(1000, least=0, changes_result=False)

    def validate(self, data: Data) -> None:
        """Raises UserError where there are no pictures, no class names, no prompts, or no tokenizer for them."""
        self._read()
        if not data.tokenizer:
            raise UserError(NO_TEXT)

    def evaluated_images(self, data: Data) -> list[Path]:
        """Those of the pictures that are files of their own, see `vlp.tasks.contamination`."""
        return [picture for picture, _ in self._read()[0] if isinstance(picture, Path)]

    def _read(self) -> tuple[LabelledImages, list[str], str]:
        """Pictures with their class numbers, class names, what the prompts are called."""
        if not self.data:
            raise UserError(f"zero-shot has no data: give data=FOLDER with {FORMS}")
        pictures, classes = read_labelled(Path(self.data), self.split)
        prompts = self.prompts or ("cifar" if isinstance(pictures[0][0], CifarImage) else "openai")
        templates_of(prompts)
        return pictures, class_names(classes, self.names), prompts

    def evaluate(self, subject: EvalModel) -> Result:
        """Metrics: ``top1``, and ``top5`` where there are more than five classes."""
        pictures, names, prompts = self._read()
        templates = templates_of(prompts)
        need_both(subject, "zero-shot")
        with evaluating(subject.model):
            classifier = torch.stack([class_embedding(subject, name, templates) for name in names])
        encoded = encode_pictures(subject, pictures, "embed", self.batch_size)
        scores, labels = encoded.features @ classifier.T, encoded.labels
        # As in retrieval, a class that ties with the true one counts as ahead of it. Of classes with one name (ImageNet has
        # two cranes), which always tie, the first counts as the prediction, as argmax in published evaluations has it.
        later_twin = torch.tensor([[a == b for b in names] for a in names]).triu(diagonal=1)  # (C, C)
        rank = ((scores >= scores.gather(1, labels[:, None])) & ~later_twin[labels]).sum(1) - 1
        groups = np.arange(len(labels))
        metrics = {
            f"top{k}": bootstrap((rank < k).numpy().astype(np.float64), groups, subject.seed, self.resamples)
            for k in (1, 5)
            if k < len(names)
        }
        guesses = scores.argmax(1)
        confusion = torch.bincount(labels * len(names) + guesses, minlength=len(names) ** 2)
        return Result(
            protocol=f"mean of {len(templates)} normalised prompt embeddings a class, cosine similarity; prompts: {prompts}"
            + (f"; split {self.split}" if self.split else ""),
            data=self.data,
            n={"images": len(labels), "classes": len(names), "prompts": len(templates)},
            metrics=metrics,
            details={
                "classes": names,
                "confused": confused(labels, guesses, names),
                "confusion": confusion.view(len(names), -1).tolist() if len(names) <= 50 else None,
            },
            bad=encoded.bad,
        )


def class_names(classes: list[str], names: str | None) -> list[str]:
    if names is not None:
        try:
            given = json.loads(local_path(names).read_text())
        except (OSError, ValueError) as e:
            raise UserError(f"cannot read class names from {names}: {e}") from None
        if not isinstance(given, dict) or not all(isinstance(name, str) for name in given.values()):
            raise UserError(f"{names} is not an object of {{folder or label name: class name}}")
        if missing := [c for c in classes if c not in given]:
            raise UserError(f"{names} names no class for {', '.join(missing[:5])}; add them")
        return [given[c] for c in classes]
    numeric = {str(n) for n in range(1000)}
    if all(WNID.fullmatch(c) for c in classes) or set(classes) == numeric:
        from open_clip import IMAGENET_CLASSNAMES
        from timm.data import ImageNetInfo

        number = {wnid: n for n, wnid in enumerate(ImageNetInfo().label_names())} | {n: int(n) for n in numeric}
        if unknown := [c for c in classes if c not in number]:
            raise UserError(f"{', '.join(unknown[:5])} are not among ImageNet's 1000 classes; give names=FILE.json")
        return [IMAGENET_CLASSNAMES[number[c]] for c in classes]
    return [c.replace("_", " ") for c in classes]


def templates_of(prompts: str) -> list[str]:
    """With ``{}`` for the name of a class. Raises UserError for what is neither a set of `PROMPTS` nor templates."""
    if prompts in PROMPTS:
        return PROMPTS[prompts]()
    templates = prompts.split("|")
    if wrong := [t for t in templates if "{}" not in t]:
        raise UserError(
            f"the prompt {wrong[0]!r} has no {{}} for the class name; the named sets are {', '.join(PROMPTS)}"
        )
    return templates


def _openai() -> list[str]:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


def _simple() -> list[str]:
    from open_clip import SIMPLE_IMAGENET_TEMPLATES

    return [template("{}") for template in SIMPLE_IMAGENET_TEMPLATES]


def _cifar() -> list[str]:
    kinds = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
    sizes = ("small ", "big ")
    return [
        template
        for article in ("a", "the")
        for template in (
            *(f"a {kind}photo of {article} {{}}." for kind in kinds),
            *(f"a photo of {article} {size}{{}}." for size in sizes),
        )
    ]


# CLIP's 80 for ImageNet and the best 7 of them; its 18 for CIFAR-10 and -100; the plain one
PROMPTS = {"openai": _openai, "simple": _simple, "cifar": _cifar, "photo": lambda: ["a photo of a {}."]}


def class_embedding(subject: EvalModel, name: str, templates: list[str]) -> Tensor:
    """(E,) unit-norm mean of the prompts' embeddings."""
    embeds = encode_texts(subject, [t.replace("{}", name) for t in templates])
    return torch.nn.functional.normalize(embeds.mean(0), dim=0)
