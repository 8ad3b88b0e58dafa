"""``vlp serve``: a page in the browser that finds images by a text (extra ``serve``)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vlp.commands.code import add_code_options, read_code
from vlp.errors import UserError
from vlp.files import local_path
from vlp.specs.names import NO_TYPES

if TYPE_CHECKING:
    import numpy as np


def add_parser(commands) -> None:
    parser = commands.add_parser("serve", help="search images by text in the browser (extra 'serve')")
    parser.add_argument("folder", metavar="RUN", type=local_path)
    parser.add_argument("--data", metavar="SHARDS", help="images to search (default: the run's data.val)")
    parser.add_argument("--port", type=int, default=7860)
    add_code_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    serve(options.folder, options.data, options.port, read_code(options, options.folder).types)
    return 0


def searcher(
    folder: Path, data: str | None, count: int = 12, own_types: Mapping[str, type] = NO_TYPES
) -> Callable[[str], list[tuple[np.ndarray, str]]]:
    """Encode the images of ``data``, and return a function from a text to the ``count`` nearest ones.

    Each image is returned as (H, W, 3) uint8 pixels with its first caption.

    Raises:
        UserError: if the folder is not a run, or there are no images.
    """
    from vlp.data.image import decode
    from vlp.data.reading.shards import ShardReader
    from vlp.loading.run import load_run
    from vlp.tasks.base import evaluating
    from vlp.tasks.embeddings import encode_pairs, encode_texts
    from vlp.tasks.metrics import topk
    from vlp.tasks.requirements import need_embeddings

    model = load_run(folder, own_types=own_types).eval_model
    source = data or model.data.val
    if source is None:
        raise UserError("there is nothing to search; give --data SHARDS, or set data.val in the config")
    need_embeddings(model, "serve")
    with evaluating(model.model):
        pairs, reader = encode_pairs(model, source, batch_size=64), ShardReader(source)

    if len(pairs.images) == 0:
        raise UserError(f"{source} has no usable image with a caption; run `vlp data check` on it")

    def search(text: str) -> list[tuple[np.ndarray, str]]:
        with evaluating(model.model):
            nearest = topk(encode_texts(model, [text]), pairs.images, count)[1][0]
        samples = [reader.read(*reader.locate(row)) for row in pairs.rows[nearest].tolist()]
        return [(decode(sample.image), sample.captions[0]) for sample in samples]

    return search


def serve(folder: Path, data: str | None, port: int, own_types: Mapping[str, type] = NO_TYPES) -> None:
    """Serve the page on this machine until interrupted. Raises UserError where gradio is not installed."""
    try:
        import gradio
    except ImportError:
        raise UserError("vlp serve needs gradio; pip install 'vlp[serve]'") from None
    page = gradio.Interface(
        searcher(folder, data, own_types=own_types),
        gradio.Textbox(label="text"),
        gradio.Gallery(label="images", columns=6),
        title=f"Image search in {folder.name}",
        flagging_mode="never",
    )
    page.launch(server_name="127.0.0.1", server_port=port)
