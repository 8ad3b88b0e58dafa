"""Instance discrimination: each image is a class, whose weight is its own embedding of an epoch ago (Wu et al. 2018).

B rows of a bundle, n samples of the data, m noise rows, E embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.config import Experiment
from vlp.forward import Forward
from vlp.losses.geometry import alignment
from vlp.losses.inputs import check_finite
from vlp.losses.nce import draw_noise, instance_softmax_loss, log_partition_sum, nce_loss
from vlp.models.base import Model
from vlp.objectives.base import Objective
from vlp.objectives.queues import MemoryBank
from vlp.objectives.requirements import require_image, require_rows
from vlp.specs.fields import setting


@dataclass(frozen=True)
class InstanceDiscrimination(Objective):
    """An image finds its own vector in the memory bank, and stays close to it (Wu et al. 2018, eq. 10).

    ``1/B sum_i [-log h(i, v_i) - sum_k log(1 - h(i, v_k)) + proximal ||f_i - v_i||^2]`` with v the rows of the bank and
    k the m noise rows. Gradient flows to f only.

    Args:
        temperature: 0.07; the published code has 0.1 for CIFAR-10.
        form: "nce", or "softmax" over the whole bank, which NCE approximates and small data can afford.
        noise: m, rows drawn evenly for each image and step.
        noise_may_be_own: An image's own row can be drawn as noise, as in the published code.
        bank_momentum: Share of the old vector that stays, 0.5 as in the published code. The paper replaces it (0).
        proximal: The paper's lambda, on the positive pair only. The published code has no such term (0).
        partition_every: Steps between estimates of Z; 0 estimates it once, from the first batch, as published.
    """

    temperature: float = setting(0.07, above=0)
    form: Literal["nce", "softmax"] = "nce"
    noise: int = setting(4096, least=1)
    noise_may_be_own: bool = False
    bank_momentum: float = setting(0.5, least=0, below=1)
    proximal: float = setting(30.0, least=0)
    partition_every: int = setting(0, least=0)

    def validate(self, experiment: Experiment) -> None:
        require_image(experiment, "InstanceDiscrimination")
        require_rows(experiment, "InstanceDiscrimination")

    def init_queue(
        self, model: Model, num_samples: int, device: torch.device, generator: torch.Generator
    ) -> MemoryBank:
        return MemoryBank(num_samples, model.embed_size, self.bank_momentum, device, generator)

    def __call__(self, f: Forward) -> Tensor:
        bank, rows, scale = f.context.queues[self].rows, f.batch.dataset_row, 1 / self.temperature
        queries = f.image.embed  # (B, E)
        if self.form == "softmax":
            loss = instance_softmax_loss(queries, bank, scale, rows)
        else:
            noise = draw_noise(rows, len(bank), self.noise, may_be_own=self.noise_may_be_own)  # (B, m)
            loss = nce_loss(queries, bank, scale, rows, noise, self._log_partition(f))
        return loss + self.proximal * alignment(queries, bank[rows]) if self.proximal else loss

    def enqueue(self, f: Forward) -> dict[str, Tensor]:
        rows = {"dataset_row": f.all.gather(lambda bundle: bundle.batch.dataset_row), "embed": f.all.image}
        if self.form == "nce" and self._estimates(f):
            rows["partition"] = self._log_partition(f).exp()
        return rows

    def _estimates(self, f: Forward) -> bool:
        """Return whether this step estimates Z."""
        every = self.partition_every
        return not f.context.queues[self].has_partition or every > 0 and f.context.step % every == 0

    def _log_partition(self, f: Forward) -> Tensor:
        """Return (1,) log Z, equal on all processes."""
        bank = f.context.queues[self]
        if not self._estimates(f):
            return bank.partition.log()
        # Every process takes part in the gather before any of them refuses Z.
        sums = f.all.gather(lambda b: log_partition_sum(b.image.embed, bank.rows, 1 / self.temperature).view(1))
        log_z = sums.logsumexp(0, keepdim=True) - math.log(len(f.all.image_id))
        return check_finite(log_z, queries=f.image.embed, bank=bank.rows)
