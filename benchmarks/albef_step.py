"""ALBEF's pre-training step at ViT-B/16, 256 px, BERT-base: operations, time and memory against tests/albef_reference.py.

The time is that of forward, backward, optimizer and momentum encoder; operations and memory are those of the first two.

``python -m benchmarks.albef_step``. The models are random, the captions Flickr8k's: the operations are counted by torch
(multiply-add = 2) on meta tensors, where only ids and masks are real; time and peak memory are measured at 8 pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import first_captions, in_fresh_process, main, resident_mib, text_tokenizer
from benchmarks.models import albef, tiny_albef
from tests.albef_reference import plain, reference_step
from vlp.encoders.activation_checkpointing import Checkpointing
from vlp.forward import Graph, StepContext
from vlp.losses.masked import IGNORED
from vlp.models.albef import Albef, AlbefModel
from vlp.models.base import Model
from vlp.objectives import itm
from vlp.objectives.itc import MomentumContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.masking import TextMasking
from vlp.objectives.mlm import MaskedText
from vlp.objectives.queues import Queue
from vlp.optim.ema import EMA
from vlp.optim.optimizers import AdamW
from vlp.train import Pretrainer, single_graph
from vlp.training.detached import DetachedGraph
from vlp.types import Batch, MaskedIds, Vocabulary

THREADS, DECAY = 1, 0.995
OBJECTIVES = {
    "itc": MomentumContrast(keys="local", duplicates="negative"),
    "itm": ImageTextMatching(duplicates="negative"),
    "mlm": MaskedText(distill=0.4, mean_over="local"),
}
LONGEST = {4: 16, 8: 15, 64: 21}  # tokens of so many captions
PUBLISHED = {
    (8, 100): (2129, 647),
    (64, 805): (17894, 6037),
}  # GFLOP of the published code, and outside its image towers
# counted and timed: (pairs, tokens)
SIZES = {"spec": albef(256), "queue": 65_536, "counted": ((8, 100), (64, 805)), "timed": (8, 100), "rounds": 2}
SMALL = {"spec": tiny_albef(), "queue": 16, "counted": ((4, 51),), "timed": (4, 51), "rounds": 1}


def fitted(spec: Albef, count: int) -> Albef:
    """Eight texts are one group: split, there would be too few tokens for each reading of a weight."""
    return replace(spec, text=replace(spec.text, length_groups=1 if count == 8 else 4))


def captions(count: int, tokens: int) -> tuple[Tensor, Tensor, Vocabulary]:
    """(count, L) ids and mask, L about as they are long (see `LONGEST`), cut so that there are exactly ``tokens``."""
    tokenizer, every = text_tokenizer(), first_captions()
    ids, mask, _ = tokenizer(every[:: len(every) // count][:count], 25)
    limit = LONGEST.get(count, 21)
    ids, mask = ids[:, :limit], mask[:, :limit].clone()
    lengths = mask.sum(1)
    while lengths.sum() != tokens:  # longer or shorter by a token, the longest first or the shortest
        more = lengths.sum() < tokens
        row = (
            lengths.masked_fill(lengths == limit, -1).argmax()
            if more
            else lengths.masked_fill(lengths == limit, 0).argmax()
        )
        lengths[row] += 1 if more else -1
    mask = torch.arange(limit) < lengths[:, None]
    return ids.masked_fill(~mask, 0).masked_fill(mask & (ids == 0), 2000), mask, tokenizer.vocabulary()


def masked_of(ids: Tensor, mask: Tensor, vocabulary: Vocabulary, device: str = "cpu") -> MaskedIds:
    """Drawn on the CPU, so that they are the same for every device."""
    torch.manual_seed(0)
    masked = TextMasking()(ids, mask, vocabulary)
    return MaskedIds(*(each.to(device) for each in (masked.input_ids, masked.positions, masked.labels)))


def reference_losses(model: AlbefModel, momentum: AlbefModel, batch: Batch, masked: MaskedIds, queue: Queue) -> Tensor:
    labels = torch.full_like(batch.input_ids, IGNORED, device=masked.labels.device)
    labels.view(-1)[masked.positions] = masked.labels
    return sum(reference_step(model, momentum, batch, masked.input_ids, labels, queue).values())


def product_losses(
    model: AlbefModel,
    momentum: AlbefModel,
    batch: Batch,
    masked: MaskedIds,
    queue: Queue,
    graph: Callable[[Model], Graph] = single_graph,
) -> Tensor:
    with patch.object(TextMasking, "__call__", lambda *_: masked):
        return Pretrainer(model, OBJECTIVES, graph)([batch], momentum, StepContext({OBJECTIVES["itc"]: queue}))[1]


COUNTED = ("product", "reference")  # torch's counter hooks parameters, which autograd.grad refuses
STEPS = {
    "product": product_losses,
    "per_loss": partial(product_losses, graph=partial(DetachedGraph, per_loss=True)),  # train.backward=per_loss
    "reference": reference_losses,
}


# --- operations ----------------------------------------------------------------------------------------------------


def operations(name: str, spec: Albef, queue_size: int, count: int, tokens: int) -> dict:
    """GFLOP of a step, whole and outside the image towers; the weights are on meta, so nothing is computed."""
    ids, mask, vocabulary = captions(count, tokens)
    masked = masked_of(ids, mask, vocabulary)
    with torch.device("meta"):
        model, momentum = (fitted(spec, count).build() for _ in range(2))
        queue = Queue(queue_size, {"image": 256, "text": 256}, torch.device("meta"))
        batch = Batch(torch.arange(count), torch.empty(count, 3, *model.preprocess.size), ids, mask)
    momentum.requires_grad_(False)
    if name == "reference":
        plain(model), plain(momentum)
    queue._filled = queue_size
    masked.labels = masked.labels.to("meta")
    own, index_copy, attention = torch.arange(count), Tensor.index_copy, F.scaled_dot_product_attention

    def attend(*tensors: Tensor, **named) -> Tensor:
        moved = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in named.items()}
        return attention(*(x.to("meta") if isinstance(x, Tensor) else x for x in tensors), **moved)

    with ExitStack() as stack:
        # what would look at numbers: whether losses are finite, texts are padded, and which negatives are drawn
        stack.enter_context(patch("torch.isfinite", lambda loss: True))
        stack.enter_context(patch("torch.autocast", lambda *_, **__: nullcontext()))  # which knows no meta
        stack.enter_context(patch("transformers.masking_utils._ignore_bidirectional_mask_sdpa", lambda *_: False))
        # the operations on the way that want everything on one device
        stack.enter_context(patch.object(Tensor, "index_copy", lambda x, n, i, y: index_copy(x, n, i.to(x.device), y)))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attend))
        stack.enter_context(patch.object(itm, "sample_hard_negatives", lambda *_: (torch.cat([own, own]) + 1) % count))
        stack.enter_context(patch("torch.multinomial", lambda *_: torch.zeros((), dtype=torch.long)))
        counter = stack.enter_context(FlopCounterMode(display=False))
        STEPS[name](model, momentum, batch, masked, queue).backward()
    with torch.device("meta"), FlopCounterMode(display=False) as towers:
        model.image(batch.image).sum().backward()
        momentum.image(batch.image)
    whole, inside = counter.get_total_flops() / 1e9, towers.get_total_flops() / 1e9
    return {"gflop": round(whole), "gflop_outside_image_towers": round(whole - inside)}


def all_operations(spec: Albef, queue: int, sizes: tuple[tuple[int, int], ...]) -> dict:
    """At both sizes of ../shared/reference/costs.md, beside what that says of the published code."""
    found = {}
    for count, tokens in sizes:
        found[f"{count}_pairs"] = {name: operations(name, spec, queue, count, tokens) for name in COUNTED}
        if (count, tokens) in PUBLISHED:
            published = dict(zip(("gflop", "gflop_outside_image_towers"), PUBLISHED[count, tokens]))
            found[f"{count}_pairs"] |= {"published": published}
    return found


# --- time and memory -----------------------------------------------------------------------------------------------


def built(spec: Albef, size: tuple[int, int]) -> AlbefModel:
    """The same random weights each time."""
    torch.manual_seed(0)
    return fitted(spec, size[0]).build()


def prepared(
    name: str,
    model: AlbefModel,
    queue: int,
    size: tuple[int, int],
    how: Checkpointing = "none",
    device: str = "cpu",
    fused_attention: bool = False,
) -> tuple:
    """Model, momentum encoder, batch, masked texts and queue of one way of `STEPS`.

    Args:
        model: is moved to the device and changed to run this way.
        size: pairs, and their tokens.
        fused_attention: give torch's fused attention to the reference.
    """
    torch.manual_seed(0)
    ids, mask, vocabulary = captions(*size)
    momentum = EMA(model.to(device), DECAY, "train")
    if name == "reference":
        plain(model, fused_attention), plain(momentum.network, fused_attention)
    model.set_activation_checkpointing(how)
    generator = torch.Generator().manual_seed(0)
    filled = Queue(queue, {"image": 256, "text": 256}, torch.device(device), generator)
    batch = Batch(torch.arange(len(ids)), torch.randn(len(ids), 3, *model.preprocess.size), ids, mask)
    return model, momentum, batch.to(torch.device(device)), masked_of(ids, mask, vocabulary, device), filled


def losses_of(name: str, given: tuple) -> Tensor:
    """() sum of what one way of `STEPS` makes of what was `prepared`."""
    model, momentum, *rest = given
    return STEPS[name](model, momentum.network, *rest)


def run(name: str, given: tuple, bf16: bool = False) -> float:
    """CPU seconds of one forward and backward."""
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = losses_of(name, given)
    loss.backward()
    return time.process_time() - began


def optimizer_of(name: str, model: AlbefModel) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    if name == "reference":
        return torch.optim.AdamW(parameters, foreach=False)
    return AdamW().build([{"params": parameters}])


def update(name: str, given: tuple, optimizer: torch.optim.Optimizer) -> float:
    """CPU seconds of the optimizer and of the momentum encoder, whose average the reference takes as published."""
    model, momentum, *_ = given
    began = time.process_time()
    optimizer.step()
    if name == "reference":
        for average, parameter in zip(momentum.network.parameters(), model.parameters()):
            average.data = average.data * DECAY + parameter.data * (1 - DECAY)
    else:
        momentum.update(model)
    return time.process_time() - began


def best_of(name: str, bf16: bool, rounds: int, spec: Albef, queue: int, size: tuple[int, int]) -> float:
    """CPU seconds of the best of ``rounds`` steps, after one for warming up."""
    torch.set_num_threads(THREADS)
    given = prepared(name, built(spec, size), queue, size)
    optimizer = optimizer_of(name, given[0])
    taken = []
    for _ in range(rounds + 1):
        given[0].zero_grad()
        taken.append(run(name, given, bf16) + update(name, given, optimizer))
    return min(taken[1:])


def seconds(rounds: int, *sizes) -> dict:
    """Of the reference, of ours, and of ours in bfloat16, each in a process of its own; and their ratios."""
    ways = {"reference": ("reference", False), "fp32": ("product", False), "bf16": ("product", True)}
    best = {way: in_fresh_process(best_of, *how, rounds, *sizes) for way, how in ways.items()}
    ratios = {f"{way}_to_reference": round(best[way] / best["reference"], 3) for way in ("fp32", "bf16")}
    return {f"{way}_cpu_seconds": round(each, 2) for way, each in best.items()} | ratios


def peak(name: str, how: Checkpointing, spec: Albef, queue: int, size: tuple[int, int]) -> float:
    """MiB of peak growth over the state before the step, gradients included."""
    torch.set_num_threads(THREADS)
    given = prepared(name, built(spec, size), queue, size, how)
    before = resident_mib("VmRSS")
    run(name, given)
    return max(1, round(resident_mib("VmHWM") - before))


def memory(*sizes) -> dict:
    """Peaks, and their ratios to the reference's, by train.backward and train.activation_checkpointing."""
    ways = {f"{step}_{how}": (step, how) for step in ("product", "per_loss") for how in ("none", "cheap", "full")}
    ways |= {"reference": ("reference", "none")}
    found = {way: in_fresh_process(peak, *how, *sizes) for way, how in ways.items()}
    ratios = {f"{way}_to_reference": round(mib / found["reference"], 3) for way, mib in found.items()}
    return {f"{way}_mib": mib for way, mib in found.items()} | ratios


def measure(spec: Albef, queue: int, counted: tuple[tuple[int, int], ...], timed: tuple[int, int], rounds: int) -> dict:
    """JSON-able. Goals at 64 pairs: 14,500 and 2,500 GFLOP; time 0.75 and 0.40 of the reference's, memory 0.6 and 0.3."""
    return {
        "operations": all_operations(spec, queue, counted),
        "time": seconds(rounds, spec, queue, timed),
        "memory": memory(spec, queue, timed),
        "threads": THREADS,
    }


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
