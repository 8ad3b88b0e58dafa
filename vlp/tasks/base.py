"""What every evaluation shares: the model under test, embeddings that do not depend on the number of processes, and the
record that is written with each number."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vlp import __version__
from vlp.config import Data
from vlp.data.shards import RawSample, write_atomically
from vlp.data.stream import EvalDataset, evaluation_batches
from vlp.distributed import gather_objects, world_size
from vlp.errors import UserError
from vlp.tasks.metrics import Interval


@dataclass
class EvalModel:
    """A model under evaluation with what belongs to its weights.

    Args:
        data: of the run; of weights without one, what they bring.
        checkpoint: SHA-256 of the weights' file, or a note where they are not in a file.
        name: of the run, or of the weights.
        rank: of this process; every process must evaluate the same.
    """

    model: torch.nn.Module
    tokenizer: object
    data: Data
    device: torch.device
    seed: int = 0
    checkpoint: str = ""
    rank: int = 0
    name: str = ""

    @property
    def preprocess(self):
        return self.model.preprocess


@dataclass
class Result:
    """A number and what it takes to believe it.

    Args:
        task: e.g. ``retrieval``.
        protocol: exactly what was measured, in words that name one procedure.
        name: of the protocol with its data and weights, e.g. ``flickr30k-zero-shot@coco-ft``; "" where a task has none.
        data: where the evaluated samples came from.
        n: how many of what, e.g. {"images": 1000, "captions": 5000}.
        metrics: fractions in [0, 1], or as the protocol says.
        details: for the report: examples and their answers.
        bad: samples left out.
        trained_on: how many of the pictures were in the training data, by their bytes; None = that was not looked at.
    """

    task: str
    protocol: str
    data: str
    n: dict[str, int]
    metrics: dict[str, Interval]
    details: dict = field(default_factory=dict)
    bad: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    name: str = ""
    trained_on: int | None = None

    def write(self, path: Path, subject: EvalModel, step: int | None = None) -> None:
        record = asdict(self) | {
            "seed": subject.seed,
            "checkpoint_sha256": subject.checkpoint,
            "step": step,
            "vlp": __version__,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(record, indent=1).encode())


SPLITS = ("train", "val", "valid", "validation", "dev", "test", "minival")


def name_of(location: str) -> str:
    """What a data set is called by where it lies: ``data/flickr8k/val`` is flickr8k-val, ``coco/{000..9}.tar`` is coco."""
    parts = [part for part in Path(location).parts if not part.endswith(".tar") and not set(part) & set("*?{}[]/")]
    last = parts[-1] if parts else "data"
    return f"{parts[-2]}-{last}" if last in SPLITS and len(parts) > 1 else last


def protocol_name(subject: EvalModel, location: str, setting: str | None) -> str:
    """E.g. ``flickr30k-zero-shot@coco-ft``: data without its split, setting, weights.

    Args:
        setting: "zero-shot" or "fine-tuned"; None = fine-tuned where the run was trained on data of the same name, else
            unstated: that names differ does not tell that data do.
    """

    def whole(data: str) -> str:
        return re.sub(rf"[-_]({'|'.join(SPLITS)})$", "", name_of(data))

    trained_on = {whole(getattr(source, "shards", None) or source.path) for source in subject.data.train}
    if setting is None and whole(location) in trained_on:
        setting = "fine-tuned"
    return f"{whole(location)}-{setting or 'unstated'}@{subject.name or 'unnamed'}"


# fields of tasks that say where data are, or at what pace they go: two evaluations that differ in them alone are the same one
NOT_ASKED = [
    "data",
    "images",
    "image",
    "label",
    "classes",
    "names",
    "answers",
    "prompts",
    "tasks",
    "geometry",
    "submission",
]
NOT_ASKED += ["batch_size", "text_batch", "questions", "resamples", "examples"]


def result_name(task: str, data: str | None, given: Sequence[str] = ()) -> str:
    """Of the file that keeps the newest result of a task on some data (None = that of the experiment).

    Args:
        given: ``field=value`` as typed; what was asked otherwise keeps a file of its own.
    """
    asked = [text for text in given if text.partition("=")[0] not in NOT_ASKED]
    return re.sub(r"[^\w.,=+-]+", "_", "-".join(filter(None, (task, data and name_of(data), *asked))))


def need_both(subject: EvalModel, task: str) -> None:
    """Raises UserError unless the model sees pictures and reads texts, and puts both into one space."""
    if subject.tokenizer is None:
        raise UserError(
            f"{task} needs a text tower and its tokenizer, and there is none here: give tokenizer=FOLDER for weights "
            "that bring none, or evaluate pictures alone with knn or probe"
        )
    if subject.preprocess is None:
        raise UserError(f"{task} needs pictures too, and there is no image tower here; evaluate it with sts")
    if not getattr(subject.model, "itc", True):
        raise UserError(f"{task} compares embeddings, and this model has no head for contrast; choose one that has")


def need_reader(subject: EvalModel, task: str, pictures: int) -> None:
    """Raises UserError unless the model reads a text together with so many pictures."""
    if subject.tokenizer is None or subject.preprocess is None:
        raise UserError(
            f"{task} needs a model of pictures and texts; give tokenizer=FOLDER for weights that bring none"
        )
    if (own := getattr(subject.model, "images", 1)) != pictures:
        raise UserError(
            f"{task} gives {pictures} picture{'s' * (pictures > 1)} with each text, and this model looks at {own}; evaluate it "
            f"on data with {own}"
        )


def need_alone(subject: EvalModel, task: str, modality: str) -> None:
    """Raises UserError where the model reads pictures, or texts, only together: it has no features of either by itself."""
    encoder = getattr(subject.model, "encoder", None)
    if modality not in getattr(encoder, "alone", (modality,)):
        raise UserError(
            f"{task} needs features of {modality}s by themselves, and this model reads pictures and texts together only; "
            "evaluate it with classification or vqa, or the run that it started from"
        )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and back: each part to the mode that it had, since frozen ones never train."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def merge(rows: Tensor) -> Tensor:
    """Adds up what the processes filled in; each row was filled by one of them, so the sum is exact."""
    if world_size() > 1:
        dist.all_reduce(rows)
    return rows


@dataclass
class EncodedPairs:
    """Embeddings of a source, on the CPU, in the source's order.

    Args:
        images: (n, E).
        texts: (m, E).
        image_ids: (n,) equal id = same picture.
        text_ids: (m,) id of the picture that the caption belongs to.
        rows: (n,) number of the sample within the source.
        captions: m texts.
        bad: samples left out.
    """

    images: Tensor
    texts: Tensor
    image_ids: Tensor
    text_ids: Tensor
    rows: Tensor
    captions: list[str]
    bad: list[dict]


def encode_pairs(subject: EvalModel, source: str, batch_size: int) -> EncodedPairs:
    """Encodes every picture and every caption of ``source`` once.

    The batches are the same for any number of processes, which share them out; so are the results, to the bit.
    """
    data, model = subject.data, subject.model
    dataset = EvalDataset(source, data.resize, subject.preprocess, data.max_pixels)
    own: dict[int, tuple[Tensor, Tensor, RawSample]] = {}
    bad: list[dict] = []
    with evaluating(model):
        for samples, unusable in evaluation_batches(dataset, batch_size, data.workers, subject.rank, world_size()):
            bad += unusable + [
                dataset.reader.complaint(raw.shard, raw.row, "no caption") for _, raw in samples if not raw.captions
            ]
            samples = [(image, raw) for image, raw in samples if raw.captions]
            if not samples:
                continue
            pixels = torch.stack([image for image, _ in samples]).to(subject.device)
            embeds = model.encode_image(subject.preprocess.normalise(pixels)).embed.float().cpu()
            texts = encode_texts(subject, [c for _, raw in samples for c in raw.captions])
            texts = texts.split([len(raw.captions) for _, raw in samples])
            own |= {raw.number: (e, t, raw) for e, t, (_, raw) in zip(embeds, texts, samples)}
    return _assemble(own, len(dataset), bad)


def _assemble(own: dict[int, tuple[Tensor, Tensor, RawSample]], size: int, bad: list[dict]) -> EncodedPairs:
    """Puts what each process encoded in the source's order."""
    width = max(gather_objects(max((e.shape[-1] for e, _, _ in own.values()), default=0)))
    counts, ids, images = (
        torch.zeros(size, dtype=torch.int64),
        torch.zeros(size, dtype=torch.int64),
        torch.zeros(size, width),
    )
    for n, (embed, texts, raw) in own.items():
        counts[n], ids[n], images[n] = len(texts), raw.index, embed
    counts, ids, images = merge(counts), merge(ids), merge(images)
    texts, starts = torch.zeros(int(counts.sum()), width), counts.cumsum(0) - counts
    for n, (_, embeds, _) in own.items():
        texts[starts[n] : starts[n] + counts[n]] = embeds
    captions = {
        n: c for part in gather_objects({n: raw.captions for n, (_, _, raw) in own.items()}) for n, c in part.items()
    }
    rows = counts.nonzero()[:, 0]
    texts = merge(texts)
    if not (images.isfinite().all() and texts.isfinite().all()):  # they would rank first, as no score is above theirs
        raise UserError("the model's embeddings are not finite; evaluate an earlier checkpoint")
    return EncodedPairs(
        images=images[rows],
        texts=texts,
        image_ids=ids[rows],
        text_ids=ids.repeat_interleave(counts),
        rows=rows,
        captions=[c for n in rows.tolist() for c in captions[n]],
        bad=[b for part in gather_objects(bad) for b in part],
    )


def encode_texts(subject: EvalModel, texts: list[str]) -> Tensor:
    """(n, E) float32 unit-norm embeddings on the CPU."""
    input_ids, attention_mask, _ = subject.tokenizer(texts, subject.data.max_length)
    encoded = subject.model.encode_text(input_ids.to(subject.device), attention_mask.to(subject.device))
    return encoded.embed.float().cpu()
