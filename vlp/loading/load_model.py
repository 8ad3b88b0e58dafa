"""Load a trained model from whatever a path names.

| path | loaded by |
|---|---|
| a folder with experiment.json | `vlp.loading.run` |
| a folder with the config.json of CLIP, ALIGN or SigLIP | `vlp.loading.transformers` |
| a file of ALBEF weights | `vlp.loading.albef` |
| a file of VLMo or BEiT weights | `vlp.loading.vlmo` |
| open_clip:NAME, open_clip:NAME/TAG, open_clip:NAME/FILE | `vlp.loading.open_clip` |

Tokenizer, text length and preprocessing come from the weights or from the run. `LoadOptions` replaces them, or adds a
missing one.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlp.errors import UserError
from vlp.files import local_path
from vlp.loading.albef import load_albef_file
from vlp.loading.base import NO_OPTIONS, LoadedModel, LoadOptions
from vlp.loading.open_clip import load_open_clip
from vlp.loading.run import load_run
from vlp.loading.transformers import PROJECTIONS, load_transformers, model_type
from vlp.loading.vlmo import load_vlmo_file
from vlp.specs.names import NO_TYPES
from vlp.weights import reading
from vlp.weights.run import is_run

KNOWN = "give a run folder, a transformers folder of CLIP, ALIGN or SigLIP, a file of ALBEF or VLMo weights, or open_clip:NAME/TAG"


def load_model(
    path: str,
    checkpoint: str | None = None,
    options: LoadOptions = NO_OPTIONS,
    own_types: Mapping[str, type] = NO_TYPES,
) -> LoadedModel:
    """Load the model that ``path`` names.

    Args:
        path: See the table of this module.
        checkpoint: Checkpoint of a run, see `vlp.loading.run.select_checkpoint`.
        options: Settings that replace those of the weights.
        own_types: Classes outside vlp that a run's experiment.json may name, see `vlp.specs.user_code`.

    Raises:
        UserError: if ``path`` is none of these, is damaged, or would run code on loading.
    """
    if is_run(path):
        return load_run(local_path(path), checkpoint, options, own_types)
    if checkpoint is not None:
        raise UserError(f"--checkpoint is for runs, and {path} is not one; name the file of weights itself")
    if path.startswith("open_clip:"):
        return load_open_clip(path.removeprefix("open_clip:"), options)
    location = reading.resolve_weights(path)
    if location.is_dir():
        kind = model_type(location)
        if kind in PROJECTIONS:
            return load_transformers(location, options)
        raise UserError(f"{path} is a folder{f' of a {kind} model' if kind else ''} that cannot be evaluated; {KNOWN}")
    state = reading.read_weights(location)
    if any(key.startswith("visual_encoder.") for key in state):
        return load_albef_file(location, state, options)
    if any(key.startswith("transformer.blocks.") for key in state):
        return load_vlmo_file(location, state, options)
    raise UserError(f"{path} contains {', '.join(list(state)[:3])}, ..., of an unknown model; {KNOWN}")
