"""`check` finds what is wrong with shards, `stats` what is in them."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import draw_pairs
from vlp.data.preparing.inspect import Check, all_captions, check, stats, to_lines
from vlp.data.preparing.pack import Packing, pack
from vlp.data.reading.index import ShardIndex, index_path
from vlp.errors import UserError


def write(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def png(width: int = 12, height: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path) -> Path:
    """12 samples in 3 shards."""
    pack(draw_pairs(tmp_path / "pictures", 12), tmp_path / "shards", Packing(shard_samples=4))
    return tmp_path / "shards"


def test_intact_shards_pass_the_check(shards):
    seen = []
    found = check(str(shards), progress=lambda *a: seen.append(a))
    assert found == Check(shards=3, samples=12, captions=24)
    assert found.whole
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_dead_samples_are_listed_with_their_reason(tmp_path):
    members = {"good.png": png(), "good.txt": b"a", "mute.png": png(), "broken.png": png()[:48], "broken.txt": b"a"}
    write(tmp_path / "a.tar", {**members, "huge.png": png(100, 100), "huge.txt": b"a"})
    found = check(str(tmp_path), max_pixels=5000)
    assert (found.samples, found.captions, found.damaged, found.duplicates) == (4, 1, [], [])
    assert {d["key"]: d["reason"].split(":")[0] for d in found.dead} == {
        "mute": "no caption",
        "broken": "undecodable image",
        "huge": "100 x 100 pixels, over the limit of 5000",
    }
    assert all((d["source"], d["shard"]) == (str(tmp_path / "a.tar"), "a.tar") for d in found.dead)


def test_duplicate_keys_are_named_across_shards(shards):
    for suffix in ("", ".index.json"):
        (shards / f"again.tar{suffix}").write_bytes((shards / f"shard-000001.tar{suffix}").read_bytes())
    assert check(str(shards)).duplicates == ["0004", "0005", "0006", "0007"]


def test_equal_hashes_of_other_keys_are_no_duplicates(shards, monkeypatch):
    monkeypatch.setattr("builtins.hash", lambda x: 7)
    assert check(str(shards)).duplicates == []


@pytest.mark.parametrize("how", ["short", "text", "gone", "header", "data", "padding", "index"])
def test_every_damage_is_named_and_the_rest_still_counted(shards, how):
    shard = shards / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    if how == "gone":
        shard.unlink()
    elif how == "short":
        shard.write_bytes(data[:-3000])
    elif how == "text":
        shard.write_bytes(b"x" * len(data))
    elif how == "index":  # one whose checksums fit, and no manifest that shows which of the two is wrong
        (shards / "manifest.json").unlink()
        replace(ShardIndex.load(index_path(shard)), sha256="0" * 64).save(index_path(shard))
    else:
        data[{"header": 100, "data": 600, "padding": len(data) - 5}[how]] ^= 4
        shard.write_bytes(data)
    found = check(str(shards))
    assert len(found.damaged) == 1
    assert "shard-000001.tar" in found.damaged[0]
    assert found.shards == 3
    assert found.samples - len(found.dead) >= 8
    assert not found.whole


def test_report_names_the_first_and_counts_the_rest():
    found = Check(3, 40, 80, damaged=["a.tar is short"], duplicates=[f"{n:02d}" for n in range(13)])
    assert to_lines(found) == [
        "40 samples with 80 captions in 3 shards",
        "damaged shards: 1",
        "  a.tar is short",
        "dead samples: 0",
        "duplicate keys: 13",
        *(f"  {n:02d}" for n in range(10)),
        "  and 3 more",
    ]


def test_stats_are_quantiles(tmp_path):
    for n in range(5):
        write(tmp_path / f"{n}.tar", {"0.png": png(10 * (n + 1), 8), "0.txt": b"word " * (n + 1)})
    found = stats(str(tmp_path), grid=None)
    assert (found["samples"], found["shards"], found["looked_at"], found["captions"]) == (5, 5, 5, 5)
    assert found["width_pixels"] == {"mean": 30, "min": 10, "5%": 12, "median": 30, "95%": 48, "max": 50}
    assert found["height_pixels"]["mean"] == 8
    assert found["words_per_caption"] == {"mean": 3, "min": 1, "5%": 1.2, "median": 3, "95%": 4.8, "max": 5}
    assert found["captions_per_image"]["max"] == 1
    assert stats(str(tmp_path), grid=None, samples=2)["looked_at"] == 2


def test_grid_shows_the_images(tmp_path):
    colours = ["red", "lime", "blue", "yellow", "cyan", "magenta", "black"]
    for n, colour in enumerate(colours):
        buffer = io.BytesIO()
        Image.new("RGB", (300, 200), colour).save(buffer, "png")
        write(tmp_path / f"{n}.tar", {"0.png": buffer.getvalue(), "0.txt": f"$x_{n}$ 猫 {'long ' * n * 9}".encode()})
    stats(str(tmp_path), tmp_path / "grid.of.any.name")
    image = Image.open(tmp_path / "grid.of.any.name")
    assert image.format == "PNG"
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for colour in colours:
        share = (pixels == np.array(Image.new("RGB", (1, 1), colour))[0, 0]).all(1).mean()
        assert 0.03 < share < 1 / 7, colour


def test_statistics_skip_bad_samples(tmp_path):
    write(
        tmp_path / "a.tar",
        {"0.png": b"x", "0.txt": b"one", "1.png": png(), "1.json": b"{", "2.png": png(), "2.txt": b"two"},
    )
    found = stats(str(tmp_path), grid=None)
    assert (found["samples"], found["looked_at"]) == (3, 1)
    assert list(all_captions(str(tmp_path))) == ["one", "two"]


@pytest.mark.parametrize("members", [{}, {"0.png": b"x", "0.txt": b"a"}])
def test_nothing_to_show_is_one_line(tmp_path, members):
    write(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match="no image of .* can be decoded"):
        stats(str(tmp_path), tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


def test_grid_that_cannot_be_written_is_one_line(shards, tmp_path):
    with pytest.raises(UserError, match="cannot write .*grid.png: No such file or directory"):
        stats(str(shards), tmp_path / "nowhere" / "grid.png")
