"""CPU time from a JPEG's bytes to the tensor that a model takes, as ratios to the bare decode, in one process.

python -m benchmarks.decode
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from benchmarks.common import DATA, main
from vlp.data.augment import RandomResizedCrop, resize, to_tensor
from vlp.data.image import decode

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZE, BATCH = (224, 224), 60
SIZES = {"photos": 240, "rounds": 9}
SMALL = {"photos": 4, "rounds": 2}


def bare(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy, even where nothing is to do


def usual_pipeline() -> Callable[[bytes], torch.Tensor]:
    """What open_clip does to a training image, written with today's torchvision."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=(0.9, 1.0), interpolation=InterpolationMode.BICUBIC),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return lambda data: transform(bare(data))


def ours(scale: tuple[float, float]) -> Callable[[bytes], torch.Tensor]:
    rng, transform = np.random.default_rng(0), RandomResizedCrop(scale=scale)
    return lambda data: transform(decode(data), SIZE, "bicubic", rng)


def normalise(images: list[torch.Tensor]) -> torch.Tensor:
    """Once a batch; on a GPU this costs the CPU nothing."""
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (MEAN, STD))
    return torch.stack(images).to(torch.float32).sub_(mean).div_(std)


def pixel_difference(files: list[bytes]) -> tuple[int, float]:
    """(largest difference to PIL's crop and bicubic resize, fraction of values that differ)."""
    rng, largest, differing = np.random.default_rng(1), 0, []
    for data in files:
        pixels = decode(data)
        top, left, h, w = RandomResizedCrop().box(*pixels.shape[:2], rng)
        pil = Image.fromarray(pixels).crop((left, top, left + w, top + h)).resize(SIZE, Image.Resampling.BICUBIC)
        mine = resize(to_tensor(pixels)[:, top : top + h, left : left + w], SIZE, "bicubic").permute(1, 2, 0).numpy()
        difference = np.abs(mine.astype(int) - np.asarray(pil).astype(int))
        largest = max(largest, int(difference.max()))
        differing.append(float((difference > 0).mean()))
    return largest, statistics.mean(differing)


def measure(photos: int, rounds: int) -> dict:
    """Medians over rounds in which the variants take turns, CPU milliseconds an image, one thread."""
    torch.set_num_threads(1)
    files = [path.read_bytes() for path in sorted((DATA / "photos_500px").rglob("*.[jJ][pP]*[gG]"))[:photos]]
    variants = {
        "decode": bare,
        "pipeline": ours((0.2, 1.0)),
        "pipeline_whole": ours((0.9, 1.0)),
        "usual": usual_pipeline(),
    }
    times: dict[str, list[float]] = {name: [] for name in (*variants, "normalise")}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.process_time()
            images = [run(data) for data in files]
            times[name].append((time.process_time() - start) / len(files) * 1e3)
            if name == "pipeline":
                start = time.process_time()
                for i in range(0, len(files), BATCH):
                    normalise(images[i : i + BATCH])
                times["normalise"].append((time.process_time() - start) / len(files) * 1e3)

    def ratio(*names: str) -> float:
        return round(statistics.median(map(sum, zip(*(times[n] for n in names)))) / median["decode"], 3)

    median = {name: statistics.median(values) for name, values in times.items()}
    largest, differing = pixel_difference(files)
    return {
        "images": len(files),
        "cpu_ms_per_image": {name: round(value, 3) for name, value in median.items()},
        "ratio": ratio("pipeline"),
        "ratio_with_collate_and_normalise": ratio("pipeline", "normalise"),
        "ratio_scale_0.9": ratio("pipeline_whole"),
        "ratio_usual_scale_0.9": ratio("usual"),
        "max_difference_to_pil": largest,
        "fraction_of_values_that_differ": round(differing, 5),
    }


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
