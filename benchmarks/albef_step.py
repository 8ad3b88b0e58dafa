"""ALBEF's pre-training step at ViT-B/16, 256 px, BERT-base: operations, time and memory against tests/albef_reference.py.

The time is that of forward, backward, optimizer and momentum encoder; operations and memory are those of the first two.

``python -m benchmarks.albef_step``. The models are random, the captions Flickr8k's: the operations are counted by torch
(multiply-add = 2) on meta tensors, where only ids and masks are real; time and peak memory are measured at 8 pairs.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.albef_reference import plain, reference_step
from vlp.data.text import load_tokenizer
from vlp.encoders.activation_checkpointing import Checkpointing
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
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

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
THREADS, QUEUE, DECAY = 1, 65_536, 0.995
SIZES = {"model_type": "bert", "vocab_size": 30_522, "hidden_size": 768, "num_hidden_layers": 6}
SIZES |= {"num_attention_heads": 12, "intermediate_size": 3072}
OBJECTIVES = {
    "itc": MomentumContrast(queue_size=QUEUE, keys="local", duplicates="negative"),
    "itm": ImageTextMatching(duplicates="negative"),
    "mlm": MaskedText(distill=0.4, mean_over="local"),
}
PUBLISHED = {8: (2129, 647), 64: (17894, 6037)}  # GFLOP of the published code, and outside its image towers


def spec(count: int) -> Albef:
    """Eight texts are one group: split, there would be too few tokens for each reading of a weight."""
    text = BertText(config=SIZES, dropout=0.0, length_groups=1 if count == 8 else 4)
    return Albef(TimmImage("vit_base_patch16_224", image_size=256), text, Fusion(layers=6, dropout=0.0))


def captions(count: int, tokens: int) -> tuple[Tensor, Tensor, Vocabulary]:
    """(count, L) ids and mask, L about as they are long (16 for 4, 15 for 8, 21 for 64), cut so that there are exactly ``tokens``."""
    tokenizer = load_tokenizer(str(SHARED / "text" / "bert_base_uncased_vocab.txt"), False)
    rows = [json.loads(line) for line in (SHARED / "flickr8k" / "captions.jsonl").read_text().splitlines()]
    ids, mask, _ = tokenizer([row["captions"][0] for row in rows[:: len(rows) // count][:count]], 25)
    limit = {4: 16, 8: 15, 64: 21}[count]
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


def masked_of(ids: Tensor, mask: Tensor, vocabulary: Vocabulary) -> MaskedIds:
    torch.manual_seed(0)
    return TextMasking()(ids, mask, vocabulary)


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


def operations(name: str, count: int, tokens: int) -> dict:
    """GFLOP of a step, whole and outside the image towers; the weights are on meta, so nothing is computed."""
    ids, mask, vocabulary = captions(count, tokens)
    masked = masked_of(ids, mask, vocabulary)
    with torch.device("meta"):
        model, momentum = spec(count).build(), spec(count).build().requires_grad_(False)
        queue = Queue(QUEUE, {"image": 256, "text": 256}, torch.device("meta"))
        batch = Batch(torch.arange(count), torch.empty(count, 3, 256, 256), ids, mask)
    if name == "reference":
        plain(model), plain(momentum)
    queue._filled = QUEUE
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


# --- time and memory -----------------------------------------------------------------------------------------------


def prepared(name: str, how: Checkpointing = "none") -> tuple:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    ids, mask, vocabulary = captions(8, 100)
    model = spec(8).build()
    momentum = EMA(model, DECAY, "train")
    if name == "reference":
        plain(model), plain(momentum.network)
    model.set_activation_checkpointing(how)
    queue = Queue(QUEUE, {"image": 256, "text": 256}, torch.device("cpu"), torch.Generator().manual_seed(0))
    batch = Batch(torch.arange(8), torch.randn(8, 3, 256, 256), ids, mask)
    return model, momentum, batch, masked_of(ids, mask, vocabulary), queue


def run(name: str, given: tuple, bf16: bool = False) -> float:
    """CPU seconds of one forward and backward."""
    model, momentum, *rest = given
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        loss = STEPS[name](model, momentum.network, *rest)
    loss.backward()
    return time.process_time() - began


def update(name: str, given: tuple, optimizer: torch.optim.Optimizer) -> float:
    """CPU seconds of the optimizer and of the momentum encoder, whose average the reference takes as published."""
    model, momentum, *_ = given
    began = time.process_time()
    optimizer.step()
    if name == "product":
        momentum.update(model)
    else:
        for average, parameter in zip(momentum.network.parameters(), model.parameters()):
            average.data = average.data * DECAY + parameter.data * (1 - DECAY)
    return time.process_time() - began


def best_of(name: str, bf16: bool, rounds: int = 2) -> float:
    """CPU seconds of the best of ``rounds`` steps, after one for warming up."""
    given = prepared(name)
    parameters = list(given[0].parameters())
    optimizer = (
        AdamW().build([{"params": parameters}]) if name == "product" else torch.optim.AdamW(parameters, foreach=False)
    )
    taken = []
    for _ in range(rounds + 1):
        given[0].zero_grad()
        taken.append(run(name, given, bf16) + update(name, given, optimizer))
    return min(taken[1:])


def seconds() -> dict:
    """Of the reference, of ours, and of ours in bfloat16, each in a process of its own; and their ratios."""
    ways = {"reference": ("reference", False), "fp32": ("product", False), "bf16": ("product", True)}
    best = {way: in_fresh_process(best_of, *how) for way, how in ways.items()}
    ratios = {f"{way}_to_reference": round(best[way] / best["reference"], 3) for way in ("fp32", "bf16")}
    return {f"{way}_cpu_seconds": round(each, 2) for way, each in best.items()} | ratios


def peak(name: str, how: Checkpointing) -> float:
    """MiB of peak growth over the state before the step, gradients included."""
    given = prepared(name, how)
    before = resident("VmRSS")
    run(name, given)
    return round(resident("VmHWM") - before)


def resident(field: str) -> float:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024


def in_fresh_process(function, *arguments):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def memory() -> dict:
    """Peaks, and their ratios to the reference's, by train.backward and train.activation_checkpointing."""
    ways = {f"{step}_{how}": (step, how) for step in ("product", "per_loss") for how in ("none", "cheap", "full")}
    ways |= {"reference": ("reference", "none")}
    found = {way: in_fresh_process(peak, *how) for way, how in ways.items()}
    ratios = {f"{way}_to_reference": round(mib / found["reference"], 3) for way, mib in found.items()}
    return {f"{way}_mib": mib for way, mib in found.items()} | ratios


def counted() -> dict:
    """At both sizes of ../shared/reference/costs.md, beside what that says of the published code."""
    found = {}
    for count, tokens in ((8, 100), (64, 805)):
        whole, outside = PUBLISHED[count]
        published = {"gflop": whole, "gflop_outside_image_towers": outside}
        found[f"{count}_pairs"] = {name: operations(name, count, tokens) for name in COUNTED}
        found[f"{count}_pairs"] |= {"published": published}
    return found


def measure() -> dict:
    """JSON-able. Goals at 64 pairs: 14,500 and 2,500 GFLOP; time 0.75 and 0.40 of the reference's, memory 0.6 and 0.3."""
    return {"operations": counted(), "time": seconds(), "memory": memory(), "threads": THREADS}


if __name__ == "__main__":
    parts = {"operations": counted, "time": seconds, "memory": memory}
    print(json.dumps(measure() if len(sys.argv) < 2 else {name: parts[name]() for name in sys.argv[1:]}, indent=1))
