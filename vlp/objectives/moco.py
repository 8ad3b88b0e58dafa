"""MoCo: a view finds the momentum encoder's embedding of another view among a queue of older ones (He et al. 2020).

B rows of a bundle, M rows of all processes and micro-batches, K rows of the queue, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlp.config import Experiment
from vlp.distributed import broadcast_from_main, gather, rank, world_size
from vlp.errors import UserError
from vlp.forward import Bundle, Forward
from vlp.losses.softmax import info_nce
from vlp.losses.tiled import queue_info_nce
from vlp.models.base import Model
from vlp.objectives.base import Objective
from vlp.objectives.queues import Queue
from vlp.objectives.requirements import require_image_views, require_momentum
from vlp.specs.fields import setting
from vlp.types import Encoded


@dataclass(frozen=True)
class Moco(Objective):
    """InfoNCE of each query with its own key and the queue; the other keys of the batch take no part (He et al. 2020, eq. 1).

    ``-1/B sum_i log(exp(q_i . k_i / T) / (exp(q_i . k_i / T) + sum_j exp(q_i . queue_j / T)))``, q of view 0 by the
    model, k of view 1 by the momentum encoder. Gradient flows to q only. Needs ``data.views`` and ``momentum``.

    ShuffleBN: a BatchNorm that normalises query and key with the same images lets the model tell the key from older keys by its
    statistics. So the images of the whole batch are shuffled before the momentum encoder normalises them. Models without a
    BatchNorm skip it. It has no effect when the whole batch is one group.

    Args:
        temperature: T; 0.07 in v1, 0.2 in v2.
        queue_size: K, any length.
        random_start: Fill the queue with random vectors at the start, as published. Otherwise it starts empty and grows.
        duplicates: Rows of the queue that show a query's own image: "negative" keeps them, as published, "mask" excludes
            them. It matters if an epoch is not much longer than the queue. "mask" stores a (B, K) matrix.
        shuffle: Use ShuffleBN.
        groups: Parts in which a process normalises its queries and keys, as if each were one of the paper's 8 GPUs.
    """

    temperature: float = setting(0.07, above=0)
    queue_size: int = setting(65_536, least=1)
    random_start: bool = True
    duplicates: Literal["negative", "mask"] = "negative"
    shuffle: bool = True
    groups: int = setting(1, least=1)

    def validate(self, experiment: Experiment) -> None:
        require_image_views(experiment, "Moco")
        require_momentum(experiment, "Moco")
        most = experiment.micro_batch_size // 2
        if self.groups > most:
            raise UserError(f"Moco has groups={self.groups}; give 1 to {most} groups: half the rows of a micro-batch")

    def init_queue(self, model: Model, num_samples: int, device: torch.device, generator: torch.Generator) -> Queue:
        start = generator if self.random_start else None
        return Queue(self.queue_size, {"key": model.embed_size}, device, start)

    def __call__(self, f: Forward) -> Tensor:
        queries, keys, queue = self.query(f).embed, self.key(f.momentum.views[0]).embed, f.context.queues[self]
        own = torch.arange(len(queries), device=queries.device)
        diagonal = own[:, None] == own  # (B, B)
        older = torch.full_like(queue.image_id, -1)  # the only positive of a query is its own key
        if self.duplicates == "negative":
            return queue_info_nce(queries, keys, queue["key"], 1 / self.temperature, own, own, older, allowed=diagonal)
        allowed = torch.cat([diagonal, f.batch.image_id[:, None] != queue.image_id], dim=1)  # (B, B + K)
        every_key, ids = torch.cat([keys, queue["key"]]), torch.cat([own, older])
        return info_nce(queries, every_key, 1 / self.temperature, own, ids, allowed=allowed)

    def enqueue(self, f: Forward) -> dict[str, Tensor]:
        keys = f.all.momentum.views[0].gather(lambda view: self.key(view).embed)
        return {"image_id": f.all.image_id, "key": keys}

    def query(self, f: Forward) -> Encoded:
        """Encode the images of ``f``, normalised in groups."""
        if self.groups == 1 or not has_batch_norm(f.model):
            return f.image
        encode = partial(encode_in_groups, f.model.encode_image, groups=self.groups)
        return f.encode(f"image:{self.groups} groups", encode, f.batch.image)

    def key(self, view: Bundle) -> Encoded:
        """Encode the images of the momentum encoder's bundle ``view``, shuffled and normalised in groups."""
        if self.groups * world_size() == 1 or not has_batch_norm(view.model):
            return view.image
        encode = encode_shuffled if self.shuffle else encode_in_groups
        name = f"image:{self.groups} groups{', shuffled' * self.shuffle}"
        return view.encode(name, partial(encode, view.model.encode_image, groups=self.groups), view.batch.image)


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a module normalises over the batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def encode_in_groups(encode: Callable[[Tensor], Encoded], image: Tensor, groups: int) -> Encoded:
    """Encode (B, 3, H, W) images in ``groups`` parts with BatchNorm statistics of their own; keeps only the pooled token."""
    parts = [encode(part) for part in image.chunk(groups)]
    return Encoded(
        torch.cat([part.tokens[:, :1] for part in parts]),
        torch.cat([part.mask[:, :1] for part in parts]),
        torch.cat([part.embed for part in parts]),
    )


@torch.no_grad()
def encode_shuffled(encode: Callable[[Tensor], Encoded], image: Tensor, groups: int) -> Encoded:
    """Encode like `encode_in_groups`, with the images of all processes shuffled, and restore the order.

    The order is drawn from torch's generator on the main process. Every process must call this.
    """
    rows = len(image)
    own = slice(rank() * rows, (rank() + 1) * rows)
    order = torch.randperm(rows * world_size(), device=image.device)
    broadcast_from_main([order])
    encoded = encode_in_groups(encode, gather(image)[order[own]], groups)
    back = order.argsort()[own]
    return Encoded(gather(encoded.tokens)[back], gather(encoded.mask)[back], gather(encoded.embed)[back])
