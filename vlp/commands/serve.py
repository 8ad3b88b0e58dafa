"""``vlp serve``: a page in the browser that finds images by a text (extra ``serve``)."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vlp.commands.code import add_code_options, read_code
from vlp.errors import UserError
from vlp.files import local_path
from vlp.specs.names import NO_TYPES

if TYPE_CHECKING:
    import numpy as np

HOST = "127.0.0.1"
MAX_TEXT = 1000  # characters; a text tower reads at most a few hundred tokens
MAX_REQUEST = 1 << 16  # bytes of a request's address, and of its body


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="search images by text in the browser (extra 'serve')",
        epilog="example: vlp serve runs/demo --data shards/val",
    )
    parser.add_argument("folder", metavar="RUN", type=local_path)
    parser.add_argument("--data", metavar="SHARDS", help="images to search (default: the run's data.val)")
    parser.add_argument("--port", type=int, default=7860)
    add_code_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    folder = local_path(options.folder)
    serve(folder, options.data, options.port, read_code(options, folder).types)
    return 0


def searcher(
    folder: Path, data: str | None, count: int = 12, own_types: Mapping[str, type] = NO_TYPES
) -> Callable[[str], list[tuple[np.ndarray, str]]]:
    """Encode the images of ``data``, and return a function from a text to the ``count`` nearest ones.

    Each image is returned as (H, W, 3) uint8 pixels with its first caption. The function raises UserError for a text that is
    empty or longer than `MAX_TEXT`.

    Raises:
        UserError: if the folder is not a run, or there are no images.
    """
    from vlp.data.image import decode
    from vlp.data.reading.shards import ShardReader
    from vlp.errors import BadSample
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
        if not isinstance(text, str) or not text.strip():  # a request of another program may have any value
            raise UserError("there is no text to search for; type one")
        if len(text) > MAX_TEXT:
            raise UserError(f"the text has {len(text):,} characters; type up to {MAX_TEXT:,}")
        text = text.encode(errors="replace").decode()  # without lone surrogates
        with evaluating(model.model):
            nearest = topk(encode_texts(model, [text]), pairs.images, count)[1][0]
        found = []
        for row in pairs.rows[nearest].tolist():
            with suppress(BadSample):  # altered since it was encoded
                sample = reader.read(*reader.locate(row))
                found.append((decode(sample.image, model.data.max_pixels), sample.captions[0]))
        return found

    return search


class LimitedRequests:
    """ASGI middleware that refuses a request with a long address or body before it is read.

    The page sends short texts and no files, and the server below it would keep an upload of any size.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        address = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        received, has_answered = 0, False

        async def limited() -> dict:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_REQUEST:
                raise _TooLarge
            return message

        async def answer(message: dict) -> None:
            nonlocal has_answered
            has_answered = True
            await send(message)

        try:
            if address > MAX_REQUEST or not declared.isdigit() or len(declared) > 9 or int(declared) > MAX_REQUEST:
                raise _TooLarge
            await self.app(scope, limited, answer)
        except _TooLarge:
            if not has_answered:
                headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
                await send({"type": "http.response.start", "status": 413, "headers": headers})
                await send({"type": "http.response.body", "body": b"the request is too large\n"})


class _TooLarge(Exception):
    """A request over the limits of `LimitedRequests`."""


def check_port(port: int) -> None:
    """Check that the page can be served on a port, before minutes are spent on encoding images.

    Raises:
        UserError: if it is not a port, or is in use.
    """
    if not 1 <= port <= 65535:
        raise UserError(f"--port is {port}; give one from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as e:
            raise UserError(f"port {port} cannot be used ({e.strerror}); give another one with --port") from None


def serve(folder: Path, data: str | None, port: int, own_types: Mapping[str, type] = NO_TYPES) -> None:
    """Serve the page on this machine until interrupted.

    Raises:
        UserError: if gradio is not installed, the port cannot be used, or as `searcher` raises it.
    """
    try:
        import gradio
        from starlette.middleware import Middleware
    except ImportError:
        raise UserError("vlp serve needs gradio; pip install 'vlp[serve]'") from None
    check_port(port)
    search = searcher(folder, data, own_types=own_types)

    def find(text: str) -> list[tuple[np.ndarray, str]]:
        try:
            return search(text)
        except UserError as e:
            raise gradio.Error(str(e), print_exception=False) from None

    page = gradio.Interface(
        find,
        gradio.Textbox(label="text", max_length=MAX_TEXT),
        gradio.Gallery(label="images", columns=6),
        title=f"Image search in {folder.name}",
        flagging_mode="never",
        analytics_enabled=False,
    )
    try:
        page.launch(
            server_name=HOST,
            server_port=port,
            max_file_size=MAX_REQUEST,
            app_kwargs={"middleware": [Middleware(LimitedRequests)]},
        )
    except OSError as e:  # another program has taken the port in the meantime
        raise UserError(f"port {port} cannot be used ({e}); give another one with --port") from None
