"""Inspection of shards: integrity, statistics, and a grid of samples."""

from __future__ import annotations

import json
import math
import os
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from vlp.data.image import decode
from vlp.data.order import keyed_rng
from vlp.data.reading.index import Counted, ShardIndex
from vlp.data.reading.locations import Listing, list_shards
from vlp.data.reading.shards import ShardReader
from vlp.errors import BadSample, UserError


@dataclass
class Check:
    """Result of `check`.

    Args:
        damaged: Shards that cannot be read, or differ from their index or the manifest, with the reason.
        dead: Samples that training would replace.
        duplicates: Keys that occur more than once.
        unread: Files next to the shards that are not read.
        lost: Reason to number and first example of members that are not read, see `ShardIndex`.
        ignored: As ``lost``, of members that nobody expects to be read.
    """

    shards: int = 0
    samples: int = 0
    captions: int = 0
    damaged: list[str] = field(default_factory=list)
    dead: list[dict] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    lost: Counted = field(default_factory=dict)
    ignored: Counted = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether all input can be used, and there is some."""
        return self.samples > len(self.dead) and not (
            self.damaged or self.dead or self.duplicates or self.unread or self.lost
        )


def check(location: str, max_pixels: int = 64_000_000, progress=lambda done, total: None) -> Check:
    """Read everything: verify every shard against its checksum, decode every image, count every caption."""
    found = Check()
    listing = list_shards(location)
    found.unread = [os.path.basename(name) for name in listing.unread]
    found.unread += [f"{folder}/manifest.json: {m.problem}" for folder, m in listing.manifests.items() if m.problem]
    hashes = []  # of the keys: as strings, those of ten million samples would take 1.5 GB
    readers = []
    for n, shard in enumerate(listing.shards):
        found.shards += 1
        try:
            reader = ShardReader(shard, listing=Listing([shard], [], listing.manifests))
            index = reader.index(0)
            if ShardIndex.scan(reader.local(0)) != index:
                found.damaged.append(f"{shard}: its content is not what its index says")
        except UserError as e:
            found.damaged.append(str(e))
            continue
        readers.append(reader)
        hashes.append(np.fromiter(map(hash, index.keys), np.int64, len(index)))
        for total, counted in ((found.lost, index.lost), (found.ignored, index.ignored)):
            for reason, (count, example) in counted.items():
                before, first = total.get(reason, (0, example))
                total[reason] = (before + count, first)
        for row in range(len(index)):
            found.samples += 1
            try:
                sample = reader.read(0, row)
                decode(sample.image, max_pixels)
                if not sample.captions:
                    raise BadSample("no caption")
                found.captions += len(sample.captions)
            except BadSample as e:
                found.dead.append(reader.quarantine_entry(0, row, str(e)))
        progress(n + 1, len(listing.shards))
    found.duplicates = _duplicates(hashes, readers)
    return found


def _duplicates(hashes: list[np.ndarray], readers: list[ShardReader]) -> list[str]:
    """Return keys that occur more than once. Keys are compared only where their hashes are equal."""
    values, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *hashes]), return_counts=True)
    twice = values[counts > 1]
    suspects: Counter[str] = Counter()
    for own, reader in zip(hashes, readers):
        if rows := np.flatnonzero(np.isin(own, twice)).tolist():
            suspects.update(reader.index(0).keys[row] for row in rows)
    return sorted(key for key, count in suspects.items() if count > 1)


def all_captions(location: str, progress=lambda done, total: None) -> Iterator[str]:
    """Yield every caption of the samples that can be read.

    Args:
        progress: Called with (samples, all samples).
    """
    reader = ShardReader(location)
    for number in range(len(reader)):
        if number % 1000 == 0:
            progress(number, len(reader))
        try:
            yield from reader.read(*reader.locate(number)).captions
        except BadSample:  # listed by `check`
            continue


def stats(
    location: str,
    grid: Path | None,
    samples: int = 1000,
    columns: int = 6,
    seed: int = 0,
    progress=lambda done, total: None,
) -> dict:
    """Compute quantiles of image and caption sizes over up to ``samples`` random samples, and draw some of them.

    The number of captions is exact if all samples are looked at, and otherwise estimated from their mean.

    Args:
        grid: Path of a PNG of ``columns`` x 4 samples with their captions. None draws nothing.
        progress: Called with (samples looked at, all of them).

    Raises:
        UserError: if no sample can be decoded, or the PNG cannot be written.
    """
    reader = ShardReader(location)
    drawn = keyed_rng(seed).choice(len(reader), min(samples, len(reader)), replace=False)
    widths, heights, sizes, words, per_image, shown = [], [], [], [], [], []
    for done, number in enumerate(drawn.tolist()):
        progress(done, len(drawn))
        try:
            sample = reader.read(*reader.locate(number))
            pixels = decode(sample.image)
        except BadSample:
            continue
        heights.append(pixels.shape[0])
        widths.append(pixels.shape[1])
        sizes.append(len(sample.image))
        per_image.append(len(sample.captions))
        words += [len(caption.split()) for caption in sample.captions]
        if len(shown) < columns * 4:
            shown.append((pixels, sample.captions[0] if sample.captions else ""))
    if not shown:
        raise UserError(f"no image of {location} can be decoded; run `vlp data check` on it")
    if grid is not None:
        draw_grid(shown, grid, columns)
    columns_of = {
        "width_pixels": widths,
        "height_pixels": heights,
        "image_bytes": sizes,
        "captions_per_image": per_image,
        "words_per_caption": words,
    }
    return {
        "samples": len(reader),
        "shards": len(reader.shards),
        "looked_at": len(widths),
        "captions": round(len(reader) * float(np.mean(per_image))),  # a weight in a mixture by captions
        "not_read": reader.notes(),
        **{name: _quantiles(values) for name, values in columns_of.items()},
    }


def _quantiles(values: list[int]) -> dict[str, float]:
    if not values:
        return {}
    names = ("min", "5%", "median", "95%", "max")
    found = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
    return {"mean": round(float(np.mean(values)), 1), **{n: float(v) for n, v in zip(names, found)}}


def draw_grid(shown: list[tuple[np.ndarray, str]], path: Path, columns: int) -> None:
    """Draw images with their captions to a PNG."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(2.2 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, (pixels, caption) in zip(axes, shown):
        image = Image.fromarray(pixels)
        image.thumbnail((256, 256))
        axis.imshow(np.asarray(image))
        lines = textwrap.wrap(caption, 30, max_lines=3, placeholder=" ...")
        axis.set_title("\n".join(lines), fontsize=7, parse_math=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # drawn as a box
            figure.savefig(path, dpi=100, format="png")
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; check the folder, or give another --grid") from None


def to_lines(found: Check, most: int = 10) -> list[str]:
    """Return the result of `check` as text, with at most ``most`` items of each kind."""
    lines = [f"{found.samples:,} samples with {found.captions:,} captions in {found.shards} shards"]
    for kind, items in (
        ("damaged shards", found.damaged),
        ("dead samples", found.dead),
        ("duplicate keys", found.duplicates),
        ("files that are not read", found.unread),
    ):
        if kind == "files that are not read" and not items:
            continue
        lines.append(f"{kind}: {len(items)}")
        lines += [f"  {item if isinstance(item, str) else json.dumps(item)}" for item in items[:most]]
        if len(items) > most:
            lines.append(f"  and {len(items) - most} more")
    for kind, counted in (("not read", found.lost), ("ignored", found.ignored)):
        for reason, (count, example) in counted.items():
            lines.append(f"{kind}: {count:,} ({reason}), the first {example!r}")
    if not found.samples:
        lines.append("there is nothing to train on")
    return lines
