"""Packing: the same bytes however it is done, going on after an interruption, losing nothing of others'."""

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, command, draw_pairs, environment, vlp
from vlp.data.image import decode
from vlp.data.preparing.formats import Pair
from vlp.data.preparing.pack import Packing, pack
from vlp.data.reading.index import ShardIndex, index_path
from vlp.data.reading.shards import ShardReader
from vlp.errors import UserError

TEN = Packing(shard_samples=10)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> list[Pair]:
    return draw_pairs(tmp_path_factory.mktemp("pictures"), 35)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def test_parallel_equals_serial_byte_for_byte(pairs, tmp_path):
    first = pack(pairs, tmp_path / "serial", TEN)
    assert pack(pairs, tmp_path / "parallel", TEN, workers=3) == first
    assert digests(tmp_path / "parallel") == digests(tmp_path / "serial")


def test_manifest_and_indexes_say_what_is_there(pairs, tmp_path):
    manifest = pack(pairs, tmp_path, TEN)
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    assert (manifest["samples"], manifest["captions"], manifest["left_out"]) == (35, 70, 0)
    assert [s["shard"] for s in manifest["shards"]] == [f"shard-{n:06d}.tar" for n in range(4)]
    for line in manifest["shards"]:
        data = (tmp_path / line["shard"]).read_bytes()
        assert (line["size"], line["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert ShardIndex.load(index_path(tmp_path / line["shard"])) == ShardIndex.scan(tmp_path / line["shard"])
    reader = ShardReader(str(tmp_path))
    for n, pair in enumerate(pairs):
        sample = reader.read(*reader.locate(n))
        assert (sample.key, sample.meta["index"], sample.captions) == (pair.key, n, pair.captions)
        assert sample.image == Path(pair.image).read_bytes()
        assert sample.meta["source"] == "toy"


def test_progress_ends_at_the_total(pairs, tmp_path):
    seen = []
    pack(pairs, tmp_path, TEN, progress=lambda *a: seen.append(a))
    assert seen == [(0, 35), *sorted(seen[1:-1]), (35, 35)]
    pack(pairs, tmp_path, TEN, progress=lambda *a: seen.append(a))
    assert seen[-1] == (35, 35)


def test_second_run_writes_no_shard(pairs, tmp_path):
    pack(pairs, tmp_path, TEN)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.tar*")}
    pack(pairs, tmp_path, TEN, workers=2)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.tar*")} == before


@pytest.mark.parametrize("lost", ["tar", "index", "plan", "short"])
def test_run_after_a_loss_restores_what_is_lost(pairs, tmp_path, lost):
    pack(pairs, tmp_path, TEN)
    before = digests(tmp_path)
    shard = tmp_path / "shard-000002.tar"
    plan = tmp_path / ".shard-000002.tar.plan.json"
    if lost == "short":
        shard.write_bytes(shard.read_bytes()[:-700])
    else:
        {"tar": shard, "index": index_path(shard), "plan": plan}[lost].unlink()
    if lost == "plan":  # it could be anyone's
        with pytest.raises(UserError, match="shard-000002.tar contains other pairs"):
            pack(pairs, tmp_path, TEN)
    else:
        pack(pairs, tmp_path, TEN)
        assert digests(tmp_path) == before


# -- interruption


def test_killed_packing_continues_to_the_same_result(tmp_path):
    """SIGKILL to the command alone: its workers must not live on, and no tar may be seen half-written at any time."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for n in range(300):
        pixels = rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{n}.png", compress_level=0)
    lines = [json.dumps({"image": f"{n}.png", "caption": f"number {n}"}) for n in range(300)]
    (tmp_path / "in" / "all.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    arguments = ("data", "pack", tmp_path / "in", out, "--shard-samples", 10, "--max-side", 190, "--workers", 2)
    process = subprocess.Popen(command(*arguments), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(finished := list(out.glob("*.tar"))) < 5 and time.monotonic() < deadline:
        for shard in finished:
            ShardIndex.scan(shard)  # whole, or it raises
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    await_workers_end(out)
    before = {p: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert 5 <= len(before) < 30
    (out / ".shard-000029.tar.12345.tmp").write_bytes(b"half")  # as a killed run leaves it
    run = vlp(*arguments)
    assert (run.returncode, run.stdout) == (0, f"300 samples in 30 shards in {out}\n")
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert not list(out.glob(".*.tmp"))
    vlp(*(tmp_path / "whole" if a == out else a for a in arguments))
    assert digests(tmp_path / "whole") == digests(out)


def await_workers_end(out: Path) -> None:
    """Until nobody has a lock on the folder any more, which its workers hold as long as they live."""
    deadline = time.monotonic() + 20
    while open_somewhere(out / ".pack.lock"):
        assert time.monotonic() < deadline, "the workers of a killed run live on"
        time.sleep(0.02)


def open_somewhere(path: Path) -> bool:
    def target(link: Path) -> str:
        try:
            return os.readlink(link)
        except OSError:
            return ""

    return any(target(link) == str(path) for link in Path("/proc").glob("[0-9]*/fd/*"))


def test_interrupted_run_ends_in_one_line(tmp_path):
    pairs = draw_pairs(tmp_path / "in", 5)
    lines = [json.dumps({"image": Path(pairs[n % 5].image).name + f"#{n}", "caption": "a"}) for n in range(3000)]
    for n in range(3000):
        os.link(pairs[n % 5].image, tmp_path / "in" / f"{Path(pairs[n % 5].image).name}#{n}")
    (tmp_path / "in" / "all.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    process = subprocess.Popen(
        command("data", "pack", tmp_path / "in", out, "--shard-samples", 20, "--workers", 2),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell starts what it puts in the background, maybe this very test run, with Ctrl-C ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does at Ctrl-C
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.endswith("vlp: interrupted\n")
    assert "Traceback" not in said
    for shard in out.glob("*.tar"):
        ShardIndex.scan(shard)
    assert not list(out.glob(".*.tmp"))


# -- what is left out


def test_bad_images_are_quarantined_with_their_reason(pairs, tmp_path):
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(pairs[0].image).read_bytes()[:2000])
    (tmp_path / "no.jpg").write_text("<html>not found</html>")
    bad = {
        "gone": (replace(pairs[0], image=str(tmp_path / "gone.jpg")), "cannot be read (No such file or directory)"),
        "folder": (replace(pairs[0], image=str(tmp_path)), "cannot be read (it is a folder, not a file)"),
        "html": (replace(pairs[0], image=str(tmp_path / "no.jpg")), "not a JPEG, PNG, WEBP, PPM or TIFF image"),
        "cut": (replace(pairs[0], image=str(cut)), "undecodable image"),
        "silent": (replace(pairs[0], captions=(" ", "")), "no caption"),
    }
    mixed = pairs[:12] + [replace(pair, key=key) for key, (pair, _) in bad.items()] + pairs[12:20]
    manifest = pack(mixed, tmp_path / "out", TEN)
    assert (manifest["samples"], manifest["left_out"], manifest["captions"]) == (20, 5, 40)
    found = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in found] == list(bad)
    for line in found:
        assert line["shard"] == "shard-000001.tar"
        assert line["image"] == bad[line["key"]][0].image
        assert bad[line["key"]][1] in line["reason"]
    reader = ShardReader(str(tmp_path / "out"))
    assert [reader.read(*reader.locate(n)).key for n in range(20)] == [p.key for p in pairs[:20]]
    assert pack(mixed, tmp_path / "out", TEN) == manifest  # a second run remembers them


def test_too_many_pixels_are_left_out(pairs, tmp_path):
    large = tmp_path / "large.png"
    Image.new("RGB", (300, 100)).save(large)
    manifest = pack([*pairs[:2], Pair(str(large), ("a",), "large")], tmp_path / "out", Packing(max_pixels=2000))
    assert manifest["left_out"] == 1


def test_nothing_usable_is_one_line_and_leaves_no_shard_in_the_way(pairs, tmp_path):
    lost = [replace(p, image=p.image + ".gone") for p in pairs]
    with pytest.raises(UserError, match="none of the 35 pairs is usable; the first: .*No such file"):
        pack(lost, tmp_path / "out", TEN)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".pack.lock"]
    assert pack(pairs, tmp_path / "out", TEN)["samples"] == 35


# -- what goes in


def test_packed_images_keep_their_bytes(pairs, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    files = {}
    for kind in ("JPEG", "WEBP", "PNG", "MPO", "PPM", "TIFF"):
        files[kind] = tmp_path / f"{kind}.dat"
        image = Image.fromarray(pixels)
        more = {"save_all": True, "append_images": [image]} if kind == "MPO" else {}
        image.save(files[kind], kind, **more)
    pack([Pair(str(f), ("a",), kind) for kind, f in files.items()], tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        found = {m.name: tar.extractfile(m).read() for m in tar if not m.name.endswith("json")}
    extensions = {"JPEG": "jpg", "WEBP": "webp", "PNG": "png", "MPO": "jpg", "PPM": "ppm", "TIFF": "tiff"}
    assert found == {f"{kind}.{extension}": files[kind].read_bytes() for kind, extension in extensions.items()}
    for data in found.values():
        assert decode(data).shape == (20, 30, 3)


def test_large_images_are_scaled_down_and_small_ones_are_not(tmp_path):
    for name, size in (("wide", (90, 30)), ("small", (40, 20))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    pairs = [Pair(str(tmp_path / f"{n}.png"), ("a",), n) for n in ("wide", "small")]
    pack(pairs, tmp_path / "out", Packing(max_side=45))
    reader = ShardReader(str(tmp_path / "out"))
    wide, small = (reader.read(0, n) for n in range(2))
    assert decode(wide.image).shape == (15, 45, 3)
    assert Image.open(io.BytesIO(wide.image)).format == "JPEG"
    assert small.image == (tmp_path / "small.png").read_bytes()


def test_captions_of_any_script_are_packed_unchanged_except_half_surrogate_pairs(pairs, tmp_path):
    captions = ("ein Käfer", "一只猫", "\U0001f600 smile", "tab\tand \x00 nul", "half \ud83d pair")
    pack([replace(pairs[0], captions=captions, extra={"index": "x", "note": "\ud83d"})], tmp_path)
    sample = ShardReader(str(tmp_path)).read(0, 0)
    assert sample.captions == (*captions[:-1], "half ? pair")
    assert (sample.meta["index"], sample.meta["note"]) == (0, "?")


# -- the folder


def test_folder_with_other_shards_is_refused_and_loses_nothing(pairs, tmp_path):
    def refused(packing: Packing, wanted: list[Pair]) -> None:
        before = digests(tmp_path)
        with pytest.raises(UserError, match=r"shard.*\.tar contains other pairs than these; pack into another folder"):
            pack(wanted, tmp_path, packing)
        assert digests(tmp_path) == before | {".pack.lock": hashlib.sha256(b"").hexdigest()}

    with tarfile.open(tmp_path / "shard-by-others.tar", "w"):
        pass
    refused(TEN, pairs)
    (tmp_path / "shard-by-others.tar").rename(tmp_path / "shard-000001.tar")
    refused(TEN, pairs)
    (tmp_path / "shard-000001.tar").unlink()
    pack(pairs, tmp_path, TEN)
    refused(Packing(shard_samples=11), pairs)
    refused(TEN, [replace(pairs[0], captions=("another",)), *pairs[1:]])
    refused(TEN, pairs[:20])  # the last two shards would be left over
    refused(TEN, pairs[1:])


def test_second_run_at_the_same_time_waits(pairs, tmp_path):
    listing = tmp_path / "all.jsonl"
    listing.write_text("\n".join(json.dumps({"image": p.image, "captions": p.captions}) for p in pairs))
    out = tmp_path / "out"
    arguments = command("data", "pack", listing, out, "--shard-samples", 2, "--workers", 1)
    both = [
        subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(ShardReader(str(out))) == 35


@pytest.fixture
def tiny_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True)
    if not done or done.returncode:
        pytest.skip("needs root and mount to make a disk of 64 KB")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_is_one_line_and_leaves_no_part_of_a_shard(pairs, tmp_path, tiny_disk):
    listing = tmp_path / "all.jsonl"
    listing.write_text("\n".join(json.dumps({"image": p.image, "captions": p.captions}) for p in pairs))
    arguments = ("data", "pack", listing, tiny_disk / "out", "--shard-samples", 5, "--workers", 2)
    run = vlp(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    expected = (
        f"vlp: cannot write {tiny_disk}/out: No space left on device; free some space and run it again: it continues"
    )
    assert run.stderr.splitlines()[-1] == expected
    assert "Traceback" not in run.stderr
    left = list((tiny_disk / "out").iterdir())
    assert not [p for p in left if p.suffix == ".tmp" or p.name == "manifest.json"]
    for shard in (tiny_disk / "out").glob("*.tar"):
        ShardIndex.scan(shard)
    finished = len(list((tiny_disk / "out").glob("*.tar")))
    assert 0 < finished < 7
    subprocess.run(["mount", "-o", "remount,size=2m", str(tiny_disk)], check=True)
    assert vlp(*arguments).returncode == 0
    assert len(ShardReader(str(tiny_disk / "out"))) == 35


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_error_of_the_disk_is_one_line(pairs, tmp_path, monkeypatch, code):
    def fail(fd):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)  # inherited by the workers
    with pytest.raises(UserError, match=f"cannot write .*: {os.strerror(code)}; (free some space|check the folder)"):
        pack(pairs, tmp_path / "out", TEN, workers=2)
    assert not [p for p in (tmp_path / "out").iterdir() if p.suffix in (".tar", ".tmp")]


def test_folder_below_a_file_is_one_line(pairs, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "out", tmp_path / "file"):
        with pytest.raises(UserError, match="cannot write"):
            pack(pairs, folder, TEN)


def test_killed_worker_is_one_line(pairs, tmp_path, monkeypatch):
    """As the kernel does when memory runs out."""
    monkeypatch.setattr(os, "fsync", lambda fd: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a packing process was killed"):
        pack(pairs, tmp_path, TEN, workers=1)


@pytest.mark.parametrize("numbers", [{"shard_samples": 0}, {"shard_samples": -5}, {"max_side": 0}, {"max_side": -1}])
def test_impossible_sizes_are_one_line(numbers):
    with pytest.raises(UserError, match="give whole numbers from 1 on"):
        Packing(**numbers)
