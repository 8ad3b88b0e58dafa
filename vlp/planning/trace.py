"""One training step on tensors without values: its operations, memory and communication.

The step is the forward and backward pass that `vlp.train` runs, under torch's fake tensors, which have shapes but no storage, and
with a process group whose collectives return at once. A model of any size is traced on one CPU core in seconds.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vlp.config import Experiment
from vlp.data.reading.annotated import Annotated
from vlp.forward import StepContext
from vlp.models.base import Model
from vlp.objectives.requirements import has_images, text_columns
from vlp.train import Attempt, Pretrainer, graph_of
from vlp.training.setup import configure_model, initial_state
from vlp.training.state import TrainState
from vlp.types import Answers, Batch, Vocabulary

CPU = torch.device("cpu")
ANSWERS, ANSWER_TOKENS = 2, 4  # of a question, as in VQA v2: distinct answers, and tokens of each with [CLS] and [SEP]


@dataclass(frozen=True)
class Trace:
    """Sizes of a step of one process that holds the whole model. Bytes, unless another unit is named.

    Args:
        parameters: Number of parameters by part of the model.
        weights: Weights in float32.
        gradients: Gradients of the trained weights.
        moments: Optimizer state.
        momentum: Weights of the momentum encoder.
        average: Averaged weights.
        queues: Queues and memory banks.
        activations: Peak of the forward pass, most of which its backward pass needs. With ``grad_cache`` and
            ``backward="per_loss"`` the losses are differentiated on the way, and it has gradients too.
        peak: Largest sum of gradients and activations during a step. With activation checkpointing it may be too
            large: fake tensors can keep a recomputed block until the next one has been recomputed.
        operations: Floating-point operations of a step: of the forward pass by part, and of the backward pass. Backward passes
            on the way, as with ``grad_cache``, count as those of the losses. A multiply-add counts as 2.
        exchanged: Bytes that the objectives' collectives deliver in a step, by kind.
    """

    parameters: dict[str, int]
    weights: int
    gradients: int
    moments: int
    momentum: int
    average: int
    queues: int
    activations: int
    peak: int
    operations: dict[str, float]
    exchanged: dict[str, int]


def trace_step(
    experiment: Experiment, processes: int = 1, tokens: int | None = None, samples: int = 1_000_000
) -> Trace:
    """Trace a step of a resolved experiment on the first of ``processes``.

    Args:
        tokens: Length of every text. None takes ``data.max_length``.
        samples: Samples of an epoch. A memory bank has a row for each.
    """
    train = experiment.train
    model = experiment.build_model(load_weights=False)
    configure_model(model, train)
    state = initial_state(experiment, model, samples, CPU)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(fake):
        model, state = copy.deepcopy((model, state))
    rows = experiment.micro_batch_size // processes
    flops, memory, exchanged = PartOperations(), LiveMemory(), ExchangedBytes()
    losses = StepLosses(experiment, model, state, rows, tokens or experiment.data.max_length)
    for name, child in model.named_children():
        flops.watch(child, name)
    for child in state.momentum.network.children() if state.momentum else ():
        flops.watch(child, "momentum encoder")
    with counting_group(processes), fake, memory, exchanged, flops:
        total = losses()
        activations = memory.peak
        flops.ended_forward()
        total.backward()
        flops.ended_backward()
    passes = train.backward_passes
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    networks = {"momentum": state.momentum, "average": state.average}
    return Trace(
        parameters=parameters_by_part(model),
        weights=sum(p.nbytes for p in model.parameters()),
        gradients=gradients,
        moments=int(gradients * state_per_gradient(experiment.optim)),
        **{name: sum(p.nbytes for p in ema.network.parameters()) if ema else 0 for name, ema in networks.items()},
        queues=sum(tensor.nbytes for queue in state.queues.values() for tensor in queue.tensors().values()),
        activations=activations,
        peak=memory.peak if passes == 1 else gradients + memory.peak,  # the gradients of earlier passes are there
        operations={part: float(passes * count) for part, count in flops.parts.items() if count},
        exchanged={kind: passes * size for kind, size in exchanged.bytes.items()},
    )


class StepLosses:
    """Compute the total loss of a backward pass on a batch of zeros.

    Args:
        rows: Samples of a micro-batch of the process.
        length: Tokens of each text.
    """

    def __init__(self, experiment: Experiment, model: Model, state: TrainState, rows: int, length: int):
        train = experiment.train
        queues = {experiment.objectives[name]: queue for name, queue in state.queues.items()}
        self.context = StepContext(queues, _vocabulary(model), max_text_length=length)
        self.batches = [
            _batch(experiment, model, rows, length).to(CPU) for _ in range(train.accumulation // train.backward_passes)
        ]
        self.momentum = state.momentum.network if state.momentum else None
        self.attempt = Attempt(Pretrainer(model, experiment.objectives, graph_of(train)))
        self.bf16 = train.precision == "bf16"

    def __call__(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.attempt(self.batches, self.momentum, self.context)[1]


def parameters_by_part(model: Model) -> dict[str, int]:
    """Return the number of parameters by child of the model, and of its own scalars."""
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    counts["scalars"] = sum(p.numel() for p in model.parameters(recurse=False))
    return {name: count for name, count in counts.items() if count}


class WholeStep(nullcontext):
    """Module tracker of `PartOperations`: all operations belong to the step."""

    parents = ("Global",)


class PartOperations(FlopCounterMode):
    """Count the operations of the forward pass by part, and those of the backward pass as a whole.

    torch's own attribution to modules hooks into autograd. Inputs without gradient never call its hooks, and gradients of
    detached segments (`vlp.training.detached`) do not allow them. So it is switched off.
    """

    def __init__(self):
        super().__init__(display=False)
        self.mod_tracker = WholeStep()
        self.parts: Counter[str] = Counter()
        self._begun: list[int] = []

    def watch(self, module: nn.Module, name: str) -> None:
        """Count the forward passes of a module as part ``name``. Watched modules must not contain each other."""
        module.register_forward_pre_hook(lambda *_: self._begun.append(self.get_total_flops()))
        module.register_forward_hook(lambda *_: self._end(name))

    def _end(self, name: str) -> None:
        begun = self._begun.pop()
        if "backward" not in self.parts:  # activation checkpointing runs forward passes again
            self.parts[name] += self.get_total_flops() - begun

    def ended_forward(self) -> None:
        """Count the operations until now that belong to no part as those of the losses."""
        self.parts["losses and other"] = self.get_total_flops() - self.parts.total()
        self.parts["backward"] = 0

    def ended_backward(self) -> None:
        self.parts["backward"] = self.get_total_flops() - self.parts.total()


def state_per_gradient(optim: Any) -> float:
    """Return the size of an optimizer's state, relative to the gradients, measured on a small matrix."""
    weight = nn.Parameter(torch.ones(64, 64))
    group = {"params": [weight], "names": ["weight"], "weight_decay": 0.0, "lr_scale": 1.0, "decayed": True}
    optimizer = optim.build([group])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    tensors = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor) and value.dim()]
    return sum(tensor.nbytes for tensor in tensors) / weight.nbytes


def _vocabulary(model: Model) -> Vocabulary | None:
    if model.text is None:
        return None
    special = torch.arange(model.text.vocab_size) < 5
    return Vocabulary(model.text.vocab_size, 4, special, torch.zeros_like(special)).to(CPU)


def _batch(experiment: Experiment, model: Model, rows: int, length: int) -> Batch:
    """Return a batch of the shapes that the experiment's data give. The values of the texts are real: passes group them by
    their lengths."""
    data, index = experiment.data, torch.arange(rows)

    def view() -> Batch:
        image = ids = mask = None
        if model.preprocess is not None and has_images(data):
            image = torch.zeros(()).expand(rows, 3, *model.preprocess.size)  # takes no memory
        if model.text is not None:
            ids, mask = torch.zeros(rows, length, dtype=torch.int64), torch.ones(rows, length, dtype=torch.bool)
        return Batch(index, image, ids, mask)

    annotated = [source for source in data.train if isinstance(source, Annotated)]
    images = max((len(source.image) for source in annotated), default=1) * (1 + len(data.views))
    texts = text_columns(experiment) + len(data.text_views)
    batch = replace(view(), dataset_row=index, views=tuple(view() for _ in range(max(images, texts) - 1)))
    if experiment.model.classes is not None:
        batch.labels = torch.zeros(rows, dtype=torch.int64)
    if any(source.answers for source in annotated):
        number = rows * ANSWERS
        ids = torch.zeros(number, ANSWER_TOKENS, dtype=torch.int64)
        batch.answers = Answers(ids, torch.ones_like(ids).bool(), torch.ones(number), index.repeat_interleave(ANSWERS))
    return batch


@contextmanager
def counting_group(processes: int) -> Iterator[None]:
    """Act as the first of several processes whose collectives return at once, with the shapes of their results."""
    if processes == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


class LiveMemory(TorchDispatchMode):
    """Follow the bytes of storages that operations have created and that are still referenced.

    Attributes:
        live: Bytes now.
        peak: Largest number of bytes so far.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tensors_of((args, kwargs)):  # of weights and inputs, or of tensors that it has seen
            self._known.add(tensor.untyped_storage())
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        weakref.finalize(storage, self._remove, storage.nbytes())
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _remove(self, size: int) -> None:
        self.live -= size


class ExchangedBytes(TorchDispatchMode):
    """Count the bytes that collectives deliver, by kind."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function.name().partition("::")
        if namespace in ("c10d", "_c10d_functional") and tensors_of(args):
            kind = name.strip("_").removesuffix("_base")
            # the larger of input and output: all-gathers deliver their output, reductions their input
            self.bytes[kind] += max(sum(tensor.nbytes for tensor in tensors_of(argument)) for argument in args)
        return function(*args, **(kwargs or {}))


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
