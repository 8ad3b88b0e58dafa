"""Inputs with seeded damage: no traceback, no hang, bounded memory, and exact counts.

`KINDS` maps a name to a function of (rng, folder) that writes a damaged input and checks what is made of it. Only UserError
and BadSample may be raised, and the functions handle both: anything else fails the test with its seed.

``python -m tests.cases.test_fuzz 5000`` tries the first 5,000 seeds and prints a table.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from tests.cases.inputs import image_bytes, write_tar
from vlp.data.preparing.formats import Pair, read_pairs
from vlp.data.preparing.inspect import check
from vlp.data.preparing.pack import pack
from vlp.data.reading.annotated import Annotated
from vlp.data.reading.index import ShardIndex, index_path
from vlp.data.reading.labelled import NO_CLASS, BadLine, read_labelled
from vlp.data.reading.sentences import Sentences
from vlp.data.reading.shards import ShardReader
from vlp.errors import BadSample, UserError

SEEDS, PER_TEST = 500, 25
SECONDS = 10.0  # for one input, on a busy machine; none needs more than a few tenths
MEBIBYTES = 400  # more than before the tests

TOKENS = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b'"',
    b'""',
    b"\n",
    b"\r",
    b"\r\n\r\n",
    b",",
    b"\t",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\\",
]
TOKENS += [
    b"null",
    b"true",
    b"-1",
    b"1.5",
    b"1e999",
    b"NaN",
    b"9" * 25,
    b"9" * 5000,
    b"\\ud800",
    b"\\u0000",
    b"[" * 5000,
]
TOKENS += [b"../", b"/dev/zero", b"\xe9", "\u2028".encode(), b" " * 3000, b"\x1f\x8b", b"PK\x03\x04"]


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Change a few bits, slices or tokens of some bytes."""
    for _ in range(rng.integers(1, 4)):
        begin, end = sorted(rng.integers(0, len(data) + 1, 2).tolist())
        end = min(end, begin + int(rng.integers(1, 600)))
        match rng.integers(7):
            case 0:
                altered = bytearray(data)
                for at in rng.integers(0, max(1, len(data)), rng.integers(1, 9)).tolist():
                    if data:
                        altered[at] ^= 1 << int(rng.integers(8))
                data = bytes(altered)
            case 1:
                data = data[:begin] + data[end:]
            case 2:
                data = data[:begin] + TOKENS[rng.integers(len(TOKENS))] + data[begin:]
            case 3:
                data = data[:end] + data[begin:]
            case 4:
                data = data[: int(len(data) * rng.random())]
            case 5:
                data = data[:begin] + bytes(end - begin) + data[end:]
            case 6:
                data = data[:begin] + rng.bytes(end - begin) + data[end:]
    return data


def other_value(rng: np.random.Generator):
    """A value that may be of the wrong type or out of range."""
    values = [
        None,
        True,
        -1,
        0,
        1,
        7,
        2**31,
        2**63,
        10**30,
        1.5,
        float("nan"),
        "",
        "x",
        "9" * 30,
        "../x",
        "\0",
        "\ud800",
    ]
    values += [[], [[]], {}, {"a": 1}, [None, 5], "x" * 100_000]
    return values[rng.integers(len(values))]


def alter_json(value, rng: np.random.Generator):
    """Replace, remove or add one value somewhere inside a json value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = list(value)[rng.integers(len(value))]
        match rng.integers(4):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return value | {key: other_value(rng)}
            case _:
                return value | {key: alter_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = int(rng.integers(len(value)))
        match rng.integers(4):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value[:at] + [other_value(rng)] + value[at:]
            case _:
                return [*value[:at], alter_json(value[at], rng), *value[at + 1 :]]
    return other_value(rng)


# --- shards -------------------------------------------------------------------------------------------------------------

COUNT = 6
SAMPLES = {str(n): (image_bytes(n), f"caption {n}") for n in range(COUNT)}


def write_samples(folder: Path) -> Path:
    members = [
        m for key, (image, text) in SAMPLES.items() for m in ((f"{key}.jpg", image), (f"{key}.txt", text.encode()))
    ]
    return write_tar(folder / "0.tar", members)


def reference_images(path: Path) -> list[bytes] | None:
    """The images of a shard by tarfile alone, None if it cannot read the archive to its end."""
    try:
        with tarfile.open(path, "r:") as tar:
            files = [m for m in tar if m.isreg() and not m.issparse()]
            members = [m for m in files if m.name.lower().endswith((".jpg", ".jpeg", ".png", ".webp"))]
            return sorted(tar.extractfile(m).read() for m in members if not Path(m.name).name.startswith("."))
    except Exception:
        return None


def read_all(location: Path) -> tuple[dict[str, tuple[bytes, tuple[str, ...]]], int]:
    """The good samples, and the number of bad ones."""
    reader, found, bad = ShardReader(str(location)), {}, 0
    for n in range(len(reader)):
        try:
            sample = reader.read(*reader.locate(n))
            found[f"{sample.shard}/{sample.row}/{sample.key}"] = (sample.image, sample.captions)
        except BadSample:
            bad += 1
    assert len(found) + bad == len(reader)
    return found, bad


def tar_bytes(rng: np.random.Generator, folder: Path) -> None:
    """Damage anywhere in a tar without an index."""
    shard = write_samples(folder)
    shard.write_bytes(damage(shard.read_bytes(), rng))
    _check_shard(shard)


def tar_headers(rng: np.random.Generator, folder: Path) -> None:
    """A header that lies, with a checksum that fits."""
    shard = write_samples(folder)
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        at = [m.offset for m in tar][rng.integers(2 * COUNT)]
    header = data[at : at + 512]
    match rng.integers(4):
        case 0:
            header[156] = rng.choice(list(b"0123456789xgLKSVDN\0"))
        case 1:
            header[124:136] = (
                b"%011o\0" % int(rng.integers(0, 2**33)),
                b"\x80" + bytes(3) + rng.bytes(8),
                b"-0000000001\0",
            )[rng.integers(3)]
        case 2:
            header[:100] = damage(bytes(header[:100]), rng)[:100].ljust(100, b"\0")
        case 3:
            header[157:257] = (b"0.jpg", b"../../etc/passwd", b"\xff" * 99)[rng.integers(3)].ljust(100, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[at : at + 512] = header
    shard.write_bytes(data)
    _check_shard(shard)


def _check_shard(shard: Path) -> None:
    try:
        found, bad = read_all(shard.parent)
    except UserError as e:
        assert "\n" not in str(e)
        return
    assert bad == 0 or all(captions == () or isinstance(captions, tuple) for _, captions in found.values())
    reference = reference_images(shard)
    if reference is not None:  # samples are exactly those of tarfile, further encodings of an image apart
        index = ShardIndex.load(index_path(shard))
        further = sum(count for reason, (count, _) in index.ignored.items() if reason == "further image of a sample")
        with tarfile.open(shard) as tar:
            linked = sum(m.islnk() or m.issym() for m in tar)
        assert len(reference) - further <= len(index) <= len(reference) + linked
    found = check(str(shard.parent))
    assert found.samples == len(ShardReader(str(shard.parent))) or found.damaged


def indexed_tar(rng: np.random.Generator, folder: Path) -> None:
    """Damage of a tar that has been indexed: each sample is the right one, or bad."""
    shard = write_samples(folder)
    right, _ = read_all(folder)
    shard.write_bytes(damage(shard.read_bytes(), rng))
    try:
        found, bad = read_all(folder)
    except UserError as e:
        assert "0.tar" in str(e)
        return
    assert found.items() <= right.items() and len(found) + bad == COUNT


def index_file(rng: np.random.Generator, folder: Path) -> None:
    """An index that is damaged, or lies with checksums that fit, next to an intact tar."""
    shard = write_samples(folder)
    right, _ = read_all(folder)
    path = index_path(shard)
    if rng.random() < 0.5:
        path.write_bytes(damage(path.read_bytes(), rng))
        assert read_all(folder) == (right, 0)
        return
    index = ShardIndex.load(path)
    name = [f.name for f in fields(ShardIndex)][rng.integers(len(fields(ShardIndex)))]
    value = alter_json(json.loads(json.dumps(getattr(index, name))), rng)
    try:
        replace(index, **{name: value}).save(path)
    except (TypeError, ValueError, AttributeError, UnicodeEncodeError):
        return  # no such index can be written
    try:
        found, _ = read_all(folder)
    except UserError as e:
        assert "0.tar" in str(e)
        return
    # which samples there are only a scan can tell; those that are read are not others
    assert set(found.values()) <= set(right.values()) | {(image, ()) for image, _ in right.values()}
    counted = check(str(folder))
    assert counted.damaged or counted.samples == COUNT


def manifest_file(rng: np.random.Generator, folder: Path) -> None:
    """A manifest that is damaged or lies, next to intact shards."""
    pairs = []
    for n in range(COUNT):
        (folder / f"{n}.jpg").write_bytes(SAMPLES[str(n)][0])
        pairs.append(Pair(str(folder / f"{n}.jpg"), (f"caption {n}",), str(n)))
    template = MANIFESTS.setdefault("s", {})
    if not template:
        pack(pairs, folder / "s")
        template |= {p.name: p.read_bytes() for p in (folder / "s").iterdir()}
    (folder / "s").mkdir(exist_ok=True)
    for name, data in template.items():
        (folder / "s" / name).write_bytes(data)
    right, _ = read_all(folder / "s")
    path = folder / "s" / "manifest.json"
    if rng.random() < 0.4:
        path.write_bytes(damage(path.read_bytes(), rng))
    else:
        path.write_text(json.dumps(alter_json(json.loads(path.read_text()), rng)))
    try:
        assert read_all(folder / "s") == (right, 0)
    except UserError as e:
        assert "manifest.json" in str(e) or ".tar" in str(e)


MANIFESTS: dict[str, dict[str, bytes]] = {}  # a packed folder, which takes a process to make


# --- texts --------------------------------------------------------------------------------------------------------------

TEXTS = [f"caption {n}, " + ("with a comma" if n % 2 else "caf\u00e9") for n in range(12)]
ROWS = [{"image": f"{n}.jpg", "caption": text, "label": n % 3, "split": "train"} for n, text in enumerate(TEXTS)]
TABLES = {
    "t.txt": "\n".join(TEXTS),
    "t.tsv": "image\tcaption\n" + "".join(f"{r['image']}\t{r['caption']}\n" for r in ROWS),
    "t.csv": "image,caption\n" + "".join(f'{r["image"]},"{r["caption"]}"\n' for r in ROWS),
    "plain.csv": "image;caption\n" + "".join(f"{r['image']};{r['caption']}\n" for r in ROWS),
    "t.jsonl": "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS),
}


def lines_of(data: bytes) -> int | None:
    """The lines of a file that are not blank, None if it is not UTF-8 without NULs at its start."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if b"\n" not in data:
        text = text.replace("\r", "\n")
    return sum(1 for line in text.split("\n") if line.strip(" \t\r\x0b\x0c"))


def sentences(rng: np.random.Generator, folder: Path) -> None:
    """Rows of a file of texts are good or bad, and as many as there are."""
    name = list(TABLES)[rng.integers(len(TABLES))]
    data = damage(TABLES[name].encode(), rng)
    (folder / name).write_bytes(data)
    try:
        reader = Sentences(str(folder / name), columns=() if name == "t.txt" else ("caption",)).open()
    except UserError as e:
        assert "\n" not in str(e) and name in str(e)
        return
    good = 0
    for row in range(len(reader)):
        try:
            sample = reader.read(0, row)
            good += 1
            assert sample.captions[0].strip() and isinstance(sample.captions[0], str)
            sample.captions[0].encode()
        except BadSample as e:
            reader.quarantine_entry(0, row, str(e))
    count = lines_of(data)
    assert count is not None
    if b'"' not in data or name in ("t.txt", "t.jsonl"):
        headers = 0 if name in ("t.txt", "t.jsonl") or not count else 1
        assert len(reader) == count - headers
    assert good <= len(reader)


def annotations(rng: np.random.Generator, folder: Path) -> None:
    """Pairs of an annotation file are usable or have a problem; of lines, there are as many as in the file."""
    name = [n for n in TABLES if n != "t.txt"][rng.integers(len(TABLES) - 1)]
    data = damage(TABLES[name].encode(), rng)
    (folder / name).write_bytes(data)
    try:
        pairs = list(read_pairs(folder / name, split="train" if rng.random() < 0.3 else None))
    except UserError as e:
        assert "\n" not in str(e) and name in str(e)
        return
    assert len({pair.key for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert pair.problem or pair.image
        assert all(isinstance(c, str) and c.strip() for c in pair.captions)
    count = lines_of(data)
    assert count is not None
    if b'"' not in data or name == "t.jsonl":
        rows = sum(max(1, len(pair.captions)) for pair in pairs)
        assert rows <= count


def json_files(rng: np.random.Generator, folder: Path) -> None:
    """COCO's, Karpathy's and ALBEF's json with one value altered, or damaged."""
    images = [{"id": n, "file_name": r["image"]} for n, r in enumerate(ROWS)]
    coco = {"images": images, "annotations": [{"image_id": n, "caption": r["caption"]} for n, r in enumerate(ROWS)]}
    karpathy = {
        "images": [{"filename": r["image"], "sentences": [{"raw": r["caption"]}], "split": "train"} for r in ROWS]
    }
    content = (coco, karpathy, ROWS)[rng.integers(3)]
    text = json.dumps(alter_json(content, rng)).encode()
    (folder / "x.json").write_bytes(damage(text, rng) if rng.random() < 0.3 else text)
    try:
        pairs = list(read_pairs(folder / "x.json"))
    except UserError as e:
        assert "\n" not in str(e)
        return
    assert all(pair.problem or (pair.image and all(isinstance(c, str) for c in pair.captions)) for pair in pairs)


def annotated(rng: np.random.Generator, folder: Path) -> None:
    """Lines of annotations are good or bad, and as many as there are."""
    rows = [{"image": r["image"], "text": r["caption"], "label": "yes", "answers": {"a": 0.5}} for r in ROWS]
    if rng.random() < 0.5:
        rows = [alter_json(row, rng) if rng.random() < 0.3 else row for row in rows]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    data = damage(data, rng) if rng.random() < 0.5 else data
    (folder / "x.jsonl").write_bytes(data)
    source = Annotated(str(folder / "x.jsonl"), label="label", answers="answers", classes=("yes", "no"))
    try:
        reader = source.open()
    except UserError as e:
        assert "\n" not in str(e) and "x.jsonl" in str(e)
        return
    assert len(reader) == lines_of(data)
    for row in range(len(reader)):
        for read in (reader.annotation, lambda row: reader.read(0, row)):
            try:
                read(row)
            except BadSample:
                continue


def labels(rng: np.random.Generator, folder: Path) -> None:
    """A line of a labels.jsonl is an image with its class, or a bad sample."""
    rows = [{"image": r["image"], "label": r["label"], "name": f"class {r['label']}"} for r in ROWS]
    rows = [alter_json(row, rng) if rng.random() < 0.1 else row for row in rows]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    data = damage(data, rng) if rng.random() < 0.5 else data
    (folder / "labels.jsonl").write_bytes(data)
    try:
        images, classes = read_labelled(folder, None)
    except UserError as e:
        assert "\n" not in str(e)
        return
    assert len(images) == lines_of(data)
    assert all(n == NO_CLASS if isinstance(image, BadLine) else 0 <= n < len(classes) for image, n in images)


KINDS: dict[str, Callable[[np.random.Generator, Path], None]] = {
    f.__name__: f
    for f in (
        tar_bytes,
        tar_headers,
        indexed_tar,
        index_file,
        manifest_file,
        sentences,
        annotations,
        json_files,
        annotated,
        labels,
    )
}


@contextmanager
def limited(seconds: float):
    """Fail if the body takes longer."""

    def stop(*_):
        raise AssertionError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def kind_of(seed: int) -> str:
    return list(KINDS)[seed % len(KINDS)]


def peak_mebibytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@pytest.fixture(scope="module")
def peak_before() -> int:
    return peak_mebibytes()


@pytest.mark.parametrize("first", range(0, SEEDS, PER_TEST))
def test_damaged_inputs(first, tmp_path, monkeypatch, peak_before):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    for seed in range(first, first + PER_TEST):
        name, folder = kind_of(seed), tmp_path / str(seed)
        folder.mkdir()
        try:
            with limited(SECONDS):
                KINDS[name](np.random.default_rng(seed), folder)
        except BaseException as e:
            e.add_note(f"seed {seed}, {name}, in {folder}") if hasattr(e, "add_note") else None
            raise
    assert peak_mebibytes() - peak_before < MEBIBYTES


def test_the_reference_knows_a_shard():
    """The reference of the tests above counts the samples of an intact shard, so that they compare with something."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert lines_of(b"\xef\xbb\xbfa\n\n b\r\n") == 2 and lines_of(b"\xff") is None and lines_of(b"a\rb") == 2


def main(seeds: int) -> int:
    """Try the first seeds, print a table of the kinds, and return the number of failures."""
    seconds, failed = defaultdict(list), Counter()
    before = peak_mebibytes()
    for seed in range(seeds):
        name = kind_of(seed)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["VLP_CACHE"] = f"{folder}/cache"
            begin = time.perf_counter()
            try:
                with limited(SECONDS):
                    KINDS[name](np.random.default_rng(seed), Path(folder))
            except Exception as e:
                failed[name] += 1
                print(f"seed {seed}, {name}: {type(e).__name__}: {e}")
            seconds[name].append(time.perf_counter() - begin)
    print("| kind | inputs | failures | mean ms | slowest ms |\n| --- | --- | --- | --- | --- |")
    for name, spent in seconds.items():
        mean, slowest = 1000 * np.mean(spent), 1000 * max(spent)
        print(f"| {name} | {len(spent):,} | {failed[name]} | {mean:.0f} | {slowest:.0f} |")
    print(f"memory grew by {peak_mebibytes() - before} MiB")
    return failed.total()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])) > 0)
