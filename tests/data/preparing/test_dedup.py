"""Duplicates are found by content, and nothing else is."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import COLOURS
from vlp.cli import main
from vlp.data.preparing.dedup import FileCollection, find_twins, open_collection, print_of, same_bytes
from vlp.data.preparing.formats import Pair
from vlp.data.preparing.pack import Packing, pack


def photo(seed: int, size=(120, 90)) -> Image.Image:
    """Something with edges and colours of its own."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def bytes_of(image: Image.Image, kind: str = "JPEG", **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Twelve images; the 6th is the first again, byte by byte, the 8th the second at another size and quality."""
    files = [bytes_of(photo(n), quality=95) for n in range(12)]
    files[5], files[7] = files[0], bytes_of(photo(1).resize((90, 68), Image.Resampling.BICUBIC), quality=70)
    pairs = []
    for n, data in enumerate(files):
        path = tmp_path / "pictures" / f"{n:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        pairs.append(Pair(image=str(path), captions=("a photo",), key=f"{n:02d}", source="toy", extra={}))
    pack(pairs, tmp_path / "shards", Packing(shard_samples=5))
    return tmp_path / "shards"


def test_duplicates_within_shards_have_equal_bytes_or_looks(shards):
    twins, bad = find_twins(open_collection(str(shards)), workers=2)
    assert bad == 0
    assert [(t.by, t.first.split("/")[1], t.second.split("/")[1]) for t in twins] == [
        ("bytes", "05", "00"),
        ("pixels", "07", "01"),
    ]


def test_duplicates_in_another_folder_are_found_under_any_name(shards, tmp_path):
    held_out = tmp_path / "held out"
    (held_out / "deep").mkdir(parents=True)
    (held_out / "x.jpg").write_bytes((tmp_path / "pictures" / "03.jpg").read_bytes())
    (held_out / "deep" / "y.png").write_bytes(bytes_of(photo(9), "PNG"))
    (held_out / "z.png").write_bytes(bytes_of(photo(99), "PNG"))
    (held_out / "broken.png").write_bytes(b"no picture")
    twins, bad = find_twins(open_collection(str(shards)), open_collection(str(held_out)))
    assert bad == 1
    assert [(t.by, t.first.split("/")[1], t.second.rsplit("/", 1)[1]) for t in twins] == [
        ("bytes", "03", "x.jpg"),
        ("pixels", "09", "y.png"),
    ]


def test_scenes_that_differ_in_one_small_thing_are_not_twins(tmp_path):
    """Coloured squares on the same ground: the same brightness almost everywhere."""
    paths = []
    for n, colour in enumerate(COLOURS.values()):
        for column in (4, 20):
            pixels = np.full((48, 48, 3), 230, np.uint8)
            pixels[8:16, column : column + 8] = colour
            paths.append(tmp_path / f"{n}-{column}.png")
            Image.fromarray(pixels).save(paths[-1])
    assert find_twins(FileCollection(paths)) == ([], 0)


def test_equal_checksums_are_not_enough(tmp_path):
    class Colliding(FileCollection):
        def keys(self):
            return iter([(1, 1)] * len(self))

    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(bytes_of(photo(min(n, 1)), "PNG"))
    assert same_bytes(Colliding(sorted(tmp_path.glob("*.png")))) == [(2, 1)]  # and not the first
    (tmp_path / "2.png").write_bytes((tmp_path / "0.png").read_bytes())
    assert same_bytes(Colliding(sorted(tmp_path.glob("*.png")))) == [(2, 0)]


def test_fingerprint_is_invariant_to_size_and_encoding_but_not_mirroring():
    def apart(a, b):
        (bits, colours), (other_bits, other_colours) = print_of(np.array(a)), print_of(np.array(b))
        return (bits != other_bits).sum(), np.abs(colours.astype(int) - other_colours).max()

    for seed in range(20):
        image = photo(seed, (200, 150))
        again = Image.open(io.BytesIO(bytes_of(image.resize((133, 100), Image.Resampling.LANCZOS), quality=60)))
        bits, colour = apart(image, again)
        assert bits <= 10 and colour <= 12
        assert apart(image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))[0] > 30


def test_dedup_command_counts_and_writes_every_pair(shards, tmp_path, capsys):
    assert (
        main(["data", "dedup", str(shards), "--output", str(tmp_path / "out" / "twins.jsonl"), "--workers", "1"]) == 1
    )
    out = capsys.readouterr().out
    assert "12 images" in out and "1 duplicate an earlier image by their bytes, 1 more by their pixels" in out
    lines = [json.loads(line) for line in (tmp_path / "out" / "twins.jsonl").read_text().splitlines()]
    assert [line["by"] for line in lines] == ["bytes", "pixels"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "z.png").write_bytes(bytes_of(photo(99), "PNG"))
    assert main(["data", "dedup", str(shards), "--against", str(other)]) == 0
    assert f"0 are in {other} too by their bytes" in capsys.readouterr().out
    assert main(["data", "dedup", str(shards), "--against", str(tmp_path / "nowhere")]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["data", "dedup", str(tmp_path / "empty")]) == 2
    assert "neither shards nor images" in capsys.readouterr().err
