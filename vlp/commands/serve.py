"""A page in the browser that finds pictures by words, for a look at what a run has learned (extra ``serve``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from vlp.data.image import decode
from vlp.data.shards import ShardReader
from vlp.errors import UserError
from vlp.loading.run import open_run
from vlp.tasks.base import encode_pairs, encode_texts, evaluating
from vlp.tasks.metrics import top


def searcher(folder: Path, data: str | None, count: int = 12) -> Callable[[str], list[tuple[np.ndarray, str]]]:
    """A function from words to the ``count`` nearest pictures of ``data``, each with its first caption.

    Raises:
        UserError: if the folder is no run, or there are no pictures.
    """
    subject, _ = open_run(folder)
    source = data or subject.data.val
    if source is None:
        raise UserError("there is nothing to search: give --data SHARDS, or set data.val in the config")
    pairs, reader = encode_pairs(subject, source, batch_size=64), ShardReader(source)

    def search(words: str) -> list[tuple[np.ndarray, str]]:
        with evaluating(subject.model):
            nearest = top(encode_texts(subject, [words]), pairs.images, count)[0]
        samples = [reader.read(*reader.place(row)) for row in pairs.rows[nearest].tolist()]
        return [(decode(sample.image), sample.captions[0]) for sample in samples]

    return search


def serve(folder: Path, data: str | None, port: int) -> None:
    """Serves the page on this machine until it is interrupted. Raises UserError where gradio is not installed."""
    try:
        import gradio
    except ImportError:
        raise UserError("vlp serve needs gradio; pip install 'vlp[serve]'") from None
    page = gradio.Interface(
        searcher(folder, data),
        gradio.Textbox(label="words"),
        gradio.Gallery(label="pictures", columns=6),
        title=f"What {folder.name} finds",
        flagging_mode="never",
    )
    page.launch(server_name="127.0.0.1", server_port=port)
