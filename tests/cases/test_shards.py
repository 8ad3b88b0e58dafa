"""Shards as people have them: keys with dots, mixed packs, members that are not read, indexes and manifests that lie."""

import gzip
import io
import json
import os
import socket
import tarfile
import time
from dataclasses import replace

import pytest
import torch

from tests.cases.inputs import image_bytes, refused, run, write_lines, write_shard, write_tar
from tests.tasks.fakes import ColourModel, eval_model
from vlp.data.preparing.formats import Pair, read_pairs
from vlp.data.preparing.inspect import check, stats
from vlp.data.preparing.pack import pack
from vlp.data.reading.index import ShardIndex, index_path
from vlp.data.reading.locations import list_shards
from vlp.data.reading.sentences import Sentences
from vlp.data.reading.shards import ShardReader, Source
from vlp.data.stream import TrainDataset
from vlp.errors import UserError
from vlp.files import resolve, split_locations
from vlp.tasks.retrieval import Retrieval


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path_factory.mktemp("cache")))


def samples(location) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    reader = ShardReader(str(location))
    found = [reader.read(*reader.locate(n)) for n in range(len(reader))]
    assert len({s.key for s in found}) == len(found)
    return {s.key: (s.image, s.captions) for s in found}


# --- identity of an image -----------------------------------------------------------------------------------------------


def test_merged_packs_have_the_recalls_of_separate_ones(tmp_path):
    """Two packs that both number their samples from 0, in one folder and in two."""
    for name, first in (("a", 0), ("b", 10)):
        rows = []
        for n in range(first, first + 10):
            (tmp_path / f"{n}.png").write_bytes(image_bytes(n, "png"))
            rows.append({"image": f"{n}.png", "caption": ("red", "green", "blue")[n % 3] + f" {n}"})
        pack(read_pairs(write_lines(tmp_path / f"{name}.jsonl", rows)), tmp_path / name)
    merged, separate = tmp_path / "merged", tmp_path / "separate"
    for name in ("a", "b"):
        data = (tmp_path / name / "shard-000000.tar").read_bytes()
        for path in (merged / f"{name}-0.tar", separate / name / f"{name}-0.tar"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    found = [
        Retrieval(data=str(x), ks=(1, 5), resamples=0).evaluate(eval_model(ColourModel()))
        for x in (merged, f"{separate}/*/*.tar")
    ]
    values = [{name: metric.value for name, metric in result.metrics.items()} for result in found]
    assert values[0] == values[1] and found[0].n == {"images": 20, "captions": 20}


def test_a_foreign_index_field_makes_no_positives(tmp_path):
    for shard in range(2):
        members = {}
        for n in range(3):
            meta = {"captions": ["x"], "source": "theirs", "index": n}  # as ours, though the shards are others'
            members |= {f"{n}.jpg": image_bytes(10 * shard + n), f"{n}.json": json.dumps(meta).encode()}
        write_tar(tmp_path / f"{shard}.tar", members)
    reader = ShardReader(str(tmp_path))
    assert len({reader.read(*reader.locate(n)).image_id for n in range(6)}) == 6


def test_one_image_in_two_sources_is_one_image(tmp_path):
    write_shard(tmp_path / "a" / "0.tar", range(3))
    write_shard(tmp_path / "b" / "0.tar", range(2, 5), prefix="other-")
    ids = [
        {s.key: s.image_id for s in map(lambda row: r.read(0, row), range(3))}
        for r in (ShardReader(str(tmp_path / x)) for x in "ab")
    ]
    assert ids[0]["2"] == ids[1]["other-2"]
    assert len({*ids[0].values(), *ids[1].values()}) == 5


# --- members ------------------------------------------------------------------------------------------------------------

LAYOUTS = {  # members -> captions by key
    "dotted_keys": (
        ["22.05.jpg", "22.05.txt", "track 2.0 (v).jpg", "track 2.0 (v).txt", "plain.jpg", "plain.txt"],
        {"22.05": ("22.05.txt",), "track 2.0 (v)": ("track 2.0 (v).txt",), "plain": ("plain.txt",)},
    ),
    "dots that only differ behind the first": (
        ["1.5.jpg", "1.5.txt", "1.6.jpg", "1.6.txt"],
        {"1.5": ("1.5.txt",), "1.6": ("1.6.txt",)},
    ),
    "input_outputs_keys": (
        ["s0.input.jpg", "s0.outputs.txt", "s1.input.jpg", "s1.outputs.txt"],
        {"s0": ("s0.outputs.txt",), "s1": ("s1.outputs.txt",)},
    ),
    "image with an infix, text without": (["k.input.jpg", "k.txt"], {"k": ("k.txt",)}),
    "text with an infix, image without": (["k.jpg", "k.caption.txt"], {"k": ("k.caption.txt",)}),
    "two images, one text": (["k.before.jpg", "k.after.jpg", "k.txt"], {"k": ("k.txt",)}),
    "mask next to the image": (["k.jpg", "k.mask.png", "k.txt"], {"k": ("k.txt",)}),
    "images only": (["1.5.jpg", "1.6.jpg"], {"1.5": (), "1.6": ()}),
    "upper case": (["A.JPG", "A.TXT", "b.JpEg", "b.Txt"], {"A": ("A.TXT",), "b": ("b.Txt",)}),
    "folders with dots": (["v1.0/a.jpg", "v1.0/a.txt", "v1.1/a.jpg"], {"v1.0/a": ("v1.0/a.txt",), "v1.1/a": ()}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_keys_are_read(tmp_path, name):
    names, expected = LAYOUTS[name]
    write_tar(
        tmp_path / "0.tar",
        {n: image_bytes(7) if n.lower().endswith(("jpg", "jpeg", "png")) else n.encode() for n in names},
    )
    assert {key: captions for key, (_, captions) in samples(tmp_path).items()} == expected
    found = check(str(tmp_path))
    assert found.samples == len(expected) and not found.lost and not found.damaged


@pytest.mark.parametrize("suffix", ["bmp", "gif", "tga", "exr", "BMP", "heic", "jpg.bak"])
def test_images_that_are_not_read_are_counted_and_named(tmp_path, suffix, capfd):
    write_tar(
        tmp_path / "0.tar",
        {
            "a.jpg": image_bytes(0),
            "a.txt": b"a",
            f"b.{suffix}": b"x",
            "b.txt": b"b",
            f"c.{suffix}": b"y",
            "c.txt": b"c",
        },
    )
    found = check(str(tmp_path))
    assert (found.samples, sum(count for count, _ in found.lost.values()), found.whole) == (1, 2, False)
    code, out, _ = run(capfd, "data", "check", tmp_path)
    ending = suffix.lower().rpartition(".")[2]
    assert (
        code == 1
        and f"not read: 2 (no image that can be read ({', '.join(sorted((ending, 'txt')))})), the first 'b'" in out
    )
    assert "2 keys or members" in stats(str(tmp_path), None)["not_read"][0]
    dataset = TrainDataset((Source(str(tmp_path)),), (), None, None, 1, 1, 0)
    assert "2 keys or members" in dataset.notes()[0]


def test_failed_downloads_are_named_and_no_error(tmp_path, capfd):
    write_tar(
        tmp_path / "0.tar", {"a.jpg": image_bytes(0), "a.txt": b"a", "b.json": b"{}", "b.txt": b"b", "c.json": b"{}"}
    )
    code, out, _ = run(capfd, "data", "check", tmp_path)
    assert code == 0 and "1 samples with 1 captions" in out
    assert "ignored: 1 (no image that can be read (json)), the first 'c'" in out


def test_links_in_a_shard_are_followed_or_counted(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (("d/a.jpg", image_bytes(0)), ("d/a.txt", b"one")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind, target in (
            ("d/hard.jpg", tarfile.LNKTYPE, "d/a.jpg"),
            ("d/soft.jpg", tarfile.SYMTYPE, "a.jpg"),
            ("e/soft.jpg", tarfile.SYMTYPE, "../d/a.jpg"),
            ("d/gone.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("d/fifo.jpg", tarfile.FIFOTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    found = samples(tmp_path)
    assert found == {"d/a": (image_bytes(0), ("one",))} | {
        k: (image_bytes(0), ()) for k in ("d/hard", "d/soft", "e/soft")
    }
    assert check(str(tmp_path)).lost == {
        "link to a file that is not in the shard": (1, "d/gone.jpg"),
        "neither a file nor a link": (1, "d/fifo.jpg"),
    }


def test_compressed_shards_are_called_that(tmp_path, capfd):
    plain = write_shard(tmp_path / "beside" / "0.tar", range(2))
    (tmp_path / "beside" / "1.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    code, out, _ = run(capfd, "data", "check", tmp_path / "beside")
    assert code == 1 and "files that are not read: 1\n  1.tar.gz" in out
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "0.tar").write_bytes(gzip.compress(plain.read_bytes()))
    assert "0.tar is compressed; unpack it, e.g. with gzip -dc" in run(capfd, "data", "check", tmp_path / "named")[1]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "0.tgz").write_bytes(b"x")
    assert "contains only 0.tgz, which must be unpacked" in refused(capfd, "data", "check", tmp_path / "only")


@pytest.mark.parametrize("members", [{}, {"0.txt": b"a", "1.txt": b"b"}, {"0.jpg": b"no image", "0.txt": b"a"}])
def test_check_of_nothing_usable_is_an_error(tmp_path, members, capfd):
    write_tar(tmp_path / "0.tar", members)
    assert run(capfd, "data", "check", tmp_path)[0] == 1


def test_text_of_a_shard_that_is_not_utf8_is_a_bad_sample(tmp_path):
    texts = {"a": b"ok", "b": "café".encode("latin-1"), "c": "x".encode("utf-16"), "d": "x".encode("utf-16-le")}
    members = {}
    for n, (key, text) in enumerate(texts.items()):
        members |= {f"{key}.jpg": image_bytes(n), f"{key}.txt": text}
    write_tar(tmp_path / "0.tar", members)
    found = check(str(tmp_path))
    assert [bad["key"] for bad in found.dead] == ["b", "c", "d"] and found.captions == 1
    assert all("UTF-8" in bad["reason"] or "UTF-16" in bad["reason"] for bad in found.dead)


# --- locations ----------------------------------------------------------------------------------------------------------


def test_double_colon_joins_locations(tmp_path):
    write_shard(tmp_path / "a" / "0.tar", range(2))
    write_shard(tmp_path / "b" / "0.tar", range(2, 5))
    for location in (
        f"{tmp_path}/a::{tmp_path}/b",
        f"{tmp_path}/b::{tmp_path}/a",
        f"{tmp_path}/{{a,b}}",
        f"{tmp_path}/*",
    ):
        assert len(ShardReader(location)) == 5, location
    (tmp_path / "c::d").mkdir()
    write_shard(tmp_path / "c::d" / "0.tar", range(4))
    assert len(ShardReader(f"{tmp_path}/c::d")) == 4  # a folder of exactly this name
    for location in (f"{tmp_path}/a::", f"::{tmp_path}/a", f"{tmp_path}/a::{tmp_path}/none"):
        with pytest.raises(UserError, match="no shards at"):
            ShardReader(location)


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_shard(tmp_path / "shards" / "0.tar", range(2))
    for location in ("~/shards", "~/shards/0.tar", "~/shards/*.tar", "~/{shards,shards}", "~/shards::~/shards"):
        assert len(ShardReader(location)) == 2, location
    (tmp_path / "t.txt").write_text("a\nb\n")
    assert len(Sentences("~/t.txt").open()) == 2 and resolve("~/t.txt") == tmp_path / "t.txt"
    with pytest.raises(UserError, match="no user 'nobody-of-this-name'"):
        resolve("~nobody-of-this-name/x")


@pytest.mark.parametrize(
    "location",
    ["simplecache::s3://x/y", "zip://a.tar::x.zip", "github://o:r@/x", "ssh://h/x", "dask://h/x", "reference://x"],
)
def test_only_schemes_of_the_list_are_opened(location):
    with pytest.raises(UserError, match="is not one of file, http|does not exist"):
        list_shards(location)


def test_relative_location_names_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"no shards at w/shards: it does not exist \(relative to {tmp_path}\)"):
        ShardReader("w/shards")


def test_commas_inside_braces_do_not_divide_locations():
    assert split_locations("a/{0,1}.tar,b,{x,{y,z}}") == ["a/{0,1}.tar", "b", "{x,{y,z}}"]
    assert split_locations("a},b") == ["a}", "b"]


@pytest.mark.parametrize("location", ["s-{0..999999999999}.tar", "{0..99999}{0..99999}.tar", "x\0y"])
def test_locations_without_bounds_are_refused_at_once(tmp_path, monkeypatch, location):
    monkeypatch.chdir(tmp_path)
    begin = time.monotonic()
    with pytest.raises(UserError):
        list_shards(location)
    assert time.monotonic() - begin < 5


def test_moved_shards_have_the_same_fingerprint(tmp_path):
    for n in range(3):
        write_shard(tmp_path / "one" / f"{n}.tar", range(n, n + 2))
    before = ShardReader(str(tmp_path / "one")).fingerprint()
    (tmp_path / "one").rename(tmp_path / "two")
    assert ShardReader(str(tmp_path / "two")).fingerprint() == before
    (tmp_path / "two" / "1.tar").unlink()
    assert ShardReader(str(tmp_path / "two")).fingerprint() != before


# --- indexes and manifests ----------------------------------------------------------------------------------------------


def special_files(path):
    """Replace a file by what must never be read: a FIFO, an endless device, a socket."""
    path.unlink()
    os.mkfifo(path)
    yield "fifo"
    path.unlink()
    path.symlink_to("/dev/zero")
    yield "device"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))
        yield "socket"
    path.unlink()


def packed(folder, count: int = 6):
    pairs = []
    folder.mkdir(parents=True)
    for n in range(count):
        (folder / f"{n}.jpg").write_bytes(image_bytes(n))
        pairs.append(Pair(str(folder / f"{n}.jpg"), (f"caption {n}",), str(n)))
    pack(pairs, folder / "s")
    return folder / "s"


@pytest.mark.parametrize("name", ["shard-000000.tar.index.json", "manifest.json"])
def test_index_or_manifest_that_is_not_a_file_is_not_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    folder = packed(tmp_path / "p")
    expected = samples(folder)
    for _ in special_files(folder / name):
        begin = time.monotonic()
        assert samples(folder) == expected
        assert time.monotonic() - begin < 5
        if name == "manifest.json":
            assert "manifest.json is ignored" in ShardReader(str(folder)).notes()[0]
            assert not check(str(folder)).whole
        else:  # replaced by a new index
            assert (folder / name).is_file()


def lying(line: dict, **fields) -> dict:
    return {"format": "webdataset", "shards": [line | fields]}


@pytest.mark.parametrize(
    "lie",
    [
        {"samples": 10**15},
        {"samples": -1},
        {"samples": 7.0},
        {"samples": True},
        {"samples": "6"},
        {"samples": None},
        {"size": 10**30},
        {"size": -5},
        {"sha256": "x"},
        {"sha256": 5},
        {"shard": "../shard-000000.tar"},
        {"shard": "/etc/passwd.tar"},
        {"shard": 5},
        {"shard": "\0.tar"},
    ],
    ids=str,
)
def test_manifest_that_cannot_be_true_is_ignored_or_refused(tmp_path, lie):
    folder = packed(tmp_path / "p")
    expected = samples(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | lying(manifest["shards"][0], **lie)))
    begin = time.monotonic()
    try:
        assert samples(folder) == expected
        assert "manifest.json is ignored" in ShardReader(str(folder)).notes()[0]
    except UserError as e:
        assert "manifest.json says" in str(e) and "\n" not in str(e)
    assert time.monotonic() - begin < 5


def test_manifest_that_could_be_true_and_is_not_is_refused(tmp_path):
    folder = packed(tmp_path / "p")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | lying(manifest["shards"][0], samples=5)))
    with pytest.raises(UserError, match="shard-000000.tar is not the shard that manifest.json says"):
        ShardReader(str(folder))


def test_damaged_manifest_is_named(tmp_path, capfd):
    folder = packed(tmp_path / "p")
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:-20])
    code, out, _ = run(capfd, "data", "check", folder)
    assert code == 1 and "manifest.json: it is not JSON" in out and "6 samples" in out


def test_index_whose_checksums_fit_and_whose_counts_lie_is_found_out(tmp_path, capfd):
    """Without a manifest nothing else says the number of samples, so `check`, which reads the shard, must."""
    shard = write_shard(tmp_path / "0.tar", range(4))
    index = ShardIndex.scan(shard)
    replace(index, keys=index.keys[:2], members=index.members[:2]).save(index_path(shard))
    code, out, _ = run(capfd, "data", "check", tmp_path)
    assert code == 1 and "its content is not what its index says" in out
    index_path(shard).write_bytes(index_path(shard).read_bytes().replace(b'"samples": 2', b'"samples": 9', 1))
    assert len(samples(tmp_path)) == 4  # the checksum of the head does not fit


def test_version_1_indexes_are_built_again(tmp_path):
    shard = write_tar(tmp_path / "0.tar", {"1.5.jpg": image_bytes(0), "1.5.txt": b"a"})
    old = {"version": 1, "samples": 0, "size": shard.stat().st_size, "sha256": "0" * 64, "keys": [], "members": []}
    index_path(shard).write_text(json.dumps(old))
    assert list(samples(tmp_path)) == ["1.5"]


def test_caches_of_packing_that_are_not_files_are_not_read(tmp_path):
    folder = packed(tmp_path / "p")
    pairs = [Pair(str(tmp_path / "p" / f"{n}.jpg"), (f"caption {n}",), str(n)) for n in range(6)]
    plan = folder / ".shard-000000.tar.plan.json"
    for content in (b"", b"[1]", b'{"plan": 5}', b"[" * 100_000):
        plan.write_bytes(content)
        with pytest.raises(UserError, match="contains other pairs than these"):
            pack(pairs, folder)
    plan.unlink()
    os.mkfifo(plan)
    with pytest.raises(UserError, match="contains other pairs than these"):
        pack(pairs, folder)


def test_torch_ids_have_room_for_content_ids(tmp_path):
    write_shard(tmp_path / "0.tar", range(50))
    reader = ShardReader(str(tmp_path))
    ids = [reader.read(0, row).image_id for row in range(50)]
    assert torch.tensor(ids).tolist() == ids and min(ids) >= 0
