"""Tests for objectives of your own: is the loss the same however a batch is divided?

from vlp.testing import assert_process_invariant

def test_my_objective():
    assert_process_invariant(MyObjective(temperature=0.1))
"""

from __future__ import annotations

import atexit
import multiprocessing
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlp.config import Data, Experiment
from vlp.data.augment import Resize
from vlp.data.text_views import Same
from vlp.distributed import all_reduce_sum, world_size
from vlp.encoders.decoder import Decoder
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.mome import SMALL
from vlp.encoders.patch_targets import Pixels
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.forward import StepContext
from vlp.models.albef import Albef
from vlp.models.base import ModelSpec
from vlp.models.dual import Dual
from vlp.models.single import Single
from vlp.models.vlmo import Vlmo
from vlp.objectives.base import Objective
from vlp.optim.ema import MomentumConfig
from vlp.train import Pretrainer, single_graph
from vlp.training.detached import DetachedGraph
from vlp.types import Answers, Batch, Vocabulary

ROWS, LENGTH, WORDS, CLASSES, SIDE = 8, 9, 99, 3, 32
IMAGE = TimmImage("test_vit", image_size=SIDE, mean=(0.5,) * 3, std=(0.5,) * 3)
TEXT = BertText(
    config={
        "model_type": "bert",
        "vocab_size": WORDS,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 16,
    },
    dropout=0.0,
)
SIZES: dict[str, Any] = {"layers": 1, "heads": 2, "hidden_size": 48, "dropout": 0.0}
ALBEF = Albef(IMAGE, TEXT, Fusion(**SIZES), embed_size=16, temperature=0.2)
NO_HEADS = replace(ALBEF, itm=False, mlm=False)
MOME = replace(SMALL, width=32, heads=2, layers=2, vl_from=1, image_size=SIDE, vocab_size=WORDS, max_text_length=16)

SMALL_MODELS: tuple[ModelSpec, ...] = (
    Dual(IMAGE, TEXT, projection="both", embed_size=16, temperature=0.2, bias=-1.0),
    Single(IMAGE, head="linear", embed_size=16, classes=CLASSES, mim=Pixels()),
    Single(text=TEXT, head="linear", embed_size=16, classes=CLASSES, mlm=True),
    ALBEF,
    replace(NO_HEADS, decoder=Decoder(**SIZES, source="fusion")),
    replace(NO_HEADS, decoder=Decoder(**SIZES, source="image")),
    replace(NO_HEADS, assignment=True, fusion=Fusion(**SIZES, images=2)),
    Vlmo(MOME, embed_size=16, temperature=0.2),
)
"""Models of a few thousand parameters, tried in this order, without dropout and without BatchNorm."""


def assert_process_invariant(
    objective: Objective,
    model: ModelSpec | None = None,
    batches: Sequence[Batch] | None = None,
    draws: Callable[[], AbstractContextManager] = nullcontext,
    rtol: float = 1e-5,
    atol: float = 1e-7,
) -> None:
    """Assert that loss, gradient and queued rows do not depend on how a batch is divided.

    Two steps in one process are the reference. The same steps run on two processes, with two micro-batches under gradient
    caching, and with both. The second step reads the queue that the first one has filled. Everything is computed in float64.

    Args:
        objective: The objective. Its class must be importable, because other processes import it.
        model: Spec of a model without dropout and BatchNorm, or None for the first of `SMALL_MODELS` that the objective's
            ``validate`` accepts.
        batches: Batches of the two steps, whose number of rows is a multiple of 4, or None for `small_batches`.
        draws: Returns a context manager for the steps. Random draws differ between the divisions, so an objective that
            draws needs one that replaces its draws by a function of the rows.
        rtol: Relative tolerance.
        atol: Absolute tolerance.

    Raises:
        AssertionError: naming the division and the quantity that differs.
        UserError: if the objective accepts no small model.
    """
    model = model or small_model(objective)
    batches = batches or small_batches()
    steps = partial(run_steps, objective=objective, model=model, batches=tuple(batches), draws=draws)
    expected = steps(0, 1)
    if not any(gradient.norm() > atol for step in expected for gradient in step.gradients.values()):
        raise AssertionError(f"the loss of {type(objective).__name__} has no gradient, so nothing can be compared")
    divisions = {"two processes": two_processes()(steps, 2)}
    if objective.supports_grad_cache:
        divisions["two micro-batches under gradient caching"] = [steps(0, 1, micro_batches=2)]
        divisions["two processes with two micro-batches each"] = two_processes()(partial(steps, micro_batches=2), 2)
    for division, results in divisions.items():
        for found in results:  # of each process
            for number, (step, reference) in enumerate(zip(found, expected), start=1):
                _compare(f"{type(objective).__name__}, {division}, step {number}", step, reference, rtol, atol)


@dataclass
class StepResult:
    """What a step computes.

    Args:
        loss: Mean over processes and micro-batches.
        gradients: Mean over processes of the gradient of every parameter, zero without one, by name.
        enqueued: Rows for the objective's queue, by column.
    """

    loss: float
    gradients: dict[str, Tensor]
    enqueued: dict[str, Tensor]


def run_steps(
    rank: int,
    processes: int,
    objective: Objective,
    model: ModelSpec,
    batches: Sequence[Batch],
    draws: Callable[[], AbstractContextManager] = nullcontext,
    micro_batches: int = 1,
) -> list[StepResult]:
    """Compute one step per batch in this process, without an optimizer; the queue is updated after each.

    Args:
        rank: Number of this process.
        processes: Number of connected processes, which share each batch.
        micro_batches: Parts of each batch, contrasted with each other by gradient caching if there are several.
    """
    with float64():
        networks = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            network = model.build(load_weights=False)
            network.add_heads(objective.heads())
            networks.append(network.double().train())  # transformers builds float32 whatever the default is
        student, teacher = networks[0], networks[1].requires_grad_(False)
        queue = objective.init_queue(student, 2 * ROWS, torch.device("cpu"), torch.Generator().manual_seed(2))
        graph = partial(DetachedGraph, recompute=True) if micro_batches > 1 else single_graph
        pretrainer = Pretrainer(student, {"loss": objective}, graph)
        results = []
        for number, batch in enumerate(batches):
            context = StepContext({} if queue is None else {objective: queue}, vocabulary(), 0.5, number)
            parts = [part_of(batch, rows) for rows in divide(len(batch), micro_batches, processes, rank)]
            torch.manual_seed(3)
            with draws():
                losses, total, bundles = pretrainer(parts, teacher, context)
                total.backward()
                with torch.no_grad():
                    enqueued = {} if queue is None else objective.enqueue(bundles[-1])
            loss = all_reduce_sum([losses["loss"].item()])[0] / processes
            results.append(StepResult(loss, _mean_gradients(student), enqueued))
            student.zero_grad()
            if queue is not None:
                queue.push(**enqueued)
        return results


def _mean_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the mean over processes of each parameter's gradient, as DDP computes it."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        if world_size() > 1:
            dist.all_reduce(gradient)
        found[name] = gradient / world_size()
    return found


def divide(rows: int, micro_batches: int, processes: int, rank: int) -> list[slice]:
    """Return the rows of each micro-batch of a process. Processes share micro-batches, which follow each other in a batch."""
    size = rows // (micro_batches * processes)
    return [slice(first := (n * processes + rank) * size, first + size) for n in range(micro_batches)]


def part_of(batch: Batch, rows: slice) -> Batch:
    """Return some rows of a batch, with their views and answers."""
    tensors: dict[str, Any] = {name: x[rows] for name, x in vars(batch).items() if isinstance(x, Tensor)}
    answers = batch.answers
    if answers is not None:
        chosen = (answers.row >= rows.start) & (answers.row < rows.stop)
        parts = {name: value[chosen] for name, value in vars(answers).items()}
        answers = Answers(**parts | {"row": parts["row"] - rows.start})
    return replace(batch, **tensors, answers=answers, views=tuple(part_of(view, rows) for view in batch.views))


def small_model(objective: Objective) -> ModelSpec:
    """Return the first of `SMALL_MODELS` that the objective's ``validate`` accepts; raise its UserError if none is."""
    data = Data(train=(), views=(Resize(),), text_views=(Same(),), batch_size=ROWS)
    refused = UserError("no small model")
    for model in SMALL_MODELS:
        try:
            objective.validate(Experiment("test", model, {"loss": objective}, data, momentum=MomentumConfig()))
            return model
        except UserError as error:
            refused = error
    raise refused


def small_batches(count: int = 2) -> list[Batch]:
    """Return batches for `SMALL_MODELS`: images, captions, a further view of each, labels and answers.

    In each batch, two rows show the same image, and some images occur in both batches. Captions differ in length.
    """
    generator = torch.Generator().manual_seed(4)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    integers = partial(torch.randint, generator=generator)

    def view(image_id: Tensor, **more: Any) -> Batch:
        mask = torch.arange(LENGTH) < integers(4, LENGTH + 1, (ROWS, 1))  # (B, L)
        ids = integers(5, WORDS, (ROWS, LENGTH)).masked_fill(~mask, 0)
        return Batch(image_id, random(ROWS, 3, SIDE, SIDE), ids, mask, **more)

    batches = []
    for number in range(count):
        image_id = torch.arange(ROWS) + 100 + number * ROWS // 2
        image_id[-2] = image_id[1]
        answer_ids = integers(5, WORDS, (2 * ROWS, 4))
        answers = Answers(
            answer_ids,
            torch.ones_like(answer_ids).bool(),
            torch.rand(2 * ROWS, generator=generator, dtype=torch.float64),
            torch.arange(ROWS).repeat_interleave(2),
        )
        more = {"labels": torch.arange(ROWS) % CLASSES, "dataset_row": torch.arange(ROWS) + number * ROWS // 2}
        batches.append(view(image_id, answers=answers, views=(view(image_id),), **more))
    return batches


def vocabulary() -> Vocabulary:
    """Return the vocabulary of `small_batches`."""
    special = torch.arange(WORDS) < 5
    return Vocabulary(WORDS, 4, special, torch.zeros_like(special))


@contextmanager
def float64() -> Iterator[None]:
    """Create tensors in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _compare(where: str, found: StepResult, expected: StepResult, rtol: float, atol: float) -> None:
    def close(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and bool((a - b).norm() <= rtol * b.norm() + atol)

    if abs(found.loss - expected.loss) > rtol * abs(expected.loss) + atol:
        raise AssertionError(f"{where}: the loss is {found.loss:.8g}, on one process {expected.loss:.8g}")
    for name, gradient in expected.gradients.items():
        if not close(found.gradients[name], gradient):
            raise AssertionError(f"{where}: the gradient of {name} differs from that on one process")
    if found.enqueued.keys() != expected.enqueued.keys():
        raise AssertionError(f"{where}: enqueue returns {list(found.enqueued)}, not {list(expected.enqueued)}")
    for name, rows in expected.enqueued.items():
        if not close(found.enqueued[name].double(), rows.double()):
            raise AssertionError(f"{where}: the enqueued {name} differ from those on one process")


class ProcessPool:
    """Two connected gloo processes that stay, so that many tests can use them.

    A process that fails may leave the other one waiting for it. Then both end, and the next call starts new ones.

    Args:
        preload: Modules that the processes have imported at their start.
        timeout_seconds: Longest wait for an answer.
        grace_seconds: Longest wait for the second process after the first has failed.
    """

    def __init__(
        self,
        preload: Sequence[str] = ("vlp.testing",),
        timeout_seconds: float = 120,
        grace_seconds: float = 5,
    ):
        self.preload, self.timeout_seconds, self.grace_seconds = preload, timeout_seconds, grace_seconds
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list:
        """Return the results of ``function(rank, *arguments)`` in both processes.

        Raises:
            Exception: The first one that a process raised.
            TimeoutError: If a process does not answer and the other one did not fail.
        """
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers: dict[Connection, Any] = {}
        failure: Exception | None = None
        while len(answers) < len(self.pipes):
            waiting = [pipe for pipe in self.pipes if pipe not in answers]
            ready = wait(waiting, self.grace_seconds if failure else self.timeout_seconds)
            if not ready:
                self.close()
                raise failure or TimeoutError(f"the processes did not answer within {self.timeout_seconds:g} s")
            for pipe in [pipe for pipe in self.pipes if pipe in ready]:
                try:
                    answers[pipe] = pipe.recv()
                except EOFError:
                    self.close()
                    raise failure or RuntimeError("a process of the pool has ended") from None
                if isinstance(answers[pipe], Exception):
                    failure = failure or answers[pipe]
        if failure:
            raise failure
        return [answers[pipe] for pipe in self.pipes]

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(self.preload))
        port = free_port()
        for rank in range(2):
            ours, theirs = context.Pipe()
            self.processes.append(context.Process(target=_serve, args=(theirs, rank, port), daemon=True))
            self.processes[-1].start()
            theirs.close()  # so that the end of the process is the end of the pipe
            self.pipes.append(ours)

    def close(self) -> None:
        """End the processes. The next call starts new ones."""
        for process, pipe in zip(self.processes, self.pipes):
            process.kill()
            process.join()
            pipe.close()
        self.processes, self.pipes = [], []


@cache
def two_processes() -> ProcessPool:
    """Return the pool of this process. Its processes start on first use."""
    pool = ProcessPool()
    atexit.register(pool.close)
    return pool


def _serve(pipe: Connection, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    while True:
        function, arguments = pipe.recv()
        try:
            answer = function(rank, *arguments)
        except Exception as error:
            answer = error
        try:
            pipe.send(answer)
        except Exception as error:  # the answer cannot be pickled
            pipe.send(RuntimeError(f"{answer!r:.200} cannot be sent to the test: {error}"))


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
