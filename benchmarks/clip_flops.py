"""Floating-point operations of a CLIP ViT-B/32 step on real captions, against text padded to 77 tokens.

``python -m benchmarks.clip_flops``. Counted by torch (multiply-add = 2) over forward and backward of both towers and
the similarities; the model is random, the captions are Flickr8k's.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import first_captions, main
from benchmarks.models import TINY_CLIP, clip
from vlp.data.text import OpenClipTokenizer

CONTEXT, THREADS = 77, 2
SIZES = {"name": "ViT-B-32", "batch_size": 64, "length_groups": 4}
SMALL = {"name": TINY_CLIP, "batch_size": 4, "length_groups": 2}


def measure(name: str, batch_size: int, length_groups: int) -> dict:
    """JSON-able: both counts, their ratio (goal: at most 0.70), and how far embeddings and gradients differ."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    ids, mask = captions(batch_size)
    model = clip(name, length_groups=length_groups).build()
    image = torch.randn(batch_size, 3, *model.preprocess.size)
    whole = F.pad(ids, (0, CONTEXT - ids.shape[1])), F.pad(mask, (0, CONTEXT - mask.shape[1]))
    grouped = step(model, image, ids, mask)
    model.text.length_groups = 1
    longest, padded = step(model, image, ids, mask), step(model, image, *whole)
    gradients = list(zip(grouped["gradients"], padded["gradients"]))
    return {
        "model": name,
        "batch_size": batch_size,
        "length_groups": length_groups,
        "mean_tokens": mask.sum().item() / batch_size,
        "longest_tokens": ids.shape[1],
        "padded_flops": padded["flops"],
        "padded_to_longest_flops": longest["flops"],
        "grouped_flops": grouped["flops"],
        "ratio": grouped["flops"] / padded["flops"],
        "ratio_padded_to_longest": longest["flops"] / padded["flops"],
        "max_embed_difference": (grouped["embed"] - padded["embed"]).abs().max().item(),
        "max_relative_gradient_difference": max(((a - b).norm() / b.norm()).item() for a, b in gradients),
    }


def captions(count: int) -> tuple[Tensor, Tensor]:
    """(count, L) ids and mask of the first caption of ``count`` pictures, spread over the training split."""
    train = first_captions("train")
    ids, mask, _ = OpenClipTokenizer("ViT-B-32")(train[:: len(train) // count][:count], CONTEXT)
    return ids, mask


def step(model, image: Tensor, ids: Tensor, mask: Tensor) -> dict:
    model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        seen, read = model.encode_image(image).embed, model.encode_text(ids, mask).embed
        logits = seen @ read.T * model.scale
        target = torch.arange(len(logits))
        (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    return {"flops": counter.get_total_flops(), "embed": read.detach(), "gradients": gradients}


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
