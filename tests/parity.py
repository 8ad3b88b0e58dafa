"""Numbers printed by published code, as small files in tests/fixtures."""

import json
import lzma
from pathlib import Path

import numpy as np
import safetensors.torch
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


def thin(gradient: Tensor) -> Tensor:
    """At most some 400 of its values."""
    return gradient.flatten()[:: -(-gradient.numel() // 400)]


def write_fixture(path: Path, files: dict[str, dict[str, Tensor]], meta: dict) -> None:
    """Tensors named FILE/KEY. Bytes of the same significance stand together, to compress."""
    named = {f"{file}/{key}": tensor.contiguous() for file, tensors in files.items() for key, tensor in tensors.items()}
    plain = safetensors.torch.save(named, {"meta": json.dumps(meta)})
    plain += b"\0" * (-len(plain) % 4)
    path.write_bytes(lzma.compress(np.frombuffer(plain, np.uint8).reshape(-1, 4).T.tobytes(), preset=9))


def read_fixture(name: str) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """FILE -> KEY -> tensor of all fixtures whose names match, and the settings."""
    files: dict[str, dict[str, Tensor]] = {}
    meta: dict = {}
    for path in sorted(FIXTURES.glob(name)):
        planes = np.frombuffer(lzma.decompress(path.read_bytes()), np.uint8).reshape(4, -1)
        plain = planes.T.tobytes()
        size = int.from_bytes(plain[:8], "little")
        header = json.loads(plain[8 : 8 + size])
        meta |= json.loads(header.pop("__metadata__")["meta"])
        end = 8 + size + max(span["data_offsets"][1] for span in header.values())
        for key, tensor in safetensors.torch.load(plain[:end]).items():
            file, _, rest = key.partition("/")
            files.setdefault(file, {})[rest] = tensor
    return files, meta


def on_device(
    read: tuple[dict[str, dict[str, Tensor]], dict], device: str
) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """What was read, with its tensors on a device."""
    files, meta = read
    return {file: {key: x.to(device) for key, x in tensors.items()} for file, tensors in files.items()}, meta
