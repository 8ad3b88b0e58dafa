"""The door of `vlp eval`: a run's folder, or somebody's weights -> a model ready to be evaluated.

| what | is |
|---|---|
| a folder with experiment.json | a run |
| a folder with config.json | transformers' CLIPModel, AlignModel or SiglipModel |
| a file of weights | a published checkpoint of ALBEF or of VLMo, which its names tell |
| open_clip:NAME, open_clip:NAME/TAG, open_clip:NAME/FILE | a model of open_clip's |

What the weights bring (tokenizer, length, pixels) is taken from them; `LoadOptions` says otherwise, and what they do not bring.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import open_clip
import torch
from accelerate import PartialState

from vlp.config import Data
from vlp.data.augment import Resize
from vlp.data.text import load_tokenizer
from vlp.encoders.open_clip import OpenClip
from vlp.errors import UserError
from vlp.files import file_hash, resolve
from vlp.loading.albef import build_albef
from vlp.loading.run import open_run
from vlp.loading.transformers import PROJECTIONS, load_folder, model_type
from vlp.loading.vlmo import build_vlmo
from vlp.models.dual import Dual
from vlp.specs.fields import setting
from vlp.specs.names import NO_TYPES
from vlp.tasks.base import EvalModel
from vlp.weights import reading
from vlp.weights.albef import load_albef
from vlp.weights.reading import LoadReport
from vlp.weights.run import is_run
from vlp.weights.vlmo import load_vlmo

CAN_BE = "it can be a run's folder, a transformers folder of CLIP, ALIGN or SigLIP, a file of ALBEF's or VLMo's weights, or open_clip:NAME/TAG"


@dataclass(frozen=True)
class LoadOptions:
    """What is to be otherwise than the weights, or the run, say.

    Args:
        tokenizer: see `vlp.data.text.load_tokenizer`. Files of ALBEF and VLMo bring none: that of bert-base-uncased.
        max_length: tokens of a text; longer ones are cut.
        resize: "center" crops, "squash" ignores the picture's shape; see `vlp.data.augment.Resize`.
        image_size: pixels at which a file of ALBEF or VLMo sees pictures; its positions are resized.
        head_width: of such a file's attention heads, which no shape tells.
        workers: loading processes; None = 1, or the run's own.
        allow_contamination: Evaluate a run also on images that it was trained on, see `vlp.tasks.contamination`.
    """

    tokenizer: str | None = None
    max_length: int | None = setting(None, least=2)
    resize: Literal["center", "squash"] | None = None
    image_size: int | None = setting(None, least=1)
    head_width: int | None = setting(None, least=1)
    workers: int | None = setting(None, least=0)
    allow_contamination: bool = False


@dataclass
class LoadedModel:
    """A model under evaluation, and where its results belong.

    Args:
        folder: results go to its eval/.
        step: of the run; None for weights without one.
        reports: what became of the weights, by part; {} for a run, whose checkpoint fits or is refused.
    """

    subject: EvalModel
    folder: Path
    step: int | None = None
    reports: dict[str, LoadReport | None] = field(default_factory=dict)


def load_model(
    what: str,
    which: str | None = None,
    opening: LoadOptions = LoadOptions(),
    own_types: Mapping[str, type] = NO_TYPES,
) -> LoadedModel:
    """Opens ``what`` points to.

    Args:
        which: checkpoint of a run, see `vlp.loading.run.choose`.
        own_types: Classes outside vlp that the run's experiment.json may name: see `vlp.specs.user_code`.

    Raises:
        UserError: if it is nothing of the above, is damaged, or would run code on loading.
    """
    if which is not None and not is_run(what):
        raise UserError(f"--checkpoint is for runs, and {what} is none; name the file of weights itself")
    if is_run(what):
        return _run(what, which, opening, own_types)
    if what.startswith("open_clip:"):
        return _open_clip(what, opening)
    path = resolve(what)
    if path.is_dir() and model_type(path) in PROJECTIONS:
        return _transformers(path, opening)
    if path.is_dir():
        kind = model_type(path)
        raise UserError(f"{what} is a folder{f' of a {kind} model' if kind else ''} that cannot be evaluated; {CAN_BE}")
    return _file(path, opening)


def _run(what: str, which: str | None, opening: LoadOptions, own_types: Mapping[str, type]) -> LoadedModel:
    if given := [name for name in ("tokenizer", "image_size", "head_width") if getattr(opening, name) is not None]:
        raise UserError(f"{given[0]} of a run is what it was trained with; leave it out")
    subject, step = open_run(Path(what).expanduser(), which, own_types)
    subject.data = _changed(subject.data, opening)
    _check_length(subject.model, subject.data)
    return LoadedModel(subject, Path(what).expanduser(), step)


def _changed(data: Data, opening: LoadOptions) -> Data:
    """The settings with what ``opening`` gives."""
    given = {name: getattr(opening, name) for name in ("tokenizer", "max_length", "workers")}
    if opening.resize:
        given["resize"] = Resize(opening.resize)
    return replace(data, **{name: value for name, value in given.items() if value is not None})


def _open_clip(what: str, opening: LoadOptions) -> LoadedModel:
    _refuse(opening, "open_clip's models", "image_size", "head_width")
    name, _, weights = what.removeprefix("open_clip:").partition("/")
    towers = OpenClip(name, weights=weights or None).resolved()
    model = Dual(towers=towers, projection="none", temperature=None if weights else 1.0).build()
    tag = open_clip.get_pretrained_cfg(name, weights) if weights else {}
    squash = (tag or {}).get("resize_mode") == "squash"
    given = Data((), None, f"open_clip:{name}", max_length=towers.context_length, resize=Resize(_mode(squash)))
    data = _changed(given, opening)
    files = [resolve(weights)] if weights and not tag else []
    return _opened(what, model, load_tokenizer(data.tokenizer), data, files)


def _mode(squash: bool) -> Literal["center", "squash"]:
    return "squash" if squash else "center"


def _transformers(path: Path, opening: LoadOptions) -> LoadedModel:
    _refuse(opening, f"{path}'s own", "tokenizer", "image_size", "head_width")
    model, tokenizer, resize, files = load_folder(path)
    data = _changed(Data((), None, str(path), max_length=model.text.max_length, resize=resize), opening)
    return _opened(path.resolve().name, model, tokenizer, data, files)


def _file(path: Path, opening: LoadOptions) -> LoadedModel:
    state = reading.read_weights(path)
    if any(key.startswith("visual_encoder.") for key in state):
        return _albef(path, state, opening)
    if any(key.startswith("transformer.blocks.") for key in state):
        return _vlmo(path, state, opening)
    raise UserError(f"{path} holds {', '.join(list(state)[:3])}, ..., which is no model known here; {CAN_BE}")


def _albef(path: Path, state: dict[str, torch.Tensor], opening: LoadOptions) -> LoadedModel:
    sizes = {"head_width": opening.head_width} if opening.head_width else {}
    model = build_albef(load_albef(state), opening.image_size, **sizes)
    # as published: squashed pictures, no [SEP], no punctuation; texts are cut for retrieval only
    max_length = min(30 if model.itc else 64, model.text.max_length)
    data = Data((), None, "", sep=False, clean=True, max_length=max_length, resize=Resize("squash"))
    data = _changed(data, opening)
    tokenizer = load_tokenizer(data.tokenizer, data.sep, data.clean) if data.tokenizer else None
    return _opened(path.stem, model, tokenizer, data, [path])


def _vlmo(path: Path, state: dict[str, torch.Tensor], opening: LoadOptions) -> LoadedModel:
    model = build_vlmo(load_vlmo(state), str(path), opening.image_size, opening.head_width)
    max_length = min(40, model.text.max_length)  # as published, as are squashed pictures
    data = _changed(Data((), None, "", max_length=max_length, resize=Resize("squash")), opening)
    return _opened(path.stem, model, load_tokenizer(data.tokenizer) if data.tokenizer else None, data, [path])


def _refuse(opening: LoadOptions, whose: str, *names: str) -> None:
    if given := [name for name in names if getattr(opening, name) is not None]:
        raise UserError(f"{given[0]}= cannot be given: it is {whose}; leave it out")


def _check_length(model: torch.nn.Module, data: Data) -> None:
    longest = getattr(getattr(model, "text", None), "max_length", math.inf)
    if data.max_length > longest:
        raise UserError(f"max_length={data.max_length} but the text tower takes {longest} tokens; lower it")


def _tensor_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _opened(name: str, model: torch.nn.Module, tokenizer, data: Data, files: list[Path]) -> LoadedModel:
    """With the hash of the weights' files, several together; of their tensors where a library fetched them."""
    if tokenizer is not None and tokenizer.vocab_size > model.text.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the text tower only {model.text.vocab_size}; give the "
            "tokenizer of these weights"
        )
    hashes = [file_hash(file) for file in files] or [_tensor_hash(model)]
    _check_length(model, data)
    digest = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    process = PartialState(cpu=not torch.cuda.is_available())
    name = re.sub(r"[^\w.-]+", "-", name).strip("-.")
    subject = EvalModel(
        model.to(process.device).eval(),
        tokenizer,
        data,
        process.device,
        checkpoint=digest,
        rank=process.process_index,
        name=name,
    )
    return LoadedModel(subject, Path("runs/eval") / name, None, model.reports)
