"""The parts that all sources of weights share: options of loading, the loaded model, and checks that its parts fit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState

from vlp.config import Data
from vlp.errors import UserError
from vlp.files import file_hash
from vlp.models.base import Model
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel
from vlp.weights.reading import LoadReport


@dataclass(frozen=True)
class LoadOptions:
    """Settings that replace those of the weights or of the run.

    Args:
        tokenizer: See `vlp.data.text.load_tokenizer`. Files of ALBEF and VLMo come without one and need that of
            bert-base-uncased.
        max_length: Tokens of a text. Longer texts are truncated.
        resize: "center" crops, "squash" ignores the aspect ratio of the image, see `vlp.data.augment.Resize`.
        image_size: Pixels at which a file of ALBEF or VLMo sees images. Its position embeddings are resized.
        head_width: Width of the attention heads in a file of ALBEF or VLMo, which no tensor shape tells.
        add_sep: End texts with ``[SEP]``. None follows the weights: texts of LAVIS do, those of ALBEF and CLIPA do not.
        workers: Data loading processes. None takes 1, or the setting of the run.
        allow_contamination: Evaluate a run also on images that it was trained on, see `vlp.tasks.contamination`.
    """

    tokenizer: str | None = None
    max_length: int | None = setting(None, least=2)
    resize: Literal["center", "squash"] | None = None
    image_size: int | None = setting(None, least=1)
    head_width: int | None = setting(None, least=1)
    add_sep: bool | None = None
    workers: int | None = setting(None, least=0)
    allow_contamination: bool = False

    def applied_to(self, data: Data) -> Data:
        """Return the data settings with those that are given here replaced."""
        given = {name: vars(self)[name] for name in ("tokenizer", "max_length", "add_sep", "workers")}
        given["resize"] = replace(data.resize, mode=self.resize, fraction=1.0) if self.resize else None
        return replace(data, **{name: value for name, value in given.items() if value is not None})

    def refuse(self, reason: str, *names: str) -> None:
        """Raise UserError if one of the options is given."""
        if given := [name for name in names if vars(self)[name] is not None]:
            raise UserError(f"{given[0]}= cannot be given: {reason}; leave it out")


NO_OPTIONS = LoadOptions()


@dataclass
class LoadedModel:
    """A model that was loaded for evaluation.

    Args:
        eval_model: The model with its tokenizer and data settings.
        folder: Results are written to its eval/.
        step: Training step of a run's checkpoint, None for weights that are not a run's.
        reports: Account of the loaded weights, by part of the model. Empty for a run, whose checkpoint must fit exactly.
    """

    eval_model: EvalModel
    folder: Path
    step: int | None = None
    reports: dict[str, LoadReport | None] = field(default_factory=dict)


def on_device(
    model: Model, tokenizer: Any, data: Data, *, seed: int = 0, checkpoint: str = "", name: str = ""
) -> EvalModel:
    """Move a model to this process's device and return it with its tokenizer and data settings.

    Raises:
        UserError: if the tokenizer or ``data.max_length`` does not fit the text tower.
    """
    text = model.text
    if text is not None and tokenizer is not None and tokenizer.vocab_size > text.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the text tower only {text.vocab_size}; give the "
            "tokenizer of these weights"
        )
    if text is not None and data.max_length > text.max_length:
        raise UserError(f"max_length={data.max_length} but the text tower takes {text.max_length} tokens; lower it")
    process = PartialState(cpu=not torch.cuda.is_available())
    model = model.to(process.device).eval()
    return EvalModel(model, tokenizer, data, process.device, seed, checkpoint, name)


def published(name: str, model: Model, tokenizer: Any, data: Data, files: Sequence[Path]) -> LoadedModel:
    """Return a model with published weights.

    Args:
        name: Name of the weights, for the folder of their results.
        model: The model.
        tokenizer: Its tokenizer, or None.
        data: Data settings.
        files: The files of the weights, for their hash. Empty where a library downloaded them: the tensors are hashed.
    """
    hashes = [file_hash(file) for file in files] or [_tensor_hash(model)]
    digest = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", name).strip("-.")
    eval_model = on_device(model, tokenizer, data, checkpoint=digest, name=name)
    return LoadedModel(eval_model, Path("runs/eval") / name, None, model.reports)


def _tensor_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
