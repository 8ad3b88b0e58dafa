"""``vlp.load``: a trained model as a Python object that encodes, compares, classifies and matches images and texts.

n images, m texts, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlp.data.image import decode, opaque, upright
from vlp.errors import BadSample, UserError
from vlp.files import local_path, read_regular
from vlp.loading.base import LoadOptions
from vlp.loading.load_model import load_model
from vlp.specs.user_code import NO_CODE, code_of_config, code_of_run
from vlp.tasks.base import EvalModel, evaluating
from vlp.tasks.zero_shot import class_embedding, templates_of
from vlp.types import Encoded

ImageLike = str | Path | Image.Image | np.ndarray
"""A file (JPEG, PNG, WEBP, PPM or TIFF), a PIL image, or (H, W, 3) uint8 RGB pixels."""


class TrainedModel:
    """A trained model of images, of texts, or of both.

    Every method runs in evaluation mode and without gradients, with the tokenizer and the preprocessing that belong to the
    weights. The numbers are those of ``vlp eval``. A method that the model does not support raises UserError.

    Args:
        eval_model: The model with its tokenizer and data settings.
    """

    def __init__(self, eval_model: EvalModel):
        self.eval_model = eval_model

    def encode_images(self, images: Sequence[ImageLike], batch_size: int = 64) -> Tensor:
        """Encode images.

        Args:
            images: n images.
            batch_size: Images of one forward pass.

        Returns:
            (n, E) float32 unit-norm embeddings on the CPU.

        Raises:
            UserError: if the model has no image tower, or a file is not a readable image.
        """
        self._need("image")
        return self._embeddings(images, lambda part: self._encode_images(part).embed, batch_size)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Encode texts, truncated to the longest that the model was trained with.

        Args:
            texts: m texts.
            batch_size: Texts of one forward pass.

        Returns:
            (m, E) float32 unit-norm embeddings on the CPU.

        Raises:
            UserError: if the model has no text tower, or its weights come without a tokenizer.
        """
        self._need("text")
        self._need_tokenizer()
        return self._embeddings(_listed(texts), lambda part: self.eval_model.encode_texts(part).embed, batch_size)

    def similarity(self, images: Sequence[ImageLike], texts: Sequence[str]) -> Tensor:
        """Return the (n, m) cosine similarities of images and texts.

        Raises:
            UserError: if the model does not put images and texts into one space.
        """
        self._need_contrast()
        return self.encode_images(images) @ self.encode_texts(texts).T

    def classify(
        self, image: ImageLike, names: Sequence[str], prompts: str | Sequence[str] = "a photo of a {}."
    ) -> dict[str, float]:
        """Classify an image by the names of the classes, without training (zero-shot, Radford et al. 2021).

        Args:
            image: The image.
            names: Names of the classes.
            prompts: A template with ``{}`` for the name, several of them, or a set of `vlp.tasks.zero_shot.PROMPTS` such
                as "openai". The embeddings of the prompts of a class are averaged.

        Returns:
            Class name -> probability, the most probable first: the softmax of the scaled similarities.

        Raises:
            UserError: if the model does not put images and texts into one space, or a template lacks ``{}``.
        """
        self._need_contrast()
        templates = templates_of(prompts if isinstance(prompts, str) else "|".join(prompts))
        model = self.eval_model
        with evaluating(model.model):
            classes = torch.stack([class_embedding(model, name, templates) for name in _listed(names)])  # (C, E)
            scale = model.model.scale.float().cpu()
        logits = scale * (self.encode_images([image]) @ classes.T)  # (1, C)
        scores = dict(zip(names, logits[0].softmax(0).tolist()))
        return dict(sorted(scores.items(), key=lambda item: -item[1]))

    def match(self, image: ImageLike, text: str) -> float:
        """Return the probability that a text belongs to an image, from the head for image-text matching.

        Raises:
            UserError: if the model has no such head.
        """
        model = self.eval_model
        if not model.model.can_match:
            raise UserError(
                f"{self._name} has no head for image-text matching; load an ALBEF or VLMo that has one, or use similarity"
            )
        self._need_tokenizer()
        with evaluating(model.model):
            projected = model.model.project(self._encode_images([image]))
            logits = model.model.match(projected, model.encode_texts([text]))  # (1, 2)
        return float(logits.float().softmax(1)[0, 1])

    @property
    def _name(self) -> str:
        return f"{self.eval_model.name} ({type(self.eval_model.model).__name__})"

    def _need(self, modality: Literal["image", "text"]) -> None:
        if not self.eval_model.model.can_encode(modality):
            raise UserError(
                f"{self._name} has no embeddings of {modality}s alone; load a model with a tower for {modality}s"
            )

    def _need_tokenizer(self) -> None:
        if self.eval_model.tokenizer is None:
            raise UserError(
                f"the weights of {self._name} come without a tokenizer; give vlp.load(..., tokenizer=FOLDER)"
            )

    def _need_contrast(self) -> None:
        if not self.eval_model.model.can_contrast:
            raise UserError(
                f"{self._name} does not put images and texts into one space; load a model that was trained with a "
                "contrastive head (Dual, or Albef and Vlmo with itc)"
            )
        self._need_tokenizer()

    def _encode_images(self, images: Sequence[ImageLike]) -> Encoded:
        model = self.eval_model
        assert model.preprocess is not None  # `_need` has checked that the model encodes images
        size, interpolation = model.preprocess.size, model.preprocess.interpolation
        pixels = (_pixels(image, model.data.max_pixels) for image in images)
        return model.encode_images([model.data.resize(each, size, interpolation) for each in pixels])

    def _embeddings(self, items: Sequence[Any], embed: Callable[[Sequence[Any]], Tensor], batch_size: int) -> Tensor:
        """Return the embeddings of all items, ``batch_size`` at a time."""
        items = _listed(items)
        parts = [torch.zeros(0, self.eval_model.model.embed_size)]
        with evaluating(self.eval_model.model):
            parts += [embed(items[i : i + batch_size]).float().cpu() for i in range(0, len(items), batch_size)]
        return torch.cat(parts)


def _listed(items: Sequence[Any]) -> Sequence[Any]:
    if isinstance(items, (str, Path, Image.Image)):
        raise TypeError(f"a list is needed, not a single {type(items).__name__}")
    return items


def _pixels(image: ImageLike, max_pixels: int) -> np.ndarray:
    """Return (H, W, 3) uint8 pixels, of a file or a PIL image upright and on white where it is transparent."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"an array is {image.dtype} {image.shape}; give (height, width, 3) uint8 RGB pixels")
        return image
    if isinstance(image, Image.Image):
        return np.array(upright(opaque(image)))
    try:
        return decode(read_regular(local_path(image)), max_pixels)
    except (OSError, BadSample) as error:
        raise UserError(f"cannot read the image {image}: {error}") from None


def load(
    path: str | Path,
    *,
    checkpoint: str | int | None = None,
    tokenizer: str | None = None,
    max_length: int | None = None,
    resize: Literal["center", "squash"] | None = None,
    image_size: int | None = None,
    head_width: int | None = None,
    add_sep: bool | None = None,
    device: str | torch.device | None = None,
    config: str | None = None,
    trust_code: bool = False,
) -> TrainedModel:
    """Load a trained model.

    Args:
        path: A run folder, a transformers folder of CLIP, ALIGN or SigLIP, a file of ALBEF or VLMo weights, or
            ``open_clip:NAME/TAG``.
        checkpoint: Of a run: a step, "best" or "last". None takes the best one if one is marked, else the last.
        tokenizer: Folder of the tokenizer, for weights that come without one (ALBEF and VLMo: that of bert-base-uncased).
        max_length: Tokens of a text. Longer texts are truncated.
        resize: "center" crops, "squash" ignores the aspect ratio of the image.
        image_size: Pixels at which a file of ALBEF or VLMo sees images.
        head_width: Width of the attention heads in a file of ALBEF or VLMo.
        add_sep: End texts with ``[SEP]``. None follows the weights: texts of LAVIS do, those of ALBEF and CLIPA do not.
        device: Device of the model. None takes a GPU if there is one.
        config: Of a run with classes of your own: the config that they come from, ``FILE.py`` or ``FILE.py:NAME``.
        trust_code: Of a run with classes of your own: import them from the copy in the run folder. Runs that code.

    Returns:
        The model. Settings that are None are those of the run or of the weights.

    Raises:
        UserError: if ``path`` is none of these, is damaged, or would run code on loading.
    """
    code = NO_CODE
    if config is not None:
        code = code_of_config(config)
    elif trust_code:
        code = code_of_run(local_path(path) / "experiment.json")
    options = LoadOptions(tokenizer, max_length, resize, image_size, head_width, add_sep)
    chosen = None if checkpoint is None else str(checkpoint)
    eval_model = load_model(str(path), chosen, options, code.types).eval_model
    if device is not None:
        eval_model.device = torch.device(device)
        eval_model.model.to(eval_model.device)
    return TrainedModel(eval_model)
