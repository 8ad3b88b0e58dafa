"""CLIP against open_clip's own model and loss: bf16, same pairs, compile off and on, captions of 77 tokens and of real lengths.

A step is forward, loss, backward, optimizer and the bound of the scale. open_clip pads every caption to 77 tokens, whatever its
length; ours reads real ones in groups of like length.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial

import open_clip
import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.clip_flops import CONTEXT, captions
from benchmarks.gpu.timing import DEVICE, Step, flops, kernels, matmul_tflops, ratio, timed, utilisation
from benchmarks.models import TINY_CLIP, clip
from vlp.forward import StepContext
from vlp.objectives.itc import ImageTextContrast
from vlp.optim.groups import parameter_groups
from vlp.optim.optimizers import AdamW
from vlp.train import Pretrainer
from vlp.types import Batch

NAMES = ("ViT-B-16", "ViT-B-32")
BATCH = {"ViT-B-32": 1024, "ViT-B-16": 256, TINY_CLIP: 4}  # pairs
BETAS, EPS, WEIGHT_DECAY, LR = (0.9, 0.98), 1e-6, 0.2, 5e-4  # open_clip's for its ViTs
END_OF_TEXT = 49_407


def checks(small: bool) -> dict[str, Callable[[], dict]]:
    names = (TINY_CLIP,) if small else NAMES
    found = {"matrix product": lambda: {"tflops": round(peak(small), 1)}}
    # all without torch.compile come first: it takes longest
    for compiled in (False, True):
        for name in names:
            key = f"{name}, {'compiled' if compiled else 'eager'}"
            found[key] = partial(compared, name, compiled, small)
    found["kernels"] = lambda: {"model": names[0], "kernels": kernels(ours(names[0], *pairs(names[0], True)))}
    return found


@cache
def peak(small: bool) -> float:
    return matmul_tflops(small)


def compared(name: str, compiled: bool, small: bool) -> dict:
    torch.compiler.reset()  # of the models before, whose graphs count towards torch's limit
    backend = (None if not compiled else "aot_eager" if small else "inductor",)
    real, whole = pairs(name, real=True), pairs(name, real=False)
    steps = {
        "open_clip": theirs(name, *real, *backend),
        "ours, 77 tokens": ours(name, *whole, *backend),
        "ours, real lengths": ours(name, *real, *backend),
    }
    found = timed(steps, small)
    seconds = {way: each["seconds"] for way, each in found.items()}
    # the same operations whether compiled or not, counted where torch sees them all
    operations = flops(ours(name, *whole))
    return {
        "pairs": BATCH[name],
        "mean_tokens": round(float(real[2].sum()) / BATCH[name], 2),
        "ways": found,
        "times_faster_at_77": ratio(seconds["open_clip"], seconds["ours, 77 tokens"]),
        "times_faster_at_real_lengths": ratio(seconds["open_clip"], seconds["ours, real lengths"]),
        "utilisation": utilisation(operations, seconds["ours, 77 tokens"], peak(small)),
    }


def pairs(name: str, real: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Images, ids and mask, on the device: Flickr8k's captions, or as many of 77 tokens."""
    torch.manual_seed(0)
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    image = torch.randn(BATCH[name], 3, size, size)
    if real:
        ids, mask = captions(BATCH[name])
    else:
        ids = torch.randint(1000, 40_000, (BATCH[name], CONTEXT))
        ids[:, -1] = END_OF_TEXT
        mask = torch.ones_like(ids).bool()
    return image.to(DEVICE), ids.to(DEVICE), mask.to(DEVICE)


@cache
def our_model(name: str) -> nn.Module:
    return clip(name).build().to(DEVICE).to(memory_format=torch.channels_last)


@cache
def their_model(name: str) -> nn.Module:
    return open_clip.create_model(name).to(DEVICE).train()


def ours(name: str, image: Tensor, ids: Tensor, mask: Tensor, backend: str | None = None) -> Step:
    """As `vlp train` prepares the model: channels_last, both towers compiled."""
    model = copy.deepcopy(our_model(name))
    if backend:
        for tower in (model.image, model.text):
            tower.compile(backend=backend)
    optimizer = AdamW(LR, BETAS, EPS, WEIGHT_DECAY).build(parameter_groups(model, WEIGHT_DECAY))
    pretrainer = Pretrainer(model, {"itc": ImageTextContrast()})
    batch = Batch(torch.arange(len(ids), device=DEVICE), image, ids, mask)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            _, loss, _ = pretrainer([batch], None, StepContext())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_scalars()

    return step


def theirs(name: str, image: Tensor, ids: Tensor, mask: Tensor, backend: str | None = None) -> Step:
    """As open_clip's training script prepares and steps its model."""
    model = copy.deepcopy(their_model(name))
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": WEIGHT_DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    scale, loss_of = model.logit_scale, ClipLoss()
    if backend:
        model = torch.compile(model, backend=backend)
    text = F.pad(ids.masked_fill(~mask, 0), (0, CONTEXT - ids.shape[1]))

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            image_features, text_features, logit_scale = model(image, text)[:3]
            loss = loss_of(image_features, text_features, logit_scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            scale.clamp_(0, 4.6052)

    return step
