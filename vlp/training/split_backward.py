"""Each loss that fuses takes its backward pass before the next one's forward: less memory, the same gradient, nothing twice.

What several passes read - the towers' encodings, or, of a model that fuses from the first layer on, the embedded patches and
words - is cut from its graph. The losses on single modalities go first and together, then one by one those whose pass
begins at a cut (``supports_split_backward``); each leaves gradients at the parameters and at the cuts, and at the end those of the cuts
go through what was made before them. The peak is that of the largest pass instead of the sum of all, with gradients beside it:
it pays where passes of pairs are large, as VLMo's, and not where fusion is small beside the towers, as ALBEF's
(``python -m benchmarks albef_step vlmo_step``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vlp.config import Experiment
from vlp.distributed import all_reduce_sum
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.losses.inputs import NonFiniteLoss
from vlp.types import Batch, Encoded


def validate(experiment: Experiment) -> None:
    """Raises UserError where no loss could take its backward pass alone, or something else takes them apart already."""
    if experiment.train.grad_cache:
        raise UserError("train.backward=per_loss and train.grad_cache both cut the step's graph; leave one of them out")
    if not any(map(_supports_split_backward, experiment.objectives.values())):
        raise UserError(
            "train.backward=per_loss saves nothing here: no objective fuses; leave it out, or see train.activation_checkpointing"
        )


def _supports_split_backward(objective: Any) -> bool:
    return getattr(objective, "supports_split_backward", False)


class DetachedForward(Forward):
    """A bundle whose passes begin at leaves: what they share has its graph elsewhere, in ``cuts``."""

    def __init__(self, *given):
        super().__init__(*given)
        self.cuts: list[tuple[list[Tensor], list[Tensor]]] = []  # what was made together, and its leaves

    def for_view(self, batch: Batch, momentum: Forward | None) -> DetachedForward:
        other = DetachedForward(self.model, batch, momentum, self.context)
        other.cuts = self.cuts
        return other

    def encode(self, encode: Callable[..., Encoded], *given: Tensor) -> Encoded:
        if getattr(self.model, "fuses_inputs", False):
            return encode(*given, cut=self.cut)
        return self.cut(encode(*given))

    @cached_property
    def projected(self) -> Any:
        return self.cut(self.model.project(self.image))

    def cut(self, value: Any) -> Any:
        """``value``, a tensor or tensors in tuples and dataclasses, without the graph behind it."""
        made: list[Tensor] = []
        leaves: list[Tensor] = []

        def cut(part: Any) -> Any:
            if isinstance(part, Tensor) and part.requires_grad and not part.is_leaf:
                made.append(part)
                leaves.append(part.detach().requires_grad_())
                return leaves[-1]
            if isinstance(part, tuple):
                return tuple(map(cut, part))
            if is_dataclass(part):
                return replace(part, **{field.name: cut(getattr(part, field.name)) for field in fields(part)})
            return part

        whole = cut(value)
        if made:
            self.cuts.append((made, leaves))
        return whole

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for _, leaves in self.cuts for leaf in leaves]

    def losses(self, objectives: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """The losses by name, without graphs, and sum(weight * loss), whose backward pass has what theirs found.

        Raises:
            NonFiniteLoss: on all processes, if a loss of any is not finite: their backward passes talk to each other.
        """
        together = [name for name, objective in objectives.items() if not _supports_split_backward(objective)]
        groups = [together] * bool(together) + [[name] for name in objectives if name not in together]
        gradients, found = Gradients(self.model.parameters()), {}
        for group in groups:
            values, total, complaint = {}, torch.tensor(math.nan, device=self.batch.image_id.device), ""
            try:
                values = {name: objectives[name](self) for name in group}
                total = sum(objectives[name].weight * loss for name, loss in values.items())
            except NonFiniteLoss as error:
                complaint = str(error)
            if all_reduce_sum([not torch.isfinite(total)], self.batch.image_id.device)[0]:
                raise NonFiniteLoss(complaint or f"the loss of {', '.join(group)}, here or on another process,")
            found |= {name: loss.detach() for name, loss in values.items()}
            gradients.take([total], self.leaves)
        self.free_activations()
        gradients.through(self.cuts)
        ordered = {name: found[name] for name in objectives}
        return ordered, gradients.behind(sum(o.weight * ordered[name] for name, o in objectives.items()))


class Gradients:
    """What backward passes have left so far, at parameters and at leaves."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.at: dict[int, Tensor] = {}

    def take(self, outputs: Sequence[Tensor], leaves: Sequence[Tensor], given: Sequence[Tensor] | None = None) -> None:
        """A backward pass from ``outputs`` down to ``leaves`` and parameters, whose graph is gone then."""
        places = [*self.parameters, *leaves]
        with torch.autocast(outputs[0].device.type, enabled=False):
            found = torch.autograd.grad(outputs, places, given, allow_unused=True)
        for place, gradient in zip(places, found):
            if gradient is not None:
                before = self.at.get(id(place))
                self.at[id(place)] = gradient if before is None else before + gradient  # which others may hold too

    def through(self, cuts: list[tuple[list[Tensor], list[Tensor]]]) -> None:
        """From the leaves through what was cut off, the last first: it may have begun at leaves itself. Empties ``cuts``."""
        while cuts:
            made, leaves = cuts.pop()
            reached = [(m, self.at.pop(id(leaf))) for m, leaf in zip(made, leaves) if id(leaf) in self.at]
            if reached:
                outputs, given = zip(*reached)
                self.take(outputs, [leaf for _, earlier in cuts for leaf in earlier], given)

    def behind(self, loss: Tensor) -> Tensor:
        """``loss`` as one whose backward pass finds these gradients: for what hangs on parameters, DDP and ZeRO."""
        return _Found.apply(loss, [self.at.pop(id(p), None) for p in self.parameters], *self.parameters)


class _Found(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: Tensor, gradients: list[Tensor | None], *parameters: nn.Parameter) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        scaled = []
        while gradients:  # one after the other, so that no second set of them is ever there
            gradient = gradients.pop()
            scaled.append(None if gradient is None else gradient * upstream)
        return None, None, *reversed(scaled)
