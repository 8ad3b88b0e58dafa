"""Small inputs that the tests of this folder write themselves."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from vlp import cli


def image_bytes(n: int, kind: str = "jpeg", size: tuple[int, int] = (12, 10)) -> bytes:
    """Encode a small image of noise, another one for each ``n``."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(n).integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    """Write a tar of these members, also if a name occurs twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shard(path: Path, numbers, prefix: str = "") -> Path:
    """Write a shard of one image and one text per number."""
    members = {}
    for n in numbers:
        members |= {f"{prefix}{n}.jpg": image_bytes(n), f"{prefix}{n}.txt": b"caption %d" % n}
    return write_tar(path, members)


def write_lines(path: Path, records: list) -> Path:
    """Write one json record per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(capfd, *arguments: object) -> tuple[int, str, str]:
    """Return exit code, output and errors of ``vlp ARGUMENTS``."""
    capfd.readouterr()
    code = cli.main([str(a) for a in arguments])
    return code, *capfd.readouterr()


def refused(capfd, *arguments: object) -> str:
    """Return the one line with which ``vlp ARGUMENTS`` refuses."""
    code, _, error = run(capfd, *arguments)
    assert code == 2 and error.count("\n") == 1 and error.startswith("vlp: "), (code, error)
    return error


def quarantine(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
