"""Contrast between sentences: SimCSE, ESimCSE and CERT.

A sentence that comes twice is a positive of itself, not a negative as in the published codes: `Batch.image_id` is a hash
of the sentence. Each process takes its own rows against the keys of all processes.

B rows of this process, M rows of all processes, K rows of a queue, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.config import Experiment
from vlp.distributed import gather, gather_with_gradient, rank
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.losses.inputs import in_float32
from vlp.losses.softmax import id_targets, soft_info_nce
from vlp.losses.tiled import queue_info_nce
from vlp.objectives.needs import need_momentum, need_text_views
from vlp.objectives.queues import Queue


@dataclass(frozen=True)
class SimCse:
    """A sentence finds its second view among those of the batch (Gao et al. 2021, eq. 1; with hard negatives eq. 5).

    ``-1/M sum_i log(exp(s(h_i, h_i+)) / sum_j (exp(s(h_i, h_j+)) + a^[i = j] exp(s(h_i, h_j-))))``, s the cosine
    divided by the temperature. Unsupervised: the one further view is ``text_views.Same()``, and dropout makes the
    difference. Supervised: the columns are a sentence, one that it entails, and one that contradicts it: the second
    further view, and any after it, is a hard negative for all rows.

    Args:
        hard_negative: log a, added to the logit of a row's own hard negative, after the division by the temperature.
    """

    weight: float = 1.0
    temperature: float = 0.05
    hard_negative: float = 0.0

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError for what is missing."""
        need_text_views(experiment, "SimCse")
        columns = min(max(1, len(getattr(source, "columns", ()))) for source in experiment.data.train)
        if self.hard_negative and columns + len(experiment.data.text_views) < 3:
            raise UserError("SimCse has hard_negative but no hard negatives; give a third column, or leave it at 0")

    def __call__(self, f: Forward) -> Tensor:
        queries, *views = (view.embed for view in f.texts)
        logits = cosines(queries, torch.cat([gather_with_gradient(view) for view in views])) / self.temperature
        index = gather(f.batch.image_id)
        rows = torch.arange(len(queries), device=index.device)
        for negatives in range(1, len(views)):
            own = negatives * len(index) + rank() * len(rows) + rows
            logits = logits.index_put((rows, own), logits.new_tensor(self.hard_negative), accumulate=True)
        # no sentence has the index -1
        ids = F.pad(index, (0, logits.shape[1] - len(index)), value=-1)
        return soft_info_nce(logits, id_targets(f.batch.image_id, ids))


@dataclass(frozen=True)
class ESimCse:
    """SimCSE with word repetition in the second view and more negatives, of a momentum encoder (Wu et al. 2022, sec. 3).

    The first further view should be `vlp.data.text_views.Repetition`; the queue holds the *original* sentences of the
    steps before, encoded by the momentum encoder, which in the paper has decay 0.995 and no dropout (mode "eval").

    Args:
        queue_size: K; the paper's best is 2.5 batches of 64. It starts empty.
        queue_head: whose head the momentum encoder's pooled states go through: its own, or, as in the published code,
            the trained model's of the moment.
    """

    weight: float = 1.0
    temperature: float = 0.05
    queue_size: int = 160
    queue_head: Literal["momentum", "student"] = "momentum"

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError for what is missing."""
        need_text_views(experiment, "ESimCse")
        need_momentum(experiment, "ESimCse")

    def init_queue(self, model, samples: int, device: torch.device, generator: torch.Generator) -> Queue:
        return Queue(self.queue_size, {"text": model.embed_size}, device)

    def __call__(self, f: Forward) -> Tensor:
        queries, positives = (view.embed for view in f.texts[:2])
        keys, queue = gather_with_gradient(positives), f.context.queues[self]
        ids = f.batch.image_id, gather(f.batch.image_id), queue.image_id
        return queue_info_nce(queries, keys, queue["text"], 1 / self.temperature, *ids)

    def enqueue(self, f: Forward) -> dict[str, Tensor]:
        taught = f.momentum.text
        embed = taught.embed
        if self.queue_head == "student":
            embed = F.normalize(f.model.head(taught.tokens[:, 0]).float(), dim=-1)
        return {"image_id": gather(f.batch.image_id), "text": gather(embed)}


@dataclass(frozen=True)
class Cert:
    """MoCo on sentences (Fang et al. 2020, sec. 3): a sentence finds its paraphrase among those of the steps before.

    The first further view is the paraphrase, the one key of its row that the momentum encoder makes; the negatives are
    the queue's alone, not the other rows of the batch (He et al. 2020, alg. 1).

    Args:
        queue_size: K; the paper takes the number of its sentences.
        random_start: fill the queue with random unit vectors at first, as the published code does; else it starts
            empty, and the loss of the first step is 0.
    """

    weight: float = 1.0
    temperature: float = 0.07
    queue_size: int = 65_536
    random_start: bool = False

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError for what is missing."""
        need_text_views(experiment, "Cert")
        need_momentum(experiment, "Cert")

    def init_queue(self, model, samples: int, device: torch.device, generator: torch.Generator) -> Queue:
        return Queue(self.queue_size, {"text": model.embed_size}, device, generator if self.random_start else None)

    def __call__(self, f: Forward) -> Tensor:
        keys, queue, index = f.momentum.views[0].text.embed, f.context.queues[self], f.batch.image_id
        own = torch.eye(len(keys), dtype=torch.bool, device=keys.device)
        scale = 1 / self.temperature
        return queue_info_nce(f.text.embed, keys, queue["text"], scale, index, index, queue.image_id, allowed=own)

    def enqueue(self, f: Forward) -> dict[str, Tensor]:
        return {"image_id": gather(f.batch.image_id), "text": gather(f.momentum.views[0].text.embed)}


@in_float32
def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(B, E) and (M, E) of unit norm to (B, M)."""
    return a @ b.T
