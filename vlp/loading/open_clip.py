"""Load a model of open_clip, with weights of its own or from a file."""

from __future__ import annotations

import open_clip

from vlp.config import Data
from vlp.data.augment import Resize
from vlp.data.text import load_tokenizer
from vlp.encoders.open_clip import OpenClip, pretrained_settings
from vlp.errors import UserError
from vlp.files import resolve
from vlp.loading.base import NO_OPTIONS, LoadedModel, LoadOptions, published
from vlp.models.dual import Dual

RESIZE_MODES = {"shortest": "center", "squash": "squash"}  # open_clip's names


def load_open_clip(name: str, options: LoadOptions = NO_OPTIONS) -> LoadedModel:
    """Load ``NAME``, at random, ``NAME/TAG`` with pretrained weights, or ``NAME/FILE``.

    Raises:
        UserError: if open_clip has no such model, or the weights do not fit.
    """
    options.refuse("open_clip's models have their own", "image_size", "head_width")
    model_name, _, weights = name.partition("/")
    towers = OpenClip(model_name, weights=weights or None).resolved()
    model = Dual(towers=towers, projection="none", temperature=None if weights else 1.0).build()
    mode = pretrained_settings(model_name, weights).get("resize_mode") or "shortest"
    if mode not in RESIZE_MODES:
        raise UserError(
            f"open_clip's {model_name} resizes images by their {mode} side and pads them, which is not supported"
        )
    resize = Resize(RESIZE_MODES[mode], resampler="pil")
    # CLIPA strips [SEP] of BERT's tokenizer, which has to be given as a folder
    settings = open_clip.get_model_config(model_name)["text_cfg"].get("tokenizer_kwargs", {})
    add_sep = False if settings.get("strip_sep_token") else None
    tokenizer, max_length = f"open_clip:{model_name}", towers.context_length
    own = Data((), None, tokenizer, add_sep=add_sep, max_length=max_length, resize=resize)
    data = options.applied_to(own)
    files = [resolve(weights)] if weights and not open_clip.get_pretrained_cfg(model_name, weights) else []
    return published(f"open_clip:{name}", model, load_tokenizer(data.tokenizer, data.add_sep), data, files)
