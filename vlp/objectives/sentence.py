"""Contrast between sentences: SimCSE, ESimCSE and CERT.

A sentence that occurs twice is a positive of itself, not a negative as in the published codes: `Batch.image_id` of a text is a
hash of the sentence. Each process compares its own rows with the keys of all processes.

B rows of a bundle, M rows of all processes and micro-batches, K rows of a queue, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.config import Experiment
from vlp.errors import UserError
from vlp.forward import Bundle, Forward
from vlp.losses.inputs import in_float32
from vlp.losses.softmax import id_targets, soft_info_nce
from vlp.losses.tiled import queue_info_nce
from vlp.models.base import Model
from vlp.objectives.base import Objective
from vlp.objectives.queues import Queue
from vlp.objectives.requirements import require_momentum, require_text_views, text_columns
from vlp.specs.fields import setting


@dataclass(frozen=True)
class SimCse(Objective):
    """A sentence finds its second view among those of the batch (Gao et al. 2021, eq. 1; with hard negatives eq. 5).

    ``-1/M sum_i log(exp(s(h_i, h_i+)) / sum_j (exp(s(h_i, h_j+)) + a^[i = j] exp(s(h_i, h_j-))))``, s the cosine divided by
    the temperature. Unsupervised: the only further view is ``text_views.Same()``, and dropout makes the views differ.
    Supervised: the columns are a sentence, one that it entails, and one that contradicts it. The second further view, and any
    after it, is a hard negative for all rows.

    Args:
        hard_negative: log a, added to the logit of a row's own hard negative after the division by the temperature.
    """

    min_rows: ClassVar[int] = 2

    temperature: float = setting(0.05, above=0)
    hard_negative: float = 0.0

    def validate(self, experiment: Experiment) -> None:
        require_text_views(experiment, "SimCse")
        if self.hard_negative and text_columns(experiment) + len(experiment.data.text_views) < 3:
            raise UserError("SimCse has hard_negative but no hard negatives; give a third column, or leave it at 0")

    def __call__(self, f: Forward) -> Tensor:
        queries, total = f.text_views[0].embed, len(f.all.image_id)
        # (M, keys, E): the second view, and the hard negatives
        keys = f.all.gather(lambda bundle: torch.stack([view.embed for view in bundle.text_views[1:]], dim=1))
        logits = cosines(queries, keys.transpose(0, 1).flatten(0, 1)) / self.temperature  # (B, keys * M)
        rows = torch.arange(len(queries), device=logits.device)
        for negatives in range(1, keys.shape[1]):
            own = (rows, negatives * total + f.all.rows)
            logits = logits.index_put(own, logits.new_full((), self.hard_negative), accumulate=True)
        ids = F.pad(f.all.image_id, (0, logits.shape[1] - total), value=-1)  # no sentence has the id -1
        return soft_info_nce(logits, id_targets(f.batch.image_id, ids))


@dataclass(frozen=True)
class ESimCse(Objective):
    """SimCSE with word repetition in the second view and queued negatives of a momentum encoder (Wu et al. 2022, sec. 3).

    The first further view should be `vlp.data.text_views.Repetition`. The queue contains the *original* sentences of earlier
    steps, encoded by the momentum encoder, which has decay 0.995 and no dropout (mode "eval") in the paper.

    Args:
        queue_size: K; the paper's best is 2.5 batches of 64. It starts empty.
        queue_head: Head that projects the momentum encoder's pooled states: its own ("momentum"), or, as in the published
            code, that of the trained model ("student").
    """

    temperature: float = setting(0.05, above=0)
    queue_size: int = setting(160, least=1)
    queue_head: Literal["momentum", "student"] = "momentum"

    def validate(self, experiment: Experiment) -> None:
        require_text_views(experiment, "ESimCse")
        require_momentum(experiment, "ESimCse")

    def init_queue(self, model: Model, num_samples: int, device: torch.device, generator: torch.Generator) -> Queue:
        return Queue(self.queue_size, {"text": model.embed_size}, device)

    def __call__(self, f: Forward) -> Tensor:
        queries, queue = f.text_views[0].embed, f.context.queues[self]
        keys = f.all.gather(lambda bundle: bundle.text_views[1].embed)  # (M, E)
        ids = f.batch.image_id, f.all.image_id, queue.image_id
        return queue_info_nce(queries, keys, queue["text"], 1 / self.temperature, *ids)

    def enqueue(self, f: Forward) -> dict[str, Tensor]:
        return {"image_id": f.all.image_id, "text": f.all.gather(self._embed)}

    def _embed(self, f: Bundle) -> Tensor:
        if self.queue_head == "momentum":
            return f.momentum.text.embed
        return f.model.embed_text(f.momentum.text.tokens[:, 0])


@dataclass(frozen=True)
class Cert(Objective):
    """MoCo on sentences: a sentence finds its paraphrase among those of earlier steps (Fang et al. 2020, sec. 3).

    The first further view is the paraphrase, which the momentum encoder encodes as the key of its row. The negatives are only
    those in the queue, not the other rows of the batch (He et al. 2020, alg. 1).

    Args:
        queue_size: K; the paper takes the number of its sentences.
        random_start: Fill the queue with random unit vectors at the start, as the published code does. Otherwise it starts
            empty, and the loss of the first step is 0.
    """

    temperature: float = setting(0.07, above=0)
    queue_size: int = setting(65_536, least=1)
    random_start: bool = False

    def validate(self, experiment: Experiment) -> None:
        require_text_views(experiment, "Cert")
        require_momentum(experiment, "Cert")

    def init_queue(self, model: Model, num_samples: int, device: torch.device, generator: torch.Generator) -> Queue:
        return Queue(self.queue_size, {"text": model.embed_size}, device, generator if self.random_start else None)

    def __call__(self, f: Forward) -> Tensor:
        keys, queue, ids = f.momentum.views[0].text.embed, f.context.queues[self], f.batch.image_id
        own = torch.eye(len(keys), dtype=torch.bool, device=keys.device)
        scale = 1 / self.temperature
        return queue_info_nce(f.text.embed, keys, queue["text"], scale, ids, ids, queue.image_id, allowed=own)

    def enqueue(self, f: Forward) -> dict[str, Tensor]:
        return {"image_id": f.all.image_id, "text": f.all.momentum.views[0].text}


@in_float32
def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Compute (B, M) cosines of (B, E) and (M, E) embeddings of unit norm."""
    return a @ b.T
