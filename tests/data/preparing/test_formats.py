import json
import re
from pathlib import Path

import numpy as np
import pytest

import vlp.data.preparing.formats as formats
from vlp.data.preparing.formats import Pair, read_pairs
from vlp.data.reading.index import short_key
from vlp.errors import UserError

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"


def write(folder: Path, name: str, content) -> Path:
    file = folder / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def summary(pairs) -> list[tuple]:
    return [(Path(p.image).name, p.captions, p.key) for p in pairs]


TWO = [("a.jpg", ("A dog", "A brown dog"), "a"), ("b.png", ("A cat",), "b")]
ALBEF = [{"image": "a.jpg", "caption": "A dog"}, {"image": "b.png", "caption": ["A cat"]}]
ALBEF += [{"image": "a.jpg", "caption": "A brown dog"}]
KARPATHY = {
    "images": [
        {"filename": "a.jpg", "sentences": [{"raw": "A dog"}, {"raw": "A brown dog"}], "split": "train", "cocoid": 7},
        {"filename": "b.png", "sentences": [{"raw": " A cat "}], "split": "restval", "cocoid": 8},
    ]
}
COCO = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.png"}],
    "annotations": [
        {"image_id": 1, "caption": "A dog"},
        {"image_id": 2, "caption": "A cat"},
        {"image_id": 1, "caption": "A brown dog"},
    ],
}
FILES = {
    "filepath.csv": "filepath,title\na.jpg,A dog\nb.png,A cat\na.jpg,A brown dog\n",
    "semicolon.csv": "caption;image\nA dog;a.jpg\nA cat;b.png\nA brown dog;a.jpg\n",
    "flickr30k.csv": "image_name| comment_number| comment\na.jpg| 0| A dog\nb.png| 0| A cat\na.jpg| 1| A brown dog\n",
    "windows.csv": b"\xef\xbb\xbfImage,Caption\r\na.jpg,A dog\r\nb.png,A cat\r\n\r\na.jpg,A brown dog\r\n",
    "headerless.csv": 'a.jpg,"A dog"\nb.png,A cat\na.jpg,A brown dog\n',
    "header.tsv": "file\ttext\na.jpg\tA dog\nb.png\tA cat\na.jpg\tA brown dog\n",
    "cc3m.tsv": "a.jpg\tA dog\nb.png\tA cat\na.jpg\tA brown dog\n",
    "other_order.tsv": "A dog\ta.jpg\nA cat\tb.png\nA brown dog\ta.jpg",
    "flickr8k.token.txt": "a.jpg#0\tA dog\nb.png#0\tA cat\na.jpg#1\tA brown dog\n",
    "x.jsonl": '{"image": "a.jpg", "captions": ["A dog", "A brown dog"]}\n\n{"image": "b.png", "caption": "A cat"}\n',
    "albef.json": ALBEF,
    "karpathy.json": KARPATHY,
    "coco.json": COCO,
}


@pytest.mark.parametrize("name", FILES)
def test_every_form_states_the_same_pairs(tmp_path, name):
    assert summary(read_pairs(write(tmp_path, name, FILES[name]))) == TWO


def test_paths_are_relative_to_the_file_or_the_root(tmp_path):
    file = write(tmp_path, "x.csv", "image,caption\nsub/a.jpg,A dog\n/abs/b.jpg,A cat\n")
    assert [p.image for p in read_pairs(file)] == [str(tmp_path / "sub/a.jpg"), "/abs/b.jpg"]
    assert next(iter(read_pairs(file, image_root="/photos"))).image == "/photos/sub/a.jpg"


def test_further_fields_become_extra_and_the_line_becomes_source(tmp_path):
    file = write(tmp_path, "x.csv", "image,caption,photographer,index\na.jpg,A dog,Ann,5\na.jpg,B,Bob,6\n")
    pair = next(iter(read_pairs(file)))
    assert pair.extra == {"photographer": "Ann"}  # not index: the shards have one of their own
    assert pair.source == "x.csv:2"
    karpathy = list(read_pairs(write(tmp_path, "k.json", KARPATHY)))
    assert [p.extra for p in karpathy] == [{"cocoid": 7}, {"cocoid": 8}] and karpathy[1].source == "k.json:images[1]"
    assert next(iter(read_pairs(write(tmp_path, "c.json", COCO)))).extra == {"image_id": 1}
    albef = write(tmp_path, "a.json", [{"image": "a.jpg", "caption": "A", "image_id": "coco_1"}])
    assert next(iter(read_pairs(albef))).extra == {"image_id": "coco_1"}


def test_karpathys_filepath_is_a_folder(tmp_path):
    record = KARPATHY["images"][0] | {"filepath": "val2014"}
    pair = next(iter(read_pairs(write(tmp_path, "k.json", {"images": [record]}))))
    assert pair.image == str(tmp_path / "val2014" / "a.jpg") and pair.key == "val2014_a"


def test_splits_are_selected_and_joined(tmp_path):
    file = write(tmp_path, "k.json", KARPATHY)
    assert summary(read_pairs(file, split="train")) == TWO[:1]
    assert summary(read_pairs(file, split="train+restval")) == TWO
    with pytest.raises(UserError, match="no rows of split 'test'; its splits: restval, train"):
        list(read_pairs(file, split="test"))
    with pytest.raises(UserError, match="its splits: none"):
        list(read_pairs(write(tmp_path, "x.csv", FILES["filepath.csv"]), split="val"))


def test_a_folder_with_its_annotation_file_is_read(tmp_path):
    with pytest.raises(UserError, match="holds none; name the file"):
        list(read_pairs(tmp_path))
    write(tmp_path, "train.jsonl", '{"image": "images/a.jpg", "caption": "A dog"}')
    assert next(iter(read_pairs(tmp_path))).image == str(tmp_path / "images" / "a.jpg")
    write(tmp_path, "val.jsonl", '{"image": "images/b.jpg", "caption": "A cat"}')
    assert next(iter(read_pairs(tmp_path, split="val"))).captions == ("A cat",)
    with pytest.raises(UserError, match="train.jsonl, val.jsonl; name the file"):
        list(read_pairs(tmp_path))


def test_quotes_and_separators_inside_captions(tmp_path):
    rows = 'image,caption\na.jpg,"A ""big"" dog, and\na cat"\nb.jpg,fine\n'
    pairs = list(read_pairs(write(tmp_path, "x.csv", rows)))
    assert [p.captions for p in pairs] == [('A "big" dog, and\na cat',), ("fine",)]
    rows = 'a.jpg\t"A dog, "big" \u2028 one\nb.jpg\t"He said ""no"""\nc.jpg\tit is 5" wide\n'
    pairs = list(read_pairs(write(tmp_path, "x.tsv", rows)))
    assert [p.captions[0] for p in pairs] == ['"A dog, "big" \u2028 one', 'He said "no"', 'it is 5" wide']


def test_blank_captions_are_left_out(tmp_path):
    file = write(tmp_path, "x.tsv", "image\tcaption\na.jpg\t\na.jpg\tA dog\nb.jpg\t \n")
    assert [p.captions for p in read_pairs(file)] == [("A dog",), ()]


def test_keys_are_safe_unique_and_stable(tmp_path):
    images = ["a.b.jpg", "d/é x.JPEG", "x.jpg", "x.png", "d/y.jpg", "d_y.jpg", "/abs/z.webp", "ß.jpg", "ü.jpg", "." * 3]
    file = write(tmp_path, "x.jsonl", "\n".join(json.dumps({"image": image, "caption": "x"}) for image in images))
    keys = [pair.key for pair in read_pairs(file)]
    assert keys[:3] == ["a_b", "d_x", "x"] and keys[4] == "d_y" and keys[6] == "abs_z" and keys[3].startswith("x-")
    assert len(set(keys)) == len(images)
    assert all(k and all(c.isascii() and (c.isalnum() or c in "_-") for c in k) for k in keys)
    assert keys == [pair.key for pair in read_pairs(file)]
    assert len(short_key("long/" * 100 + "name.jpg")) <= 100


BAD = {
    "names.csv": ("id,words\n1,A dog\n", r"names.csv:1: expected a header with an image column .*found 'id', 'words'"),
    "latin.csv": (
        b"image,caption\na.jpg,A dog\nb.jpg,caf\xe9\n",
        r"latin.csv:3 is not UTF-8; it is probably windows-1252: .* iconv -f windows-1252 -t UTF-8",
    ),
    "utf16.csv": ("image,caption\na.jpg,A dog\n".encode("utf-16"), r"utf16.csv:1 is not UTF-8; it is probably UTF-16:"),
    "utf16.jsonl": ('{"image": "a.jpg", "caption": "A"}\n'.encode("utf-16-be"), r"it is probably UTF-16BE:"),
    "utf16.json": (json.dumps([{"image": "a.jpg"}]).encode("utf-16-le"), r"it is probably UTF-16LE:"),
    "cut.tsv": (b"a.jpg\tA dog\nb.jpg\t\xe4\xb8", r"cut.tsv:2 is not UTF-8"),
    "broken.json": ('[{"image":\n "a.jpg",', r"broken.json:2 is not JSON"),
    "deep.json": ("[" * 200_000, r"deep.json is not JSON that can be read"),
    "other.json": ({"data": []}, r"other.json is none of the known json forms"),
    "scalar.json": ("5", r"scalar.json is none of the known json forms"),
    "coco_lacks.json": ({"images": [], "annotations": 5}, r"expected COCO's .*there is no list 'annotations'"),
    "x.parquet": ("", r"the extension does not tell the format; say --format"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_file_place_and_expectation(tmp_path, name):
    content, message = BAD[name]
    with pytest.raises(UserError, match=message) as raised:
        list(read_pairs(write(tmp_path, name, content)))
    assert "\n" not in str(raised.value)


GOOD = {"image": "z.jpg", "caption": "good"}
BAD_ROWS = {  # name -> (content with one bad row and a good one, place of the bad row, its problem)
    "columns.csv": (
        "image,caption\nz.jpg,good\nb.jpg,A cat,extra\n",
        "3",
        r"^3 columns; expected 2: image, caption",
    ),
    "quote.csv": ('image,caption\na.jpg,"A dog\nz.jpg,good\n', "2", r"not a row of a table: a quotation mark"),
    "quote_between.csv": ('image,caption\na.jpg,"A "dog" b"\nz.jpg,"good"\n', "2", r"not a row of a table"),
    "line.jsonl": ('{"image": \n' + json.dumps(GOOD), "1", r"json does not parse"),
    "other.jsonl": (json.dumps(GOOD) + "\n\n5\n", "3", r"json is not an object"),
    "no_image.jsonl": (
        json.dumps(GOOD) + '\n{"id": 3, "caption": "A"}\n',
        "2",
        r"no image; expected one of image, .*found 'id', 'caption'",
    ),
    "no_caption.jsonl": (
        '{"image": "a.jpg", "label": 0}\n' + json.dumps(GOOD),
        "1",
        r"no captions; expected one of captions",
    ),
    "number.jsonl": (
        '{"image": "a.jpg", "caption": 5}\n' + json.dumps(GOOD),
        "1",
        r"'caption' should be a text or a list of texts, found 5",
    ),
    "nested.jsonl": (
        '{"image": "a.jpg", "caption": [["a"]]}\n' + json.dumps(GOOD),
        "1",
        r"""'caption' should be a text, found \["a"\]""",
    ),
    "null.jsonl": (
        '{"image": null, "caption": "A"}\n' + json.dumps(GOOD),
        "1",
        r"'image' should be a path, found null",
    ),
    "item.json": (["a.jpg", GOOD], "[0]", r"expected an object with image and captions"),
    "coco.json": (
        {
            "images": [{"id": 1, "file_name": "z.jpg"}],
            "annotations": [{"image_id": 1, "caption": "good"}, {"image_id": 9, "caption": "A"}],
        },
        "annotations[1]",
        r"no image has the id 9",
    ),
    "coco_id.json": (
        {
            "images": [{"id": [2], "file_name": "a.jpg"}, {"id": 1, "file_name": "z.jpg"}],
            "annotations": [{"image_id": 1, "caption": "good"}],
        },
        "images[0]",
        r"expected COCO's id; its structure differs",
    ),
    "coco_lacks.json": (
        {
            "images": [{"id": 2}, {"id": 1, "file_name": "z.jpg"}],
            "annotations": [{"image_id": 1, "caption": "good"}],
        },
        "images[0]",
        r"no image; expected one of",
    ),
    "karpathy.json": (
        {"images": [{"filename": "a.jpg"}, {"filename": "z.jpg", "sentences": [{"raw": "good"}]}]},
        "images[0]",
        r"there is no 'sentences'",
    ),
    "karpathy_text.json": (
        {
            "images": [
                {"filename": "a.jpg", "sentences": [{"raw": 5}]},
                {"filename": "z.jpg", "sentences": [{"raw": "good"}]},
            ]
        },
        "images[0]",
        r"'captions' should be a text, found 5",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_a_pair_with_a_problem_and_the_others_are_read(tmp_path, name):
    content, place, problem = BAD_ROWS[name]
    pairs = list(read_pairs(write(tmp_path, name, content)))
    (good,) = [pair for pair in pairs if not pair.problem]
    (bad,) = [pair for pair in pairs if pair.problem]
    assert (Path(good.image).name, good.captions) == ("z.jpg", ("good",))
    assert re.search(problem, bad.problem) and bad.source == f"{name}:{place}"
    assert len({pair.key for pair in pairs}) == 2


def test_missing_captions_are_no_captions_and_do_not_hide_others(tmp_path):
    rows = [
        {"image": "a.jpg", "caption": None},
        {"image": "b.jpg", "captions": ["A cat", None, ""]},
        {"image": "c.jpg", "captions": [], "caption": "A dog"},
        {"image": "d.jpg", "captions": None, "title": "no caption of ours"},
    ]
    pairs = list(read_pairs(write(tmp_path, "x.jsonl", "\n".join(map(json.dumps, rows)))))
    assert [(p.captions, p.problem) for p in pairs] == [((), ""), (("A cat",), ""), (("A dog",), ""), ((), "")]


def test_spellings_of_a_path_are_one_image(tmp_path):
    rows = [
        {"image": name, "caption": name} for name in ("i/a.jpg", "./i/a.jpg", "i//a.jpg", "i/../i/a.jpg", "i/A.jpg")
    ]
    rows += [{"image": str(tmp_path / "i" / "a.jpg"), "caption": "absolute"}]
    pairs = list(read_pairs(write(tmp_path, "x.jsonl", "\n".join(map(json.dumps, rows)))))
    assert [(p.image, len(p.captions)) for p in pairs] == [
        (str(tmp_path / "i" / n), c) for n, c in (("a.jpg", 5), ("A.jpg", 1))
    ]


def test_split_column_is_followed_in_a_file_named_after_the_split(tmp_path):
    rows = [GOOD | {"split": "train"}, {"image": "v.jpg", "caption": "x", "split": "val"}]
    file = write(tmp_path, "train.jsonl", "\n".join(map(json.dumps, rows)))
    assert summary(read_pairs(file, split="train")) == [("z.jpg", ("good",), "z")]
    table = write(tmp_path, "train.csv", "image,caption,split\nz.jpg,good,train\nv.jpg,x,val\n")
    assert summary(read_pairs(table, split="train")) == [("z.jpg", ("good",), "z")]
    plain = write(tmp_path, "val.csv", "image,caption\nv.jpg,x\n")
    assert summary(read_pairs(plain, split="val")) == [("v.jpg", ("x",), "v")]


@pytest.mark.parametrize(
    "name, content",
    [
        ("tabs.csv", FILES["header.tsv"]),
        ("commas.tsv", FILES["filepath.csv"]),
        ("commas.txt", FILES["filepath.csv"]),
        ("lines.json", FILES["x.jsonl"]),
        ("list.jsonl", json.dumps(ALBEF, indent=1)),
        ("list_of_lines.jsonl", "[\n" + ",\n".join(map(json.dumps, ALBEF)) + "\n]"),
        ("UPPER.CSV", FILES["filepath.csv"]),
        ("carriage.csv", FILES["filepath.csv"].replace("\n", "\r")),
        ("spaces.csv", " filepath , title\na.jpg , A dog\nb.png, A cat\na.jpg,A brown dog\n"),
    ],
)
def test_format_is_found_from_the_content(tmp_path, name, content):
    assert summary(read_pairs(write(tmp_path, name, content))) == TWO


def test_missing_file_and_unknown_format_raise_user_error(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        list(read_pairs(tmp_path / "none.csv"))
    with pytest.raises(UserError, match="there is no format 'xml'; use one of csv, tsv"):
        list(read_pairs(write(tmp_path, "x.csv", ""), format="xml"))


def test_format_can_be_given(tmp_path):
    assert summary(read_pairs(write(tmp_path, "captions.data", FILES["cc3m.tsv"]), format="tsv")) == TWO


def test_flickr8k_is_read_whole():
    if not (SHARED / "flickr8k").is_dir():
        pytest.skip("needs ../shared/data/flickr8k")
    pairs = list(read_pairs(SHARED / "flickr8k", split="train"))
    assert len(pairs) == len({p.key for p in pairs}) == 6000
    assert all(len(p.captions) == 5 and Path(p.image).is_file() for p in pairs)
    assert isinstance(pairs[0], Pair) and pairs[0].key == "images_1000268201_693b08cb0e"


def many_rows(tmp_path, rng) -> tuple[Path, list[tuple[str, str]]]:
    """A file in which the captions of an image are far from each other, between blank and broken lines."""
    rows = [(f"{rng.integers(40)}.jpg", f"caption {n}") for n in range(300)]
    lines = [json.dumps({"image": image, "caption": caption}) for image, caption in rows]
    for n in range(20):
        lines.insert(int(rng.integers(len(lines))), "" if n % 2 else "{")
    return write(tmp_path, "x.jsonl", "\n".join(lines)), rows


def test_captions_of_an_image_are_joined_wherever_they_are(tmp_path):
    file, rows = many_rows(tmp_path, np.random.default_rng(0))
    expected: dict[str, list[str]] = {}
    for image, caption in rows:
        expected.setdefault(image, []).append(caption)
    pairs = read_pairs(file)
    good = [pair for pair in pairs if not pair.problem]
    assert {p.listed: list(p.captions) for p in good} == expected and [p.listed for p in good] == list(expected)
    assert len(pairs) == len(expected) + 10 == len(list(pairs)) and list(pairs) == list(pairs)


def test_images_with_the_same_hash_stay_apart(tmp_path, monkeypatch):
    file, _ = many_rows(tmp_path, np.random.default_rng(1))
    expected = {(p.listed, p.captions) for p in read_pairs(file)}
    monkeypatch.setattr(formats, "_hash", lambda text: len(text) % 3)
    pairs = list(read_pairs(file))
    assert {(p.listed, p.captions) for p in pairs} == expected
    good = [p.key for p in pairs if not p.problem]
    assert len(set(good)) == len(good)
