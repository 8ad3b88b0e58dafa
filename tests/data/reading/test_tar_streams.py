"""A tar stream gives the samples that the indexed shard has, or one line that says what is wrong. No command runs unasked."""

import gzip
import io
import os
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.data.reading.test_index import PIXELS
from tests.data.reading.test_shards import flips, header, picture, serve, small_shard, write_tar
from vlp.data.reading import tar_streams
from vlp.data.reading.shards import ShardReader
from vlp.data.reading.tar_streams import WebDatasetStream, read_samples
from vlp.errors import BadSample, UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))


def streamed(url: str, label: str | None = None) -> list[tuple]:
    samples = [sample.parse(row, label) for row, sample in enumerate(read_samples(str(url)))]
    return [(s.key, s.image, s.captions, s.image_id, s.meta, s.label) for s in samples]


def indexed(folder: Path, label: str | None = None) -> list[tuple]:
    reader = ShardReader(str(folder), label)
    samples = [reader.read(*reader.locate(row)) for row in range(len(reader))]
    return [(s.key, s.image, s.captions, s.image_id, s.meta, s.label) for s in samples]


def test_stream_gives_the_samples_of_the_indexed_shard(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "v1.5/0", "ppm": PIXELS, "txt": "one", "json": {"url": "x"}, "cls": 3})
        writer.write({"__key__": "1.5", "tiff": PIXELS, "text": "two", "cls": 4, "pyd": [1]})
        writer.write({"__key__": "2", "json": {"status": "failed_to_download"}})
        writer.write({"__key__": "3", "jpg": PIXELS, "json.gz": {"caption": "three"}, "cls": 5})
    expected = indexed(tmp_path, "cls")
    assert [key for key, *_ in expected] == ["v1.5/0", "1.5", "3"]
    assert streamed(tmp_path / "a.tar", "cls") == expected


@pytest.mark.parametrize("pack", [gzip.compress, __import__("bz2").compress, __import__("lzma").compress])
def test_compressed_shards_and_outputs_of_commands_are_read(tmp_path, pack):
    shard = small_shard(tmp_path / "a.tar")
    packed = tmp_path / "packed"
    packed.write_bytes(pack(shard.read_bytes()))
    assert streamed(packed) == streamed(f"pipe:cat {packed}") == streamed(shard) == indexed(shard)


def test_shards_behind_http_are_read(tmp_path):
    small_shard(tmp_path / "a.tar")
    server, url = serve(tmp_path)
    try:
        assert streamed(f"{url}/a.tar") == indexed(tmp_path / "a.tar")
        with pytest.raises(UserError, match=r"b\.tar: curl ended with exit code 22"):
            streamed(f"{url}/b.tar")
    finally:
        server.shutdown()
        server.server_close()


def test_endless_archive_is_read_as_it_is_written(tmp_path):
    shard = small_shard(tmp_path / "a.tar")
    with tarfile.open(shard) as tar:
        tar.getmembers()
    members = tmp_path / "members"  # without the end of the archive
    members.write_bytes(shard.read_bytes()[: tar.offset])
    samples = read_samples(f"pipe:while cat {members}; do :; done")
    keys = [next(samples).key for _ in range(20)]
    assert keys == [str(n % 3) for n in range(20)]
    started = time.monotonic()
    samples.close()
    assert time.monotonic() - started < 3


def test_command_that_no_longer_writes_is_ended_with_the_stream(tmp_path):
    shard = small_shard(tmp_path / "a.tar", 40)
    samples = read_samples(f"pipe:echo $$ > {tmp_path}/pid; head -c 40960 {shard}; exec sleep 60")
    assert next(samples).key == "0"
    samples.close()
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    "command, reason",
    [
        ("false", "the command ended with exit code 1"),
        ("cat SHARD; exit 3", "the command ended with exit code 3"),
        ("nonsense-command", "the command ended with exit code 127"),
        ("head -c 1500 SHARD; exit 4", "the command ended with exit code 4"),
        ("true", "it is truncated"),
        ("head -c 1500 SHARD", "it is truncated"),
        ("cat SHARD SHARD", "data follow the end of the archive"),
        ("echo hello", "truncated|not a tar"),
        ("yes", "not a tar"),
        ("kill -9 $$", "the command ended with exit code -9"),
    ],
)
def test_failing_command_is_one_line(tmp_path, command, reason):
    shard = small_shard(tmp_path / "a.tar")
    with pytest.raises(UserError, match=reason) as error:
        streamed("pipe:" + command.replace("SHARD", str(shard)))
    assert "\n" not in str(error.value) and str(error.value).startswith("pipe:")


def test_every_truncation_is_named_like_that_of_an_indexed_shard(tmp_path):
    data = small_shard(tmp_path / "whole.tar").read_bytes()
    shard = tmp_path / "a.tar"
    for size in range(0, len(data), 119):
        shard.write_bytes(data[:size])
        try:
            expected = indexed(shard)
        except UserError:
            with pytest.raises(UserError, match=r"a\.tar"):
                streamed(shard)
        else:
            assert streamed(shard) == expected
        (tmp_path / "a.tar.index.json").unlink(missing_ok=True)


def test_flipped_bit_in_a_header_loses_no_sample(tmp_path):
    data = small_shard(tmp_path / "whole.tar").read_bytes()
    shard, named = tmp_path / "a.tar", 0
    for _, altered in flips(data, 61):
        shard.write_bytes(altered)
        try:
            assert [key for key, *_ in streamed(shard)] == ["0", "1", "2"]
        except UserError:
            named += 1
    assert named > 20


@pytest.mark.parametrize("hostile", [header("0.png", size=1 << 40), header("0.png", size=-512)])
def test_impossible_sizes_are_one_line(tmp_path, hostile):
    (tmp_path / "a.tar").write_bytes(hostile + small_shard(tmp_path / "other").read_bytes())
    with pytest.raises(UserError, match=r"a\.tar"):
        streamed(tmp_path / "a.tar")


def test_unreadable_members_are_bad_samples(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.bmp", b"BM"), ("0.txt", b"a"), ("1.json", b"{}"), ("2.png", picture(2))])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("3.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    reasons = {}
    for sample in read_samples(str(tmp_path / "a.tar")):
        try:
            sample.parse(0, None)
        except BadSample as e:
            reasons[sample.key] = str(e)
    assert reasons == {
        "0": "no image that can be read (bmp, txt)",
        "3": "its png is a link or a sparse file, which a stream cannot read",
    }


def test_member_that_occurs_twice_is_one_line(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", picture(0)), ("0.png", picture(1))])
    with pytest.raises(UserError, match=r"a\.tar: 0\.png: duplicate file name"):
        streamed(tmp_path / "a.tar")


def test_large_member_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_streams, "LARGEST_MEMBER", 100)
    with pytest.raises(UserError, match="over the limit of 100"):
        streamed(small_shard(tmp_path / "a.tar"))


def test_nothing_of_a_stream_is_unpickled(tmp_path, monkeypatch):
    import pickle

    monkeypatch.setattr(pickle, "loads", None)
    write_tar(
        tmp_path / "a.tar", [("0.png", picture(0)), ("0.pyd", pickle.dumps([1])), ("0.pth", b"x"), ("1.pyd", b"")]
    )
    samples = list(read_samples(str(tmp_path / "a.tar")))
    assert [(s.key, sorted(s.members)) for s in samples] == [("0", ["png"]), ("1", [])]


# -- urls


def test_urls_are_expanded_and_nothing_is_run(tmp_path):
    for n in range(3):
        small_shard(tmp_path / f"{n}.tar")
    command = f"pipe:touch {tmp_path}/ran; cat {{a,b}}"
    stream = WebDatasetStream(f"{tmp_path}::{command}::http://x/{{00..01}}.tar")
    assert stream.open() == [
        *(f"{tmp_path}/{n}.tar" for n in range(3)),
        f"pipe:touch {tmp_path}/ran; cat a",
        f"pipe:touch {tmp_path}/ran; cat b",
        "http://x/00.tar",
        "http://x/01.tar",
    ]
    assert stream.has_commands and not (tmp_path / "ran").exists()
    assert WebDatasetStream(r"pipe:awk '{print $1}' \n").open() == [r"pipe:awk '{print $1}' \n"]
    assert not WebDatasetStream(f"{tmp_path}/{{pipe:a,b}}").has_commands
    assert stream.at("x") == replace(stream, urls="x")


@pytest.mark.parametrize(
    "urls, reason",
    [
        ("nowhere", "no shards at nowhere: it does not exist"),
        ("", "no shards|does not exist|no .tar file"),
        ("s3://bucket/a.tar", "s3:// is not one of .*; give a command"),
        ("pipe:", "pipe: has no command"),
        ("pipe:a::", "no shards|does not exist|no .tar file"),
        ("{pipe:touch ran,b}", "does not exist"),
        (" pipe:touch ran", "does not exist"),
        ("PIPE:touch ran", "does not exist"),
        ("pipe:{1..2000000}", "more than 1,000,000"),
    ],
)
def test_urls_without_a_shard_are_one_line(tmp_path, monkeypatch, urls, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=reason):
        WebDatasetStream(urls).open()
    assert not (tmp_path / "ran").exists()


def test_indexed_source_refuses_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="a command cannot be indexed; .* WebDatasetStream"):
        ShardReader("pipe:touch ran")
    assert not (tmp_path / "ran").exists()


def test_numbers_of_a_class_are_those_of_the_json_field(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", picture(0)), ("0.json", b'{"label": 7}')])
    assert streamed(tmp_path / "a.tar", "label") == indexed(tmp_path, "label")
    ((*_, label),) = streamed(tmp_path / "a.tar", "label")
    assert label == 7


def test_pixels_survive(tmp_path):
    from vlp.data.image import decode

    with webdataset.TarWriter(io.FileIO(tmp_path / "a.tar", "w")) as writer:
        writer.write({"__key__": "0", "png": PIXELS})
    ((_, image, *_),) = streamed(tmp_path / "a.tar")
    np.testing.assert_array_equal(decode(image), PIXELS)
