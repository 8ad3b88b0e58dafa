"""Packing of annotations as people have them: a bad row, path or image costs one pair, and its reason is listed."""

import hashlib
import json
import os
import re
import socket
import time
from dataclasses import asdict, replace

import pytest

import vlp.data.preparing.pack as module
from tests.cases.inputs import image_bytes, quarantine, refused, run, write_lines
from vlp.data.preparing.formats import Pair
from vlp.data.preparing.pack import Packing, _plan
from vlp.data.reading.shards import ShardReader
from vlp.data.workers import most_workers


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder with a.jpg and b.jpg, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    for n, name in enumerate("ab"):
        (tmp_path / f"{name}.jpg").write_bytes(image_bytes(n))
    return tmp_path


def packed(capfd, annotations, *options) -> tuple[list[str], list[str]]:
    """The captions that `vlp data pack` packed, and the reasons of those that it left out."""
    code, _, error = run(capfd, "data", "pack", annotations, "out", "--workers", 1, *options)
    assert code == 0, error
    reader = ShardReader("out")
    captions = [c for n in range(len(reader)) for c in reader.read(*reader.locate(n)).captions]
    return captions, [line["reason"] for line in quarantine(annotations.parent / "out")]


GOOD = {"image": "b.jpg", "caption": "dog"}
BAD = {
    "null_caption": ({"image": "a.jpg", "caption": None}, "no caption"),
    "captions of null": ({"image": "a.jpg", "captions": [None]}, "no caption"),
    "a number": ({"image": "a.jpg", "caption": 5}, "should be a text or a list of texts, found 5"),
    "nul_in_path": ({"image": "a\0.jpg", "caption": "x"}, "character that no file name can have"),
    "surrogate in path": ({"image": "\ud800.jpg", "caption": "x"}, "character that no file name can have"),
    "a list for a path": ({"image": ["a.jpg"], "caption": "x"}, "should be a path"),
    "an empty path": ({"image": " ", "caption": "x"}, "should be a path"),
    "no object": ([1, 2], "json is not an object"),
    "a folder": ({"image": ".", "caption": "x"}, "it is a folder, not a file"),
    "a device": ({"image": "/dev/zero", "caption": "x"}, "it is a device, not a file"),
    "too long a path": ({"image": "x" * 5000, "caption": "x"}, "File name too long"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_costs_one_pair(images, capfd, name):
    row, reason = BAD[name]
    captions, reasons = packed(capfd, write_lines(images / "x.jsonl", [row, GOOD]))
    assert captions == ["dog"] and len(reasons) == 1 and reason in reasons[0]


def test_coco_without_a_caption_costs_one_pair(images, capfd):
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 1, "caption": None}, {"image_id": 2, "caption": "dog"}],
    }
    (images / "coco.json").write_text(json.dumps(content))
    assert packed(capfd, images / "coco.json") == (["dog"], ["no caption"])


def test_captions_beside_an_empty_list_count(images, capfd):
    rows = [{"image": "a.jpg", "captions": [], "caption": "cat"}, {"image": "b.jpg", "captions": ["dog", None]}]
    assert packed(capfd, write_lines(images / "x.jsonl", rows)) == (["cat", "dog"], [])


@pytest.mark.parametrize("kind", ["fifo", "socket", "link to a fifo"])
def test_an_image_that_is_not_a_file_costs_one_pair_and_no_time(images, capfd, kind):
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as s:
            s.bind("x.jpg")
    else:
        os.mkfifo("f.jpg")
        os.symlink("f.jpg", "x.jpg")
    begin = time.monotonic()
    captions, reasons = packed(capfd, write_lines(images / "x.jsonl", [{"image": "x.jpg", "caption": "x"}, GOOD]))
    assert captions == ["dog"] and len(reasons) == 1 and time.monotonic() - begin < 20


@pytest.mark.parametrize(
    "name, content, reason",
    [
        (
            "url.csv",
            "image,caption\nhttps://example.org/a.jpg,a cat\n",
            "'https://example.org/a.jpg': .* it is a URL: download",
        ),
        ("win.csv", "image,caption\nimg\\a.jpg,a cat\n", "it has backslashes: write it with /"),
        (
            "abs.json",
            [{"image": "/export/share/a.jpg", "caption": "a"}],
            "an absolute path, which --image-root does not change",
        ),
    ],
)
def test_paths_that_cannot_be_local_are_called_that(images, capfd, name, content, reason):
    (images / name).write_text(content if isinstance(content, str) else json.dumps(content))
    said = refused(capfd, "data", "pack", name, "out", "--image-root", ".", "--workers", 1)
    assert re.search(reason, said)


def test_split_of_file_named_train(images, capfd):
    rows = [
        {"image": "a.jpg", "caption": "cat", "split": "train"},
        {"image": "b.jpg", "caption": "dog", "split": "val"},
    ]
    assert packed(capfd, write_lines(images / "train.jsonl", rows), "--split", "train") == (["cat"], [])


def test_format_by_content(images, capfd):
    (images / "tab.csv").write_text("filepath\ttitle\na.jpg\ta cat, on a mat\nb.jpg\ta dog\n")
    assert packed(capfd, images / "tab.csv") == (["a cat, on a mat", "a dog"], [])


def test_utf16_advice(images, capfd):
    (images / "c.csv").write_bytes("image,caption\na.jpg,cat\n".encode("utf-16"))
    said = refused(capfd, "data", "pack", "c.csv", "out", "--workers", 1)
    assert "c.csv:1 is not UTF-8; it is probably UTF-16: convert the file, e.g. with iconv -f UTF-16 -t UTF-8" in said


def test_a_thousand_workers_are_no_thousand_processes(images, capfd, monkeypatch):
    started = []
    pool = module.ProcessPoolExecutor

    def counted(max_workers, **fields):
        started.append(max_workers)
        return pool(max_workers=max_workers, **fields)

    monkeypatch.setattr(module, "ProcessPoolExecutor", counted)
    code, _, error = run(capfd, "data", "pack", write_lines(images / "x.jsonl", [GOOD]), "out", "--workers", 1000)
    assert code == 0, error
    assert started == [1]  # there is one shard


def test_spellings_of_a_path_are_one_sample(images, capfd):
    rows = [{"image": name, "caption": name} for name in ("a.jpg", "./a.jpg", str(images / "a.jpg"))]
    captions, _ = packed(capfd, write_lines(images / "x.jsonl", rows))
    assert captions == [row["caption"] for row in rows] and len(ShardReader("out")) == 1


def test_packs_of_earlier_versions_are_still_known():
    """The plan of a pair has no field of later versions, so a finished pack of before is found finished."""
    pair = Pair("a.jpg", ("cat",), "a", "x.csv:2", {"n": 1}, listed="a.jpg")
    before = {"image": "a.jpg", "captions": ("cat",), "key": "a", "source": "x.csv:2", "extra": {"n": 1}}
    text = json.dumps([asdict(Packing()), [before]], sort_keys=True)
    assert _plan([pair], Packing()) == hashlib.sha256(text.encode()).hexdigest()
    assert _plan([replace(pair, problem="x")], Packing()) != _plan([pair], Packing())


def test_a_thousand_workers_are_as_many_as_the_machine_can_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert most_workers(1000, 5000) == 16 and most_workers(1000, 3) == 3 and most_workers(0, 3) == 1


COMMANDS = (
    "data pack {bad} out",
    "data pack captions.jsonl {bad}",
    "data pack captions.jsonl out --image-root {bad}",
    "data check {bad}",
    "data check https://{bad}.tar",
    "data stats {bad}",
    "data tokenizer {bad} out",
    "data triples {bad} out",
    "data triples captions.jsonl {bad}",
    "data paraphrase {bad} out --same-image",
    "data annotations nlvr2 {bad} out",
    "data answers {bad} out",
    "data dedup {bad}",
    "data dedup . --output {bad}",
    "data world {bad}",
    "report {bad}",
)


@pytest.mark.parametrize("bad", ["a\0b", "a\ud800b"], ids=["NUL", "surrogate"])
@pytest.mark.parametrize("command", COMMANDS)
def test_locations_that_no_path_can_be_are_one_line(images, capfd, command, bad):
    (images / "captions.jsonl").write_text(json.dumps({"image": "a.jpg", "caption": "a"}) + "\n")
    before = sorted(images.rglob("*"))
    refused(capfd, *(word.format(bad=bad) for word in command.split()))
    assert sorted(images.rglob("*")) == before


CONTENT = {
    "objects.csv": '{"image": "a.jpg", "caption": "x"}\n{"image": "b.jpg", "caption": "y"}\n',
    "object.txt": '{"image": "a.jpg", "caption": "x"}\n',
    "table.jsonl": "image,caption\na.jpg,x\n",
    "table": "caption;image\nx;a.jpg\n",
    "semicolons.tsv": "image;caption\na.jpg;x\n",
    "spaces.csv": " image , caption \n a.jpg , x\n",
}


@pytest.mark.parametrize("name", CONTENT)
def test_format_and_delimiter_are_those_of_the_content(images, capfd, name):
    (images / name).write_text(CONTENT[name])
    captions, reasons = packed(capfd, images / name)
    assert captions == ["x", "y"][: len(captions)] and captions and not reasons


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("objects.csv", ["--format", "csv"], "objects.csv is not csv: its content is jsonl; leave out --format"),
        ("table.jsonl", ["--format", "jsonl"], "table.jsonl is not jsonl: its content is tsv; leave out --format"),
        ("words.csv", [], "found 'image caption', in one column"),
        ("words.txt", [], "found 'imagen', ' caption', separated by semicolons"),
    ],
)
def test_other_formats_are_named(images, capfd, name, options, message):
    words = {"words.csv": "image caption\na.jpg x\n", "words.txt": "imagen; caption\na.jpg;x\n"}
    (images / name).write_text((CONTENT | words)[name])
    assert message in refused(capfd, "data", "pack", name, "out", *options)
