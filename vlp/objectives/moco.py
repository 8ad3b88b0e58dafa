"""MoCo: a view finds the momentum encoder's embedding of another view among a queue of older ones (He et al. 2020).

B rows of this process, M rows of all processes, K rows of the queue, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlp.config import Experiment
from vlp.distributed import broadcast_from_main, gather, rank, world_size
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.losses.softmax import info_nce
from vlp.losses.tiled import queue_info_nce
from vlp.objectives.needs import need_image_views, need_momentum
from vlp.objectives.queues import Queue
from vlp.types import Encoded


@dataclass(frozen=True)
class Moco:
    """InfoNCE of each query with its own key and the queue (He et al. 2020, eq. 1); the batch's other keys take no part.

    ``-1/B sum_i log(exp(q_i . k_i / T) / (exp(q_i . k_i / T) + sum_j exp(q_i . queue_j / T)))``, q of view 0 by the
    model, k of view 1 by the momentum encoder. Gradient flows to q only. Needs ``data.views`` and ``momentum``.

    ShuffleBN: with BatchNorm, query and key that were normalised with the same pictures could be told from older keys
    by that alone. So the keys of the whole batch are dealt out anew, each of them normalised among other pictures than
    its query. It is left out for towers that have no BatchNorm, and does nothing where the whole batch is one group.

    Args:
        temperature: T; 0.07 in v1, 0.2 in v2.
        queue_size: K, of any length.
        random_start: a queue full of random vectors at the start, as published; False = it starts empty and grows.
        same_picture: "negative", as published, or "left_out": a query's own picture in the queue is no negative. It
            matters where an epoch is not much longer than the queue; then (B, K) is held.
        shuffle: ShuffleBN.
        groups: a process normalises queries and keys in so many parts, as if each were one of the paper's 8 GPUs.
    """

    weight: float = 1.0
    temperature: float = 0.07
    queue_size: int = 65_536
    random_start: bool = True
    same_picture: Literal["negative", "left_out"] = "negative"
    shuffle: bool = True
    groups: int = 1

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError for what is missing."""
        need_image_views(experiment, "Moco")
        need_momentum(experiment, "Moco")
        rows = experiment.data.batch_size // experiment.train.accumulation
        if self.queue_size < 1 or not 1 <= self.groups <= rows // 2:
            raise UserError(
                f"Moco has queue_size={self.queue_size} and groups={self.groups}; give at least 1 row, and 1 to "
                f"{rows // 2} groups: half the rows of a micro-batch"
            )

    def init_queue(self, model, samples: int, device: torch.device, generator: torch.Generator) -> Queue:
        start = generator if self.random_start else None
        return Queue(self.queue_size, {"key": model.embed_size}, device, start)

    def __call__(self, f: Forward) -> Tensor:
        queries, keys, queue = self._query(f).embed, self._key(f).embed, f.context.queues[self]
        own = torch.arange(len(queries), device=queries.device)
        diagonal = own[:, None] == own
        older = torch.full_like(queue.image_id, -1)  # positives are the own keys alone
        if self.same_picture == "negative":
            return queue_info_nce(queries, keys, queue["key"], 1 / self.temperature, own, own, older, allowed=diagonal)
        allowed = torch.cat([diagonal, f.batch.image_id[:, None] != queue.image_id], dim=1)
        every_key, ids = torch.cat([keys, queue["key"]]), torch.cat([own, older])
        return info_nce(queries, every_key, 1 / self.temperature, own, ids, allowed=allowed)

    def enqueue(self, f: Forward) -> dict[str, Tensor]:
        return {"image_id": gather(f.batch.image_id), "key": gather(self._key(f).embed)}

    def _query(self, f: Forward) -> Encoded:
        if "image" not in vars(f) and self.groups > 1 and has_batch_norm(f.model):
            f.image = in_groups(f.model.encode_image, f.batch.image, self.groups)
        return f.image

    def _key(self, f: Forward) -> Encoded:
        key = f.momentum.views[0]
        several = self.groups * world_size() > 1
        if "image" not in vars(key) and several and has_batch_norm(key.model):
            encode = shuffled if self.shuffle else in_groups
            key.image = encode(key.model.encode_image, key.batch.image, self.groups)
        return key.image


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def in_groups(encode: Callable[[Tensor], Encoded], image: Tensor, groups: int) -> Encoded:
    """``encode`` of (B, 3, H, W) in ``groups`` parts, which BatchNorm does not mix; of tokens the pooled one alone."""
    parts = [encode(part) for part in image.chunk(groups)]
    return Encoded(
        torch.cat([part.tokens[:, :1] for part in parts]),
        torch.cat([part.mask[:, :1] for part in parts]),
        torch.cat([part.embed for part in parts]),
    )


@torch.no_grad()
def shuffled(encode: Callable[[Tensor], Encoded], image: Tensor, groups: int) -> Encoded:
    """As `in_groups`, with the pictures of all processes dealt out at random, and the results in the old order.

    The order is drawn from torch's generator on the main process; every process must call this.
    """
    rows = len(image)
    own = slice(rank() * rows, (rank() + 1) * rows)
    order = torch.randperm(rows * world_size(), device=image.device)
    broadcast_from_main([order])
    encoded = in_groups(encode, gather(image)[order[own]], groups)
    back = order.argsort()[own]
    return Encoded(gather(encoded.tokens)[back], gather(encoded.mask)[back], gather(encoded.embed)[back])
