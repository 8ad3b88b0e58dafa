"""Optimizers as frozen settings.

An optimizer keeps no state except for tensors of its parameters, so a checkpoint stores all of it by parameter name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.errors import UserError
from vlp.specs.fields import setting


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).

    The defaults are those of CLIP for its ViT models (Radford et al. 2021, tables 19 and 20) and of open_clip. With
    ``betas[1]`` of 0.98 instead of 0.999 the optimizer forgets old gradients sooner, which prevents loss spikes of large
    contrastive batches.
    """

    lr: float = setting(5e-4, least=0)
    betas: tuple[float, float] = setting((0.9, 0.98), least=0, below=1)
    eps: float = setting(1e-6, least=0)
    weight_decay: float = setting(0.2, least=0)

    def build(self, groups: list[dict]) -> torch.optim.Optimizer:
        # One pass over memory: 15 times as fast as the default on a CPU, and 3.7 times as fast as foreach.
        return torch.optim.AdamW(
            groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with momentum, and weight decay as part of the gradient, as in torch.

    ``b <- momentum * b + (g + weight_decay * w);  w -= lr * b``. The defaults are those of instance discrimination and
    MoCo for 256 images a step. Both also decay biases and norms, which have no weight decay here.

    Args:
        lr: Learning rate.
        momentum: Factor of the momentum buffer b.
        nesterov: Step by ``g + momentum * b`` instead of b.
        weight_decay: Weight decay.
    """

    lr: float = setting(0.03, least=0)
    momentum: float = setting(0.9, least=0, below=1)
    nesterov: bool = False
    weight_decay: float = setting(1e-4, least=0)

    def __post_init__(self):
        if self.momentum < 0 or self.nesterov and not self.momentum:
            raise UserError(f"momentum is {self.momentum}; use 0 or more, and more than 0 with nesterov")

    def build(self, groups: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            groups,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            fused=True,
        )


@dataclass(frozen=True)
class Lars:
    """LARS (You et al. 2017) as SimCLR uses it: `Sgd` with steps scaled to the norm of each parameter tensor.

    ``b <- momentum * b + trust ||w|| / (||g|| + weight_decay ||w||) * (g + weight_decay * w);  w -= lr * b``.
    Parameters without weight decay (biases, norms) take the steps of `Sgd`. The defaults are those of SimCLR for 4,096
    images a step, with lr 0.3 for each 256. LARS needs the norms of whole parameters, which torch's sharded tensors
    (FSDP2) compute over all processes. ZeRO, which steps on flat pieces, refuses it.
    """

    lr: float = setting(4.8, least=0)
    momentum: float = setting(0.9, least=0, below=1)
    trust: float = setting(1e-3, above=0)
    weight_decay: float = setting(1e-6, least=0)

    def build(self, groups: list[dict]) -> torch.optim.Optimizer:
        from timm.optim import Lars

        return Lars(
            groups, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, trust_coeff=self.trust, eps=0.0
        )


@dataclass(frozen=True)
class Lamb:
    """LAMB (You et al. 2020, algorithm 2). Learning rate and weight decay default to ALIGN's, the rest to the paper's.

    Args:
        lr: Learning rate.
        betas: Decay of the averages of the gradient and of its square.
        eps: Added to the root of the second moment.
        weight_decay: Weight decay.
        adapt_undecayed: Whether to scale the steps of parameters without weight decay (biases, norms, temperature,
            position embeddings) by their trust ratio too, as in algorithm 2. The authors' code does not, and neither does
            the default: a bias near 0 could hardly change.
    """

    lr: float = setting(1e-3, least=0)
    betas: tuple[float, float] = setting((0.9, 0.999), least=0, below=1)
    eps: float = setting(1e-6, least=0)
    weight_decay: float = setting(1e-5, least=0)
    adapt_undecayed: bool = False

    def build(self, groups: list[dict]) -> torch.optim.Optimizer:
        groups = [{**group, "adapt": group["decayed"] or self.adapt_undecayed} for group in groups]
        return LambOptimizer(groups, self.lr, self.betas, self.eps, self.weight_decay)


class LambOptimizer(torch.optim.Optimizer):
    """Algorithm 2 of You et al. 2020, with bias correction, phi(z) = z and no clipping of gradients or trust ratios.

    ``r = m_hat / (sqrt(v_hat) + eps) + weight_decay * w;  w -= lr * (||w|| / ||r||) * r``, with norms of each parameter
    tensor. The ratio is 1 if a norm is 0, and in groups whose ``adapt`` is False. The state of a parameter has the three
    names of torch's AdamW, so a checkpoint stores both optimizers in the same form. ``timm.optim.Lamb(max_grad_norm=None)``
    takes the same steps, but stores the step count in the group, in a form that depends on timm's version.

    LAMB needs the norms of whole parameters, see `Lars`.
    """

    def __init__(self, params, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": True})

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_one(weight, group)
        return loss

    def _step_one(self, weight: Tensor, group: dict) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU, so that reading it needs no device sync
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        mean = state["exp_avg"].lerp_(weight.grad, 1 - beta1)  # m
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(weight.grad, weight.grad, value=1 - beta2)  # v
        update = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])  # sqrt(v_hat) + eps
        update = torch.div(mean, update, out=update).div_(1 - beta1**step)  # m_hat / (sqrt(v_hat) + eps)
        update.add_(weight, alpha=group["weight_decay"])  # r
        if group["adapt"]:
            weight_norm, update_norm = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(update)
            update *= torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
        weight.add_(update, alpha=-group["lr"])
