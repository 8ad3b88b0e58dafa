"""Members that webdataset, img2dataset and open_clip write are read, and indexes of earlier versions stay valid."""

import gzip
import io
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from tests.data.reading.test_shards import picture, serve, write_tar
from vlp.data.image import decode
from vlp.data.preparing.dedup import ShardCollection
from vlp.data.preparing.inspect import check
from vlp.data.reading.index import INDEX_VERSION, ShardIndex, index_path, open_index
from vlp.data.reading.shards import RawSample, ShardReader
from vlp.errors import BadSample

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
LOSSLESS = ("png", "ppm", "tiff", "tif")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))


def read_all(folder: Path, label: str | None = None) -> dict[str, RawSample]:
    reader = ShardReader(str(folder), label)
    samples = [reader.read(*reader.locate(n)) for n in range(len(reader))]
    return {sample.key: sample for sample in samples}


def write(folder: Path, *samples: dict) -> Path:
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=2, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def encoded(pixels: np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("extension", [*LOSSLESS, "jpg", "jpeg", "img", "image"])
@pytest.mark.parametrize("text", ["txt", "text", "json", "jsn", "txt.gz", "text.gz", "json.gz", "jsn.gz"])
def test_images_and_texts_that_webdataset_encodes_are_read(tmp_path, extension, text):
    said = {"caption": "a dog"} if text.startswith("js") else "a dog"
    write(tmp_path, {"__key__": "sub/0", extension: PIXELS, text: said})
    sample = read_all(tmp_path)["sub/0"]
    assert sample.captions == ("a dog",)
    pixels = decode(sample.image)
    if extension in LOSSLESS:
        np.testing.assert_array_equal(pixels, PIXELS)
    else:
        assert pixels.shape == PIXELS.shape
    assert check(str(tmp_path)).whole


@pytest.mark.parametrize("extension", ["pgm", "pbm", "pnm"])
def test_grey_images_of_the_ppm_family_are_read(tmp_path, extension):
    # written by hand, as the encoder of webdataset 1.0.2 fails for pgm and pbm
    grey, bits = bytes([0, 100, 200, 255]), bytes([0b01000000, 0b10000000])
    data = b"P4 2 2\n" + bits if extension == "pbm" else b"P5 2 2 255\n" + grey
    write_tar(tmp_path / "a.tar", [(f"0.{extension}", data), ("0.txt", b"a dog")])
    pixels = decode(read_all(tmp_path)["0"].image)[..., 0].ravel().tolist()
    assert pixels == ([255, 0, 0, 255] if extension == "pbm" else [0, 100, 200, 255])


def test_class_member_is_the_label_cls(tmp_path):
    write(tmp_path, *({"__key__": f"{n}", "ppm": PIXELS, "cls": n, "json": {"cls": 9, "other": 5}} for n in range(3)))
    assert [s.label for s in read_all(tmp_path, "cls").values()] == [0, 1, 2]
    assert [s.label for s in read_all(tmp_path, "other").values()] == [5, 5, 5]
    assert [s.label for s in read_all(tmp_path).values()] == [None, None, None]
    assert check(str(tmp_path)).ignored == {}


def test_class_member_belongs_to_its_infix_or_to_all(tmp_path):
    images = [("a.1.jpg", picture(1, "jpeg")), ("a.2.jpg", picture(2, "jpeg"))]
    write_tar(tmp_path / "a.tar", [*images, ("a.1.cls", b"3"), ("a.2.cls", b" 4\n")])
    assert {k: s.label for k, s in read_all(tmp_path, "cls").items()} == {"a.1": 3, "a.2": 4}
    (tmp_path / "b").mkdir()
    write_tar(tmp_path / "b" / "b.tar", [*images, ("a.cls", b"7")])
    assert {k: s.label for k, s in read_all(tmp_path / "b", "cls").items()} == {"a.1": 7, "a.2": 7}


@pytest.mark.parametrize(
    "data", [b"", b"-1", b"1.0", b"dog", b"9" * 100, b"\xff", b"1_0", "١".encode(), b"\x80\x04K\x07."]
)
def test_class_member_that_is_no_number_is_a_bad_sample(tmp_path, data):
    write_tar(tmp_path / "a.tar", [("0.png", picture(0)), ("0.cls", data)])
    reader = ShardReader(str(tmp_path), "cls")
    with pytest.raises(BadSample, match="cls is .*, which is not a class number"):
        reader.read(0, 0)
    assert ShardReader(str(tmp_path)).read(0, 0).label is None


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"not gzip", "not gzip"),
        (gzip.compress(b'{"caption": "a"}')[:-9], "truncated"),
        (gzip.compress(bytes(1 << 25)), "more than 16,777,216 bytes"),
        (gzip.compress(b"[1]"), "json is not an object"),
    ],
)
def test_damaged_or_huge_compressed_member_is_a_bad_sample(tmp_path, data, reason):
    write_tar(tmp_path / "a.tar", [("0.png", picture(0)), ("0.json.gz", data)])
    with pytest.raises(BadSample, match=reason):
        ShardReader(str(tmp_path)).read(0, 0)


def test_text_of_the_json_precedes_the_text_member(tmp_path):
    members = [("0.png", picture(0)), ("0.jsn", b'{"captions": ["one"]}'), ("0.text", b"two")]
    members += [("1.png", picture(1)), ("1.jsn", b'{"url": "http://x"}'), ("1.text", b"three")]
    write_tar(tmp_path / "a.tar", members)
    found = read_all(tmp_path)
    assert (found["0"].captions, found["1"].captions) == (("one",), ("three",))
    assert found["1"].meta == {"url": "http://x"}


def test_keys_with_folders_and_numbers_with_dots_are_read(tmp_path):
    samples = [{"__key__": key, "ppm": PIXELS, "text": f"of {key}"} for key in ("v1.5/0", "v1.5/1", "0.5", "1.5")]
    found = {key: sample.captions for key, sample in read_all(write(tmp_path, *samples)).items()}
    assert found == {key: (f"of {key}",) for key in ("v1.5/0", "v1.5/1", "0.5", "1.5")}


def test_members_that_need_pickle_are_ignored(tmp_path):
    write(tmp_path, {"__key__": "0", "ppm": PIXELS, "txt": "a", "pyd": {"x": 1}, "pickle": [1], "npy": PIXELS})
    assert check(str(tmp_path)).ignored == {
        f"further .{e} of a sample": (1, f"0.{e}") for e in ("npy", "pickle", "pyd")
    }


def test_dedup_finds_the_new_images(tmp_path):
    write(tmp_path, {"__key__": "0", "ppm": PIXELS}, {"__key__": "1", "ppm": PIXELS})
    first, second = ShardCollection(str(tmp_path)).checksums()
    assert first == second


@pytest.mark.parametrize("pixels", ["float", "int32"])
def test_pixels_without_an_agreed_range_are_bad(pixels):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    data = encoded(values if pixels == "float" else (values * 1e6).astype(np.int32), "TIFF")
    with pytest.raises(BadSample, match="floating-point|more than 16 bits"):
        decode(data)


def test_sixteen_bit_images_keep_their_upper_bits():
    grey = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    by_hand = b"P5 64 64 65535\n" + grey.astype(">u2").tobytes()
    for data in (encoded(grey, "TIFF"), by_hand):
        np.testing.assert_array_equal(decode(data)[..., 0], grey >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_tiff_is_applied_once(orientation):
    data = encoded(PIXELS, "TIFF", tiffinfo={0x0112: orientation})
    turned = encoded(PIXELS, "PNG", exif=_exif(orientation))
    np.testing.assert_array_equal(decode(data), decode(turned))


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# -- indexes of the version before


def as_old(index: Path) -> None:
    """Rewrite the head of a saved index as that of version 2."""
    head, _, body = index.read_bytes().partition(b"\n")
    head = head.replace(b'"version": %d' % INDEX_VERSION, b'"version": 2')
    head = re.sub(rb', "crc32": \d+\}$', b"", head)
    index.write_bytes(head + b', "crc32": %d}\n' % zlib.crc32(head) + body)


OLD_PAIR = [("0.jpg", picture(0, "jpeg")), ("0.txt", b"a dog"), ("0.json", b"{}")]


@pytest.mark.parametrize("more", [[], [("1.json", b"{}")], [("1.bmp", b"BM")], [("0.npy", b""), (".hidden", b"")]])
def test_old_index_that_misses_nothing_is_read_and_renewed(tmp_path, monkeypatch, more):
    shard = write_tar(tmp_path / "a.tar", [*OLD_PAIR, *more])
    true = open_index(shard)
    as_old(index_path(shard))
    assert ShardIndex.load(index_path(shard)) is None
    monkeypatch.setattr(ShardIndex, "scan", None)  # not called
    assert open_index(shard) == true == ShardIndex.load(index_path(shard))


@pytest.mark.parametrize(
    "lost, ignored",
    [
        ({"no image that can be read (ppm, txt)": (1, "1")}, {}),
        ({"no image that can be read (a, b, c, d, e)": (1, "1")}, {}),
        ({"other": (1, "1")}, {}),
        ({}, {"further .cls of a sample": (1, "0.cls")}),
        ({}, {"further .gz of a sample": (1, "0.json.gz")}),
        ({"no image that can be read (bmp)": (1, "1")}, {"further .text of a sample": (1, "0.text")}),
    ],
)
def test_old_index_that_may_miss_a_member_is_built_again(tmp_path, lost, ignored):
    shard = write_tar(tmp_path / "a.tar", OLD_PAIR)
    true = ShardIndex.scan(shard)
    ShardIndex(true.size, true.sha256, true.keys, true.members, lost, ignored).save(index_path(shard))
    as_old(index_path(shard))
    assert open_index(shard) == true


def test_old_index_next_to_a_remote_shard_is_read(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    shard = write_tar(folder / "a.tar", [*OLD_PAIR, ("1.bmp", b"BM")])
    open_index(shard)
    as_old(index_path(shard))
    server, url = serve(folder)
    try:
        reader = ShardReader(f"{url}/a.tar")
        assert (reader.sizes, reader.lost) == ([1], [1])
        assert not (tmp_path / "cache").exists()  # the shard has not been fetched
        assert reader.read(0, 0).captions == ("a dog",)
    finally:
        server.shutdown()
        server.server_close()
