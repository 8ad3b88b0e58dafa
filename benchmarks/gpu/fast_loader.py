"""Images a second from JPEGs of 500 px in shards, with the caption's tokens, against webdataset + torchvision.

Both crop, resize to 224 px with the bicubic filter and tokenize with CLIP's tokenizer, in as many worker processes as there are
cores. Theirs is open_clip's training pipeline with torchvision's transforms; ours leaves the normalisation to the device.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path

import open_clip
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2

from benchmarks.common import DATA, first_captions
from vlp.data.augment import RandomResizedCrop
from vlp.data.preparing.formats import Pair
from vlp.data.preparing.pack import Packing, pack
from vlp.data.preprocess import Preprocess
from vlp.data.reading.shards import Source
from vlp.data.stream import TrainDataset, training_loader
from vlp.data.text import OpenClipTokenizer

SIDE, BATCH, SHARDS = (224, 224), 64, 32
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def checks(small: bool) -> dict[str, Callable[[], dict]]:
    return {"images a second": partial(rates, small)}


def rates(small: bool) -> dict:
    """The two take turns; each number is the better of two."""
    workers, images = (2, 128) if small else (os.cpu_count(), 15_000)
    found: dict[str, float] = {}
    for _ in range(1 if small else 2):
        for name, loader in (("ours", ours), ("webdataset", theirs)):
            found[name] = max(found.get(name, 0.0), round(rate(loader(workers, images), images), 1))
    return {"workers": workers, "images_a_second": found, "times_faster": round(found["ours"] / found["webdataset"], 3)}


def rate(sizes: Iterator[int], images: int) -> float:
    """Images a second after the first batches: workers have to start, and fill what is fetched ahead."""
    for _ in islice(sizes, images // BATCH // 4):
        pass
    began = time.perf_counter()
    seen = sum(sizes)
    return seen / (time.perf_counter() - began)


@cache
def shards() -> Path:
    """The photos, over and over again, with Flickr8k's captions."""
    folder = Path(tempfile.mkdtemp(prefix="vlp-loader-"))
    photos = sorted((DATA / "photos_500px").rglob("*.[jJ][pP]*[gG]"))
    captions = first_captions()
    pairs = [
        Pair(image=str(photos[n % len(photos)]), captions=(captions[n],), key=f"{n:06d}", source="photos", extra={})
        for n in range(SHARDS * 32)
    ]
    pack(pairs, folder, Packing(shard_samples=32))
    return folder


def ours(workers: int, images: int) -> Iterator[int]:
    preprocess, crop = Preprocess(SIDE, MEAN, STD, "bicubic"), RandomResizedCrop(scale=(0.9, 1.0), flip=0.0)
    source, tokenizer = Source(str(shards())), OpenClipTokenizer("ViT-B-32")
    dataset = TrainDataset([source], (crop,), preprocess, tokenizer, 77, 64_000_000, 0)
    loader = training_loader(dataset, 0, images, BATCH, 0, 1, workers, pin_memory=torch.cuda.is_available())
    return (len(loaded.batch) for loaded in loader)


def theirs(workers: int, images: int) -> Iterator[int]:
    import webdataset

    tokenize = open_clip.get_tokenizer("ViT-B-32")
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, scale=(0.9, 1.0), interpolation=InterpolationMode.BICUBIC),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    urls = sorted(str(path) for path in shards().glob("*.tar"))
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList(urls),
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(100),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="json"),
        webdataset.map_dict(image=transform, text=lambda found: tokenize(found["captions"][0])[0]),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(BATCH, partial=False),
    ).repeat(nbatches=images // BATCH // workers + 1)
    loader = DataLoader(pipeline, batch_size=None, num_workers=workers, pin_memory=torch.cuda.is_available())
    return (len(image) for image, _ in islice(loader, images // BATCH))
