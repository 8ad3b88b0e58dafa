"""`vlp serve`: its limits on requests and ports, which hold before a model is loaded or a body is read."""

import asyncio
import socket
import sys
import types

import pytest

from tests.cases.inputs import refused
from tests.conftest import toy_overrides
from tests.processes import train
from vlp.commands.serve import MAX_REQUEST, MAX_TEXT, LimitedRequests, check_port, searcher
from vlp.errors import UserError


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    train(*toy_overrides(world, output), "train.steps=1", "save.every=1", "data.workers=0", "evaluate_every=0")
    return output / "toy"


def request(parts: list[bytes], declared: int | str | None = None, query: bytes = b"") -> tuple[list[dict], int]:
    """The answer to a request whose body comes in parts, and how many bytes of it the application got."""
    got, sent = [], []
    left = list(parts)

    async def receive() -> dict:
        body = left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    async def send(message: dict) -> None:
        sent.append(message)

    async def app(scope, receive, send) -> None:
        more = True
        while more:
            message = await receive()
            got.append(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})

    headers = [] if declared is None else [(b"content-length", str(declared).encode())]
    scope = {"type": "http", "path": "/", "query_string": query, "headers": headers}
    asyncio.run(LimitedRequests(app)(scope, receive, send))
    return sent, sum(map(len, got))


def test_short_requests_pass():
    sent, got = request([b"x" * 100, b"y" * 50], declared=150)
    assert sent[0]["status"] == 200 and got == 150


@pytest.mark.parametrize(
    ("parts", "declared", "query", "most"),
    [
        ([b"x"], 300 << 20, b"", 0),  # refused by what it declares, and nothing is read
        ([b"x"], "9" * 5000, b"", 0),
        ([b"x"], "-1", b"", 0),
        ([b"x" * 10_000] * 2200, None, b"", MAX_REQUEST),  # without a length: read up to the limit
        ([b"x" * 10_000] * 2200, 10, b"", MAX_REQUEST),  # with one that is wrong
        ([b"x"], None, b"q" * (MAX_REQUEST + 1), 0),
    ],
)
def test_long_requests_are_refused_before_they_are_read(parts, declared, query, most):
    sent, got = request(parts, declared, query)
    assert sent[0]["status"] == 413 and got <= most


@pytest.mark.parametrize("port", [0, -1, 65536, 10**23])
def test_impossible_ports(port):
    with pytest.raises(UserError, match=f"--port is {port}; give one from 1 to 65535"):
        check_port(port)


def test_a_port_in_use_is_found_before_the_run_is_opened(tmp_path, capfd, monkeypatch):
    for name in ("gradio", "starlette", "starlette.middleware"):
        module = types.ModuleType(name)
        module.Middleware = None
        monkeypatch.setitem(sys.modules, name, module)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(capfd, "serve", tmp_path / "nowhere", "--port", port)
    assert f"port {port} cannot be used (Address already in use); give another one with --port" in line


def test_texts_to_search_for(run):
    search = searcher(run, None, count=3)
    assert len(search("a red square")) == len(search("x" * MAX_TEXT)) == len(search("lone \ud800 surrogate")) == 3
    for text in ("", "  \n", None, ["a"], 5):
        with pytest.raises(UserError, match="no text to search for"):
            search(text)
    with pytest.raises(UserError, match="the text has 1,001 characters; type up to 1,000"):
        search("x" * (MAX_TEXT + 1))
