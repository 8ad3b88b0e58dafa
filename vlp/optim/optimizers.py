"""Optimisers as frozen settings, parameter groups that can be read, and the learning rate as a function of the step.

Nothing here holds state outside the optimizer's own per-parameter tensors: the schedule is computed from the global
step, because a prepared scheduler object steps once per process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.errors import UserError


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).

    The defaults are CLIP's for its ViT models (Radford et al. 2021, tables 19 and 20), also open_clip's. ``betas[1]``
    of 0.98 instead of 0.999 forgets old gradients sooner, which keeps large contrastive batches from loss spikes.
    """

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2

    def build(self, groups: list[dict]) -> torch.optim.Optimizer:
        # Fused is one pass over memory: 15 times as fast as the default on a CPU, 3.7 times as fast as foreach.
        return torch.optim.AdamW(
            groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with momentum, weight decay as part of the gradient (torch's form).

    ``b <- momentum * b + (g + weight_decay * w);  w -= lr * b``. The defaults are those of instance discrimination and
    MoCo for 256 pictures a step, which decay biases and norms too: here those have no weight decay.

    Args:
        nesterov: step by ``g + momentum * b`` in place of b.
    """

    lr: float = 0.03
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4

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
    """LARS (You et al. 2017) as SimCLR trains with it: `Sgd` with steps scaled to the size of each parameter tensor.

    ``b <- momentum * b + trust ||w|| / (||g|| + weight_decay ||w||) * (g + weight_decay * w);  w -= lr * b``.
    Parameters without weight decay (biases, norms) take plain steps. The defaults are SimCLR's for 4,096 pictures a
    step, lr 0.3 for each 256. Needs whole parameters: under ZeRO or FSDP the norms would be those of shards.
    """

    lr: float = 4.8
    momentum: float = 0.9
    trust: float = 1e-3
    weight_decay: float = 1e-6

    def build(self, groups: list[dict]) -> torch.optim.Optimizer:
        from timm.optim import Lars

        return Lars(
            groups, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, trust_coeff=self.trust, eps=0.0
        )


@dataclass(frozen=True)
class Lamb:
    """LAMB (You et al. 2020, algorithm 2), with ALIGN's learning rate and weight decay and the paper's other values.

    Args:
        adapt_undecayed: also scale the steps of biases, norms, temperature and embeddings that have no weight decay by
            their trust ratio, as algorithm 2 reads. The authors' code leaves them out, as is the default here: a bias
            that is almost 0 could hardly move.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 1e-5
    adapt_undecayed: bool = False

    def build(self, groups: list[dict]) -> torch.optim.Optimizer:
        groups = [{**group, "adapt": group["decayed"] or self.adapt_undecayed} for group in groups]
        return LambOptimizer(groups, self.lr, self.betas, self.eps, self.weight_decay)


class LambOptimizer(torch.optim.Optimizer):
    """Algorithm 2 of You et al. 2020, with bias correction, phi(z) = z and no clipping of gradients or trust ratios.

    ``r = m_hat / (sqrt(v_hat) + eps) + weight_decay * w;  w -= lr * (||w|| / ||r||) * r``, norms per parameter tensor.
    The ratio is 1 where a norm is 0, and in groups whose ``adapt`` is False. The per-parameter state has torch AdamW's
    three names, so a checkpoint stores both alike. ``timm.optim.Lamb(max_grad_norm=None)`` takes the same steps, but
    keeps the step count in the group, in a form that differs between timm's versions.

    Needs whole parameters: under ZeRO or FSDP the norms would be those of shards.
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
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU: reading it never waits for a device
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        mean = state["exp_avg"].lerp_(weight.grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(weight.grad, weight.grad, value=1 - beta2)
        update = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = torch.div(mean, update, out=update).div_(1 - beta1**step).add_(weight, alpha=group["weight_decay"])
        if group["adapt"]:
            weight_norm, update_norm = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(update)
            update *= torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
        weight.add_(update, alpha=-group["lr"])


# Added to every token or standing in for one, as a bias is, so weight decay would only pull them towards 0. Named as in
# timm, transformers and open_clip; a dotted component of the parameter's name must be equal. Word embeddings are not
# among them: BERT decays those.
UNDECAYED = frozenset(
    ("pos_embed", "positional_embedding", "position_embeddings")
    + ("relative_position_bias_table", "relative_attention_bias", "token_type_embeddings")
    + ("cls_token", "dist_token", "reg_token", "mask_token", "class_embedding", "cls_emb")
)
