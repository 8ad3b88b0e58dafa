"""Shards by others are read as they are; damage is named, never silent; nothing inside a shard is ever run."""

import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import tarfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image

from tests.conftest import draw_pairs
from vlp.data.preparing.inspect import check
from vlp.data.preparing.pack import Packing, pack
from vlp.data.reading.index import ShardIndex, index_path, open_index
from vlp.data.reading.shards import ShardReader
from vlp.errors import BadSample, UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(n: int, kind: str = "png", size: tuple[int, int] = (10, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(n).integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def small_shard(path: Path, samples: int = 3) -> Path:
    """As open_clip has them, PNG and text."""
    return write_tar(
        path, [m for n in range(samples) for m in ((f"{n}.png", picture(n)), (f"{n}.txt", b"caption %d" % n))]
    )


def contents(reader: ShardReader) -> list[tuple[str, bytes, tuple[str, ...]]]:
    samples = [reader.read(*reader.locate(n)) for n in range(len(reader))]
    return [(s.key, s.image, s.captions) for s in samples]


def serve(folder: Path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *a: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def web(tmp_path):
    """(folder, its URL)"""
    folder = tmp_path / "web"
    folder.mkdir()
    server, url = serve(folder)
    yield folder, url
    server.shutdown()
    server.server_close()


# -- what is written and what is read


def test_index_says_where_every_member_lies(tmp_path):
    shard = small_shard(tmp_path / "a.tar")
    index = open_index(shard)
    assert index == ShardIndex.load(index_path(shard))
    data = shard.read_bytes()
    assert (index.size, index.sha256, len(index)) == (len(data), hashlib.sha256(data).hexdigest(), 3)
    assert ShardIndex.peek(index_path(shard)) == (3, len(data), 0)
    for n, members in enumerate(index.members):
        for extension, expected in (("png", picture(n)), ("txt", b"caption %d" % n)):
            offset, size, crc = members[extension]
            assert data[offset : offset + size] == expected
            assert crc == zlib.crc32(expected)


def test_img2dataset_layout(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=4, verbose=0) as writer:
        for n in range(10):
            record = {"caption": f"caption {n}", "url": "http://x", "key": f"{n:09d}", "status": "success"}
            if n % 5 == 3:  # a failed download
                record |= {"status": "failed_to_download", "error_message": "404"}
                writer.write({"__key__": f"{n:09d}", "json": record})
            else:
                writer.write({"__key__": f"{n:09d}", "jpg": picture(n, "jpeg"), "txt": f"caption {n}", "json": record})
    found = contents(ShardReader(str(tmp_path)))
    good = [n for n in range(10) if n % 5 != 3]
    assert found == [(f"{n:09d}", picture(n, "jpeg"), (f"caption {n}",)) for n in good]
    assert sorted(p.name for p in tmp_path.glob("*.index.json")) == [f"{n:05d}.tar.index.json" for n in range(3)]


@pytest.mark.parametrize("kind", ["jpg", "jpeg", "png", "webp", "JPG"])
@pytest.mark.parametrize("text", ["txt", "text", "caption", "captions"])
def test_open_clip_layouts(tmp_path, kind, text):
    image = picture(0, {"jpg": "jpeg"}.get(kind.lower(), kind))
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        said = b" a caption\n" if text == "txt" else json.dumps({text: "a caption", "width": 5}).encode()
        writer.write({"__key__": "sub/0", kind: image, "txt" if text == "txt" else "json": said})
    assert contents(ShardReader(str(tmp_path))) == [("sub/0", image, ("a caption",))]


def test_webdataset_reads_ours(tmp_path):
    pairs = draw_pairs(tmp_path / "pictures", 7)
    pack(pairs, tmp_path / "shards", Packing(shard_samples=3))
    found = list(
        webdataset.WebDataset(
            sorted(map(str, (tmp_path / "shards").glob("*.tar"))), shardshuffle=False, empty_check=False
        )
    )
    assert [s["__key__"] for s in found] == [p.key for p in pairs]
    assert [s["png"] for s in found] == [Path(p.image).read_bytes() for p in pairs]
    for n, (sample, pair) in enumerate(zip(found, pairs)):
        assert json.loads(sample["json"]) == {"captions": list(pair.captions), "index": n, "source": "toy"}


def test_key_that_stands_twice_is_two_samples_and_is_named(tmp_path):
    members = [("a.png", picture(0)), ("a.txt", b"one"), ("b.png", picture(1)), ("b.txt", b"two")]
    write_tar(tmp_path / "a.tar", [*members, ("a.png", picture(2)), ("a.txt", b"three")])
    reader = ShardReader(str(tmp_path))
    expected = [("a", picture(0), ("one",)), ("b", picture(1), ("two",)), ("a", picture(2), ("three",))]
    assert contents(reader) == expected
    assert check(str(tmp_path)).duplicates == ["a"]


def test_members_out_of_order_still_meet(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.png", picture(0)), ("b.png", picture(1)), ("b.txt", b"two"), ("a.txt", b"one")])
    assert contents(ShardReader(str(tmp_path))) == [("a", picture(0), ("one",)), ("b", picture(1), ("two",))]


@pytest.mark.parametrize(
    "text, captions",
    [
        (b'{"captions": ["a", " ", 5, null, "b "]}', ("a", "b")),
        (b'{"caption": null}', ()),
        (b'{"caption": 5, "text": "x"}', ("x",)),
        (b'{"text": {"en": "x"}}', ()),
        (b'{"caption": "half \\ud83d pair"}', ("half ? pair",)),
    ],
)
def test_captions_are_texts_whatever_the_json_says(tmp_path, text, captions):
    write_tar(tmp_path / "a.tar", [("0.png", picture(0)), ("0.json", text)])
    assert ShardReader(str(tmp_path)).read(0, 0).captions == captions


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b'{"a":' * 100_000, b"7"])
def test_json_of_no_sample_is_a_bad_sample(tmp_path, text):
    write_tar(tmp_path / "a.tar", [("0.png", picture(0)), ("0.json", text)])
    with pytest.raises(BadSample, match="json"):
        ShardReader(str(tmp_path)).read(0, 0)


def test_image_id_is_equal_if_and_only_if_the_image_is(tmp_path):
    for n in range(3):  # all count from 0; the last shows the first image again
        write_tar(tmp_path / f"{n}.tar", [("0.png", picture(n % 2)), ("0.json", b'{"caption": "a", "index": 0}')])
    reader = ShardReader(str(tmp_path))
    ids = [reader.read(shard, 0).image_id for shard in range(3)]
    assert ids[0] == ids[2] != ids[1] and all(0 <= n < 2**63 for n in ids)
    pack(draw_pairs(tmp_path / "p", 3), tmp_path / "x")
    pack(draw_pairs(tmp_path / "p", 2), tmp_path / "y")
    both = ShardReader(str(tmp_path / "{x,y}/*.tar"))
    assert both.sizes == [3, 2]  # each folder by its own manifest, though the shards have the same name
    ids = [both.read(*both.locate(n)).image_id for n in range(5)]
    assert ids[:2] == ids[3:] and len(set(ids)) == 3


def test_threads_that_open_a_shard_at_once_all_read_it(tmp_path, monkeypatch):
    """The cache keeps one of their handles; the others must last as long as they are read."""
    small_shard(tmp_path / "a.tar")
    both, opened = threading.Barrier(2), ShardReader._open

    def open_together(reader: ShardReader, shard: int):
        both.wait(10)
        return opened(reader, shard)

    monkeypatch.setattr(ShardReader, "_open", open_together)
    reader = ShardReader(str(tmp_path))
    reader.index(0)
    with ThreadPoolExecutor(2) as pool:
        keys = [raw.key for raw in pool.map(lambda row: reader.read(0, row), (0, 1))]
    assert keys == [raw.key for raw in (reader.read(0, row) for row in (0, 1))]


def test_locate_skips_empty_shards(tmp_path):
    for n, samples in enumerate((0, 2, 0, 0, 1, 0)):
        small_shard(tmp_path / f"{n}.tar", samples)
    reader = ShardReader(str(tmp_path))
    assert [reader.locate(n) for n in range(len(reader))] == [(1, 0), (1, 1), (4, 0)]


# -- where shards are


def test_read_only_folder_keeps_its_index_in_the_cache(tmp_path, cache, monkeypatch):
    shard = small_shard(tmp_path / "a.tar")
    save = ShardIndex.save

    def refuse(self, path):
        if path.parent == shard.parent:
            raise PermissionError(13, "Permission denied")
        save(self, path)

    monkeypatch.setattr(ShardIndex, "save", refuse)
    first = contents(ShardReader(str(tmp_path)))
    assert not index_path(shard).exists()
    assert len(list((cache / "index").iterdir())) == 1
    monkeypatch.setattr(ShardIndex, "scan", None)  # not called any more
    assert contents(ShardReader(str(tmp_path))) == first


def test_index_that_cannot_be_saved_is_one_line(tmp_path, monkeypatch):
    small_shard(tmp_path / "a.tar")

    def refuse(self, path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ShardIndex, "save", refuse)
    with pytest.raises(UserError, match="VLP_CACHE"):
        ShardReader(str(tmp_path))


def test_locations_name_the_same_shards(tmp_path):
    folder = tmp_path / "odd [name] {1"
    folder.mkdir()
    for n in range(3):
        small_shard(folder / f"s-{n}.tar")
    plain = tmp_path / "plain"
    plain.mkdir()
    for n in range(3):
        small_shard(plain / f"s-{n}.tar")
    expected = [str(plain / f"s-{n}.tar") for n in range(3)]
    for location in (plain, f"{plain}/", f"{plain}/*.tar", f"{plain}/s-{{0..2}}.tar", f"file://{plain}"):
        assert ShardReader(str(location)).shards == expected
    assert ShardReader(str(plain / "s-1.tar")).shards == expected[1:2]
    assert len(ShardReader(str(folder))) == 9
    assert len(ShardReader(str(folder / "s-0.tar"))) == 3


@pytest.mark.parametrize(
    "location", ["nowhere", "nowhere/*.tar", "empty", "a{b", "foo://x/y", "memory://nothing", "empty/{0..2}.tar"]
)
def test_no_shards_is_one_line(tmp_path, monkeypatch, location):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no shards|cannot list"):
        ShardReader(location)


def test_shards_in_memory_are_copied_once(tmp_path, cache):
    fs = fsspec.filesystem("memory")
    for n in range(2):
        fs.pipe_file(f"/here/{n}.tar", small_shard(tmp_path / f"{n}.tar").read_bytes())
    local = contents(ShardReader(str(tmp_path / "?.tar")))
    try:
        reader = ShardReader("memory://here")
        assert contents(reader) == local
        fs.rm("/here", recursive=True)
        assert contents(pickle.loads(pickle.dumps(reader))) == local  # from the copies
        assert contents(ShardReader("memory://here/{0..1}.tar")) == local
    finally:
        fs.store.clear()
    assert {p.name for p in (cache / "shards").rglob("*.tar")} == {"0.tar", "1.tar"}


def test_shards_behind_http(web, tmp_path, cache):
    folder, url = web
    pack(draw_pairs(tmp_path / "pictures", 9), folder / "shards", Packing(shard_samples=3))
    local = contents(ShardReader(str(folder / "shards")))
    reader = ShardReader(f"{url}/shards")
    assert reader.sizes == [3, 3, 3]
    assert not cache.exists()  # the manifest says enough to begin
    assert contents(reader) == local
    assert contents(ShardReader(f"{url}/shards/shard-{{000000..000002}}.tar")) == local
    assert [s.rpartition("/")[2] for s in reader.shards] == [f"shard-{n:06d}.tar" for n in range(3)]


def test_process_that_was_forked_fetches_for_itself(web, tmp_path):
    folder, url = web
    pack(draw_pairs(tmp_path / "pictures", 2), folder / "shards")
    reader = ShardReader(f"{url}/shards")  # the parent has an open connection, which no child can use
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(write, reader.read(0, 1).key.encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read, "rb") as f:
        assert f.read() == b"0001"


def test_remote_shard_that_is_not_the_manifests_is_named(web, tmp_path):
    folder, url = web
    pack(draw_pairs(tmp_path / "pictures", 4), folder / "shards", Packing(shard_samples=2))
    small_shard(folder / "shards" / "shard-000001.tar", 2)
    reader = ShardReader(f"{url}/shards")
    reader.read(0, 0)
    with pytest.raises(UserError, match="shard-000001.tar is not the shard that manifest.json says"):
        reader.read(1, 0)
    (folder / "shards" / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match="shard-000000.tar"):
        ShardReader(f"{url}/shards/shard-000000.tar?again").read(0, 0)


# -- damage


def test_every_truncation_is_named(tmp_path):
    data = small_shard(tmp_path / "whole.tar").read_bytes()
    end = ShardIndex.scan(tmp_path / "whole.tar").members[-1]["txt"]
    last = (end[0] + end[1] + 511) // 512 * 512
    (tmp_path / "cut").mkdir()
    shard = tmp_path / "cut" / "a.tar"
    for size in [*range(0, last + 512, 61), last, last + 511]:
        shard.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"a\.tar"):
            ShardIndex.scan(shard)
    for size in (last + 512, len(data)):  # one block of zeros is enough
        shard.write_bytes(data[:size])
        assert len(ShardIndex.scan(shard)) == 3


def test_truncation_of_an_indexed_shard_is_named(tmp_path):
    shard = small_shard(tmp_path / "a.tar")
    data = shard.read_bytes()
    open_index(shard)
    for size in range(0, len(data), 509):
        shard.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"a\.tar has .* bytes where its index says"):
            ShardReader(str(tmp_path))


def flips(data: bytes, every: int):
    """(position, data with one bit flipped there)"""
    for position in range(0, len(data), every):
        altered = bytearray(data)
        altered[position] ^= 1 << position % 8
        yield position, bytes(altered)


def test_flipped_bit_in_an_indexed_shard_never_gives_other_samples(tmp_path):
    shard = small_shard(tmp_path / "a.tar")
    data, index = shard.read_bytes(), open_index(shard)
    right = contents(ShardReader(str(tmp_path)))
    spans = [(o, o + n, row) for row, members in enumerate(index.members) for o, n, _ in members.values()]
    for position, altered in flips(data, 23):
        shard.write_bytes(altered)
        reader = ShardReader(str(tmp_path))
        hit = {row for begin, end, row in spans if begin <= position < end}
        for row in range(3):
            if row in hit:
                with pytest.raises(BadSample, match="altered"):
                    reader.read(0, row)
                assert reader.quarantine_entry(0, row, "x") == {
                    "source": str(tmp_path),
                    "shard": "a.tar",
                    "key": str(row),
                    "reason": "x",
                }
            else:
                sample = reader.read(0, row)
                assert (sample.key, sample.image, sample.captions) == right[row]
    assert not check(str(tmp_path)).whole


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_flipped_bit_before_the_first_index_loses_no_sample(tmp_path, format):
    names = [f"{n}-{'long' * 30}" for n in range(3)] if format == tarfile.PAX_FORMAT else list("012")
    members = [m for n, k in enumerate(names) for m in ((f"{k}.png", picture(n)), (f"{k}.txt", b"caption"))]
    data = write_tar(tmp_path / "whole.tar", members, format).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:  # names in extended headers have no checksum
        unsafe = [range(m.offset + 512, m.offset_data - 512) for m in tar]
    shard = tmp_path / "a.tar"
    named = 0
    for position, altered in flips(data, 17):
        shard.write_bytes(altered)
        try:
            index = ShardIndex.scan(shard)
        except UserError as e:
            assert "a.tar" in str(e)
            named += 1
            continue
        if any(position in span for span in unsafe):
            continue
        assert index.keys == tuple(names)
        for row, sample in enumerate(index.members):
            offset, size, _ = sample["png"]
            before, after = data[offset : offset + size], altered[offset : offset + size]
            assert before == picture(row)
            assert (before == after) == (position not in range(offset, offset + size))
    assert named > 20


def test_altered_manifest_or_index_is_named_or_replaced(tmp_path):
    pack(draw_pairs(tmp_path / "pictures", 6), tmp_path / "s", Packing(shard_samples=3))
    right = contents(ShardReader(str(tmp_path / "s")))
    index = index_path(tmp_path / "s" / "shard-000000.tar")
    whole, true = index.read_bytes(), ShardIndex.load(index)
    far = ({**true.members[0], "png": (0, 1 << 40, 0)}, *true.members[1:])

    def crafted(**fields) -> bytes:
        """An index with other fields and checksums that fit."""
        replace(true, **fields).save(index)
        return index.read_bytes()

    for broken in (
        whole[:-20],
        b"",
        b"[]",
        b"null",
        whole.replace(b'"samples": 3', b'"samples": 4', 1),
        whole.replace(b'"0000"', b'"0007"', 1),
        crafted(keys=true.keys[:2]),
        crafted(members=far),
        crafted(members=({}, *true.members[1:])),
        crafted(members=({"png": (0, 1, True), "json": true.members[0]["json"]}, *true.members[1:])),
        crafted(size=-1),
        crafted(sha256="0" * 64),  # the manifest decides
        crafted(keys=true.keys[:2], members=true.members[:2]),
        crafted(keys=true.keys * 2, members=true.members * 2),
    ):
        index.write_bytes(broken)
        assert contents(ShardReader(str(tmp_path / "s"))) == right
        assert index.read_bytes() == whole  # built again
    manifest = tmp_path / "s" / "manifest.json"
    for other in (b"", b"[]", b'{"shards": ["shard-000000.tar"]}', b'{"shards": 5}'):  # not of our making
        manifest.write_bytes(other)
        assert contents(ShardReader(str(tmp_path / "s"))) == right


def test_shard_that_the_manifest_names_and_is_gone_is_named(tmp_path):
    pack(draw_pairs(tmp_path / "pictures", 6), tmp_path / "s", Packing(shard_samples=2))
    (tmp_path / "s" / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match="shard-000001.tar"):
        ShardReader(str(tmp_path / "s"))
    found = check(str(tmp_path / "s"))
    assert (found.samples, len(found.damaged)) == (4, 1)
    assert "shard-000001.tar" in found.damaged[0]
    assert len(ShardReader(str(tmp_path / "s" / "shard-00000[02].tar"))) == 4  # a choice of some is as good


@pytest.mark.parametrize(
    "content", [b"", b"x" * 100, b"x" * 5000, picture(0), b"\x1f\x8b" + b"0" * 5000, b"\0" * (1 << 21)]
)
def test_file_that_is_not_a_tar_is_named(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar"):
        ShardReader(str(tmp_path))


def test_download_into_zeros_that_broke_off_is_named(tmp_path):
    shard = small_shard(tmp_path / "a.tar", 20)
    data = shard.read_bytes()
    shard.write_bytes(data[:5120] + b"\0" * (2 << 20))
    with pytest.raises(UserError, match=r"a\.tar"):
        ShardReader(str(tmp_path))


def test_fifo_folder_or_dead_link_in_place_of_a_shard_is_named(tmp_path):
    for n, make in enumerate((os.mkfifo, os.mkdir, lambda p: os.symlink("nowhere", p))):
        (tmp_path / str(n)).mkdir()
        make(tmp_path / str(n) / "a.tar")
        with pytest.raises(UserError, match=r"a\.tar|no shards"):
            ShardReader(str(tmp_path / str(n)))


# -- hostile shards


def header(name: str, **fields) -> bytes:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(**fields: str) -> bytes:
    info = tarfile.TarInfo("0.png")
    info.pax_headers = {k.replace("__", "."): v for k, v in fields.items()}
    return info.tobuf(tarfile.PAX_FORMAT)


TERA = 1 << 40


@pytest.mark.parametrize(
    "hostile",
    [
        header("0.png", size=TERA),
        header("0.png", size=-512),
        header("0.png", size=TERA, type=tarfile.XHDTYPE),
        header("0.png", size=TERA, type=tarfile.GNUTYPE_LONGNAME),
        header("0.png", size=-(1 << 30), type=tarfile.GNUTYPE_LONGNAME),
        pax(size=str(TERA)),
        pax(size="-1024"),
        pax(GNU__sparse__size=str(TERA), GNU__sparse__map="0,5"),
        pax(GNU__sparse__map="x,y"),
        pax(GNU__sparse__major="1", GNU__sparse__minor="0"),
        header("0", size=0, type=tarfile.XHDTYPE) * 2000,
    ],
    ids=["1TB", "negative", "pax 1TB", "name 1TB", "name negative", "size 1TB", "size negative"]
    + ["sparse 1TB", "sparse map", "sparse 1.0", "recursion"],
)
def test_impossible_sizes_are_named(tmp_path, hostile):
    (tmp_path / "a.tar").write_bytes(hostile + small_shard(tmp_path / "other").read_bytes())
    with pytest.raises(UserError, match=r"a\.tar"):
        ShardReader(str(tmp_path / "a.tar"))


def test_links_fifos_devices_and_names_that_climb_touch_nothing(tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(9))
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s" / "a.tar", "w") as tar:
        for name, type, target in (
            ("1.png", tarfile.SYMTYPE, str(tmp_path / "secret.png")),
            ("2.png", tarfile.LNKTYPE, str(tmp_path / "secret.png")),
            ("3.png", tarfile.FIFOTYPE, ""),
            ("4.png", tarfile.CHRTYPE, ""),
            ("5.png", tarfile.DIRTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type, target
            tar.addfile(info)
        for name in ("../../escaped.png", "/absolute.png"):
            info = tarfile.TarInfo(name)
            info.size = len(picture(0))
            tar.addfile(info, io.BytesIO(picture(0)))
    found = contents(ShardReader(str(tmp_path / "s")))
    assert [(key, image) for key, image, _ in found] == [("../../escaped", picture(0)), ("/absolute", picture(0))]
    assert sorted(p.name for p in tmp_path.rglob("*.png")) == ["secret.png"]


class Canary:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_shard_is_unpickled_or_run(tmp_path):
    canary = tmp_path / "canary"
    payload = pickle.dumps(Canary(canary))
    array = io.BytesIO()
    np.save(array, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    extensions = {e: payload for e in ("pyd", "pickle", "pkl", "pth", "pt", "cls", "index", "ten", "mp", "cbor")}
    extensions |= {
        "npy": array.getvalue(),
        "npz": array.getvalue(),
        "py": f"import os; os.mkdir({str(canary)!r})".encode(),
    }
    members = [("0.png", picture(0)), ("0.txt", b"a caption")] + [(f"0.{e}", d) for e, d in extensions.items()]
    members += [(f"1.{e}", d) for e, d in extensions.items()]  # without a image
    members += [("2.png", payload), ("2.txt", b"a caption"), ("3.png", picture(3)), ("3.json", payload)]
    write_tar(tmp_path / "a.tar", members)
    reader = ShardReader(str(tmp_path))
    assert reader.index(0).keys == ("0", "2", "3")
    assert reader.read(0, 0).image == picture(0)
    found = check(str(tmp_path))
    assert [bad["key"] for bad in found.dead] == ["2", "3"]
    assert not canary.exists()
    pickle.loads(payload)  # it would have worked
    assert canary.exists()
