"""`vlp data` packs every annotation format, and a mistake ends with one line and exit code 2."""

import csv
import io
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import draw_pairs, vlp
from vlp.cli import main
from vlp.data.reading.shards import ShardReader
from vlp.data.text import load_tokenizer


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "images"
    draw_pairs(folder, 6)
    return folder


CAPTIONS = {f"{n:04d}.png": [f'a "thing", {n}', f"thing {n}"] for n in range(6)}


def table(delimiter: str) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(["image", "caption"])
    writer.writerows((image, c) for image, captions in CAPTIONS.items() for c in captions)
    return text.getvalue()


def karpathy() -> dict:
    images = [
        {"filename": i, "split": "train", "sentences": [{"raw": c} for c in captions]}
        for i, captions in CAPTIONS.items()
    ]
    return {"images": [*images, {"filename": "x.jpg", "split": "val", "sentences": [{"raw": "not this one"}]}]}


def coco() -> dict:
    return {
        "images": [{"id": n, "file_name": image} for n, image in enumerate(CAPTIONS)],
        "annotations": [
            {"image_id": n, "caption": c} for n, captions in enumerate(CAPTIONS.values()) for c in captions
        ],
    }


LINES = "\n".join(json.dumps({"image": image, "captions": captions}) for image, captions in CAPTIONS.items())
FORMATS = {
    "csv": ("a.csv", table(","), []),
    "tsv": ("a.tsv", table("\t"), []),
    "jsonl": ("a.jsonl", LINES, []),
    "named jsonl": ("a.list", LINES, ["--format", "jsonl"]),
    "karpathy": ("dataset.json", json.dumps(karpathy()), ["--split", "train"]),
    "coco": ("captions.json", json.dumps(coco()), []),
    "albef": ("pairs.json", json.dumps([{"image": i, "caption": c} for i, c in CAPTIONS.items()]), []),
}


def run(capsys, *arguments: object) -> tuple[int, str, list[str]]:
    """Return exit code, stdout and the lines of stderr."""
    code = main([str(a) for a in ("data", *arguments)])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def assert_refused(capsys, expected: str, *arguments: object) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out, len(err)) == (2, "", 1), err
    assert err[0].startswith("vlp: ")
    assert expected in err[0]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_packed_into_the_same_samples(capsys, images, tmp_path, name):
    file, text, options = FORMATS[name]
    (tmp_path / file).write_text(text)
    arguments = (tmp_path / file, tmp_path / "out", "--image-root", images, "--workers", 1, *options)
    code, out, err = run(capsys, "pack", *arguments)
    assert (code, out, err) == (0, f"6 samples in 1 shards in {tmp_path / 'out'}\n", [])
    reader = ShardReader(str(tmp_path / "out"))
    samples = [reader.read(0, n) for n in range(6)]
    assert [list(s.captions) for s in samples] == list(CAPTIONS.values())
    assert [s.image for s in samples] == [(images / image).read_bytes() for image in CAPTIONS]


def test_folder_with_a_jsonl_is_packed_checked_and_shown(images, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for image in CAPTIONS:
        os.link(images / image, folder / image)
    (folder / "metadata.jsonl").write_text(LINES + '\n{"image": "gone.jpg", "caption": "a"}')
    out = tmp_path / "shards"
    packed = vlp("data", "pack", folder, out)
    assert packed.returncode == 0
    assert packed.stdout == f"6 samples in 1 shards in {out}\n1 left out, see {out}/quarantine.jsonl\n"
    checked = vlp("data", "check", out)
    assert (checked.returncode, checked.stdout.splitlines()[0]) == (0, "6 samples with 12 captions in 1 shards")
    shown = vlp("data", "stats", out, "--grid", tmp_path / "grid.png")
    assert shown.returncode == 0
    found, end = json.JSONDecoder().raw_decode(shown.stdout)
    assert found["width_pixels"]["median"] == 48
    assert shown.stdout[end:] == f"\nwrote {tmp_path / 'grid.png'}\n"
    assert np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).std() > 20


def test_check_lists_damaged_shards_and_exits_with_1(capsys, images, tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    run(capsys, "pack", tmp_path / "a.jsonl", tmp_path / "out", "--image-root", images, "--shard-samples", 2)
    shard = tmp_path / "out" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    code, out, err = run(capsys, "check", tmp_path / "out")
    assert (code, err) == (1, [])
    assert out.splitlines()[:2] == ["4 samples with 8 captions in 3 shards", "damaged shards: 1"]
    assert str(shard) in out.splitlines()[2]


def test_trained_tokenizer_can_be_loaded(capsys, world, tmp_path):
    code, out, _ = run(capsys, "tokenizer", world / "shards", tmp_path / "tokenizer", "--vocab-size", 120)
    assert code == 0
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    assert out.startswith(f"{tokenizer.vocab_size} tokens in {tmp_path / 'tokenizer'}")
    assert 50 < tokenizer.vocab_size <= 120
    assert tokenizer.rows(["a red square"])[0][0] == tokenizer.cls_id


def test_invalid_input_of_pack_is_refused_in_one_line(capsys, images, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "a.jsonl").write_text(LINES)
    for name, text in {
        "nothing.csv": "",
        "header.csv": "image,caption\n",
        "nothing.jsonl": "\n",
        "nothing.json": "",
        "list.json": "[]",
        "broken.jsonl": '{"image": ',
    }.items():
        (tmp_path / name).write_text(text)
    out = tmp_path / "out"

    def refused(expected: str, annotations: str, *options: object) -> None:
        assert_refused(capsys, expected, "pack", tmp_path / annotations, out, "--workers", 1, *options)
        left = list(out.iterdir()) if out.exists() else []
        assert [p.name for p in left] in ([], [".pack.lock"])

    refused("no such file or folder", "missing.csv")
    refused("should hold one .jsonl, .csv, .tsv or .json file, but holds none", "empty")
    for name in ("nothing.csv", "header.csv", "nothing.jsonl", "list.json"):
        refused("no pair to pack", name)
    refused("nothing.json:1 is not JSON", "nothing.json")
    refused("none of the 1 pairs is usable; the first: 'broken.jsonl:1': json does not parse", "broken.jsonl")
    refused("is not a folder; give the one that image paths start from", "a.jsonl", "--image-root", tmp_path / "no")
    refused("is not a folder; give the one", "a.jsonl", "--image-root", tmp_path / "a.jsonl")
    refused("none of the 6 pairs is usable", "a.jsonl", "--image-root", tmp_path / "photos")
    refused("--image-root", "a.jsonl")  # the images are not next to it
    refused("give whole numbers from 1 on", "a.jsonl", "--image-root", images, "--shard-samples", 0)
    refused("give whole numbers from 1 on", "a.jsonl", "--image-root", images, "--max-side", -3)
    refused("give at least 1", "a.jsonl", "--image-root", images, "--workers", 0)


def test_output_that_cannot_be_written_is_refused_in_one_line(capsys, images, tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "file").write_text("")
    arguments = ("pack", tmp_path / "a.jsonl", tmp_path / "file" / "out", "--image-root", images)
    assert_refused(capsys, "cannot write", *arguments)
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
        arguments = ("pack", tmp_path / "a.jsonl", tmp_path / "closed" / "out", "--image-root", images)
        assert_refused(capsys, "Permission denied", *arguments)


@pytest.mark.parametrize("action", ["check", "stats", "tokenizer"])
def test_unreadable_shards_are_refused_in_one_line(capsys, tmp_path, monkeypatch, action):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "text", "without-images"):
        (tmp_path / folder).mkdir()
    (tmp_path / "text" / "a.tar").write_text("not a tar")
    (tmp_path / "without-images" / "a.tar").write_bytes(b"\0" * 10240)
    rest = ["out"] if action == "tokenizer" else []
    for location in ("missing", "empty", "x{", "odd://x"):
        assert_refused(capsys, location, action, location, *rest)
    if action == "check":
        assert run(capsys, action, "text")[0] == 1
        assert run(capsys, action, "without-images")[:2] == (
            1,
            "0 samples with 0 captions in 1 shards\ndamaged shards: 0\ndead samples: 0\nduplicate keys: 0\n"
            "there is nothing to train on\n",
        )
    else:
        assert_refused(capsys, "a.tar is not a readable tar shard", action, "text", *rest)
        assert_refused(capsys, "without-images", action, "without-images", *rest)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "samples.png").exists()


def test_tokenizer_that_cannot_be_written_is_refused_in_one_line(capsys, world, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(capsys, "cannot write", "tokenizer", world / "shards", tmp_path / "file" / "t")
