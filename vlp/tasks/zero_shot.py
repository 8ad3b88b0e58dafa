"""Zero-shot classification: an image gets the class whose mean prompt embedding is nearest (Radford et al. 2021)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.config import Data
from vlp.data.reading.benchmarks import CifarImage
from vlp.data.reading.labelled import FORMS, LabelledImages, read_labelled
from vlp.data.reading.tables import read_json
from vlp.errors import UserError
from vlp.files import local_path, resolve
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task
from vlp.tasks.details import confusion_matrix, confusions
from vlp.tasks.embeddings import encode_texts
from vlp.tasks.features import encode_labelled
from vlp.tasks.metrics import topk_accuracy
from vlp.tasks.requirements import need_embeddings, need_tokenizer

WNID = re.compile(r"n\d{8}")
MOST_CLASSES = 50  # of which a result keeps the whole confusion matrix


@dataclass(frozen=True)
class ZeroShot(Task):
    """Accuracy on labelled images, classified by prompts without training on them.

    Metrics are ``top1``, and ``top5`` where there are more than five classes.

    Args:
        data: Folder with one folder of images per class, or with a labels.jsonl (image, label, name, optional split); CIFAR's
            binary version; or ObjectNet with its mappings, of which the 113 classes shared with ImageNet are evaluated.
        split: Split of labels.jsonl, or the folder data/SPLIT. None uses all images. CIFAR's test split is "test".
        prompts: A set of `PROMPTS`, or templates with ``{}`` for the name, separated by |. None uses "cifar" for CIFAR, and
            "openai" elsewhere.
        names: JSON file of {folder or label name: class name}. By default ImageNet's folders get open_clip's names, whether
            they are called n01440764 or, as in ImageNet-V2, 0 to 999, and others are called by their folder, with _ for a
            space. The model chooses among the classes of the folder, e.g. the 200 of ImageNet-R.
        batch_size: Images encoded at a time.
        resamples: Bootstrap resamples, over images.
    """

    name = "zero-shot"
    headline = "top1"

    data: str = ""
    split: str | None = None
    prompts: str | None = None
    names: str | None = None
    batch_size: int = setting(64, least=1, changes_result=False)
    resamples: int = setting(1000, least=0, changes_result=False)

    def metric_names(self) -> tuple[str, ...]:
        return ("top1", "top5")

    def validate(self, data: Data) -> None:
        self._read()
        need_tokenizer(data, self.name)

    def evaluated_images(self, data: Data) -> list[Path]:
        return [image for image, _ in self._read()[0] if isinstance(image, Path)]

    def _read(self) -> tuple[LabelledImages, list[str], str]:
        """Return images with their class numbers, the class names, and the name of the prompts."""
        if not self.data:
            raise UserError(f"zero-shot has no data; give data=FOLDER with {FORMS}")
        images, classes = read_labelled(local_path(self.data), self.split)
        prompts = self.prompts or ("cifar" if isinstance(images[0][0], CifarImage) else "openai")
        templates_of(prompts)  # raises for wrong ones
        return images, class_names(classes, self.names), prompts

    def evaluate(self, model: EvalModel) -> Result:
        images, names, prompts = self._read()
        templates = templates_of(prompts)
        need_embeddings(model, self.name)
        classifier = torch.stack([class_embedding(model, name, templates) for name in names])  # (C, E)

        def embed(image: Tensor) -> Tensor:
            return model.model.encode_image(image).embed

        encoded = encode_labelled(model, images, embed, self.batch_size)
        scores, labels = encoded.features @ classifier.T, encoded.labels  # (n, C), (n,)
        # Classes with one name (ImageNet has two cranes) always tie. The first counts as the prediction, as argmax in
        # published evaluations has it, so a later one is not ahead of it.
        name_id = torch.tensor([names.index(name) for name in names])  # (C,)
        later_twin = (name_id[:, None] == name_id).triu(diagonal=1)  # (C, C)
        ranked = scores.masked_fill(later_twin[labels], -torch.inf)
        guesses = scores.argmax(1)
        details = {"classes": names, "confused": confusions(labels, guesses, names), "confusion": None}
        if len(names) <= MOST_CLASSES:
            details["confusion"] = confusion_matrix(labels, guesses, len(names))
        split = f"; split {self.split}" if self.split else ""
        return Result(
            protocol=f"mean of {len(templates)} normalised prompt embeddings a class, cosine similarity; prompts: {prompts}"
            + split,
            data=self.data,
            split=self.split or "",
            n={"images": len(labels), "classes": len(names), "prompts": len(templates)},
            metrics=topk_accuracy(ranked, labels, model.seed, self.resamples),
            details=details,
            bad=encoded.bad,
            choices=len(names),
        )


def class_names(classes: list[str], names: str | None) -> list[str]:
    """Return the names that prompts use for the classes of a folder, see ``names`` of `ZeroShot`."""
    if names is not None:
        given = read_json(resolve(names))
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
    """Return the templates, with ``{}`` for the name of a class, of a set of `PROMPTS` or of templates separated by |.

    Raises:
        UserError: for a template without ``{}``.
    """
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


# CLIP's 80 templates for ImageNet, the best 7 of them, its 18 for CIFAR-10 and CIFAR-100, and a single plain one
PROMPTS = {"openai": _openai, "simple": _simple, "cifar": _cifar, "photo": lambda: ["a photo of a {}."]}


def class_embedding(model: EvalModel, name: str, templates: list[str]) -> Tensor:
    """Return the (E,) unit-norm mean of the embeddings of a class's prompts."""
    embeds = encode_texts(model, [template.replace("{}", name) for template in templates])  # (templates, E)
    return F.normalize(embeds.mean(0), dim=0)
