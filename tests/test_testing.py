"""Every objective gives the same loss, gradient and queue however a batch is divided, and the check finds those that do not."""

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from vlp.distributed import gather, rank, world_size
from vlp.errors import UserError
from vlp.forward import Forward, Gathered
from vlp.losses.softmax import info_nce
from vlp.objectives import assignment, cutoff, instance, itm, mim
from vlp.objectives.answer import AnswerGeneration, Captioning
from vlp.objectives.assignment import TextAssignment
from vlp.objectives.barlow_twins import BarlowTwins
from vlp.objectives.base import Objective
from vlp.objectives.byol import Byol, Predictor
from vlp.objectives.classification import Classification
from vlp.objectives.cutoff import Cutoff
from vlp.objectives.dcl import Dcl
from vlp.objectives.geometry import Alignment, Uniformity
from vlp.objectives.instance import InstanceDiscrimination
from vlp.objectives.itc import ImageTextContrast, MomentumContrast, SigmoidContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.masking import TextMasking
from vlp.objectives.mim import MaskedImage
from vlp.objectives.mlm import MaskedText
from vlp.objectives.moco import Moco
from vlp.objectives.pairwise import NPair, PairContrast, Triplet, Tuplet
from vlp.objectives.sentence import Cert, ESimCse, SimCse
from vlp.objectives.simclr import SimClr
from vlp.objectives.vicreg import VicReg
from vlp.specs.names import MODULES
from vlp.testing import SMALL_MODELS, ProcessPool, assert_process_invariant, part_of, small_batches, small_model
from vlp.types import MaskedIds

pytestmark = pytest.mark.usefixtures("pair")  # the two processes of all tests
VLMO = SMALL_MODELS[-1]


@contextmanager
def draws_by_row():
    """Replace random draws by functions of the rows: the most similar candidate, tokens with even ids, the same patches."""

    def hardest(similarity: Tensor, candidates: Tensor, epsilon: float = 0.0) -> Tensor:
        return similarity.masked_fill(~candidates, -torch.inf).argmax(1)

    def mask(self, input_ids: Tensor, attention_mask: Tensor, vocabulary) -> MaskedIds:
        chosen = (input_ids % 2 == 0) & attention_mask
        positions = chosen.flatten().nonzero()[:, 0]
        return MaskedIds(input_ids.masked_fill(chosen, 3), positions, input_ids.flatten()[positions])

    def noise(rows: Tensor, num_rows: int, num_noise: int, may_be_own: bool) -> Tensor:
        return (rows[:, None] + 1 + torch.arange(num_noise)) % num_rows

    def blocks(count: int, *arguments) -> Tensor:
        return torch.tensor([[0, 3]]).expand(count, -1)

    def keep(mask: Tensor, ratio: float) -> Tensor:
        return (torch.arange(mask.shape[1]) != 2).expand(mask.shape)

    with (
        patch.object(itm, "sample_hard_negatives", hardest),
        patch.object(itm, "draw_hard", lambda similarity, share: similarity.sum(1) > 0),
        patch.object(assignment, "sample_hard_negatives", hardest),
        patch.object(TextMasking, "__call__", mask),
        patch.object(instance, "draw_noise", noise),
        patch.object(mim, "block_masks", blocks),
        patch.object(cutoff, "keep_tokens", keep),
        patch.object(cutoff, "keep_outside_span", keep),
    ):
        yield


# Moco and Byol without BatchNorm: with one, each part of a batch has statistics of its own.
OBJECTIVES = [
    Alignment(),
    Alignment(sides="image_text"),
    AnswerGeneration(distill=0.4),
    BarlowTwins(),
    Byol(Predictor(hidden_size=8, norm=False)),
    Captioning(distill=0.4),
    Cert(queue_size=9),
    Classification(distill=0.4),
    Classification(loss="bce"),
    Cutoff(cut="token"),
    Cutoff(copies=2),
    Dcl(),
    ESimCse(queue_size=9),
    ESimCse(queue_size=9, queue_head="student"),
    ImageTextContrast(label_smoothing=0.1),
    ImageTextContrast(tile_rows=3, reduction="sum"),
    ImageTextMatching(candidates="global"),
    ImageTextMatching(candidates="global", keys="student", duplicates="negative"),
    ImageTextMatching(candidates="global", negatives="uniform"),
    ImageTextMatching(candidates="global", hard_share=0.5, hard_ramp_epochs=2),
    InstanceDiscrimination(noise=4),
    InstanceDiscrimination(form="softmax"),
    MaskedImage(),
    MaskedText(),
    MaskedText(distill=0.4),
    Moco(queue_size=9),
    Moco(queue_size=9, duplicates="mask", random_start=False),
    MomentumContrast(queue_size=9),
    MomentumContrast(queue_size=9, duplicates="negative", random_start=True),
    NPair(),
    NPair(sides="texts"),
    PairContrast(num_others=3),
    SigmoidContrast(),
    SigmoidContrast(tile_rows=3),
    SimCse(),
    SimClr(),
    TextAssignment(candidates="global", neither=1.0),
    Triplet(),
    Triplet(mining="hardest", sides="image_text"),
    Tuplet(num_negatives=3),
    Uniformity(),
    Uniformity(sides="texts"),
    VicReg(),
]
ON_VLMO = [
    ImageTextContrast(head="vl"),
    MomentumContrast(queue_size=9, head="vl"),
    ImageTextMatching(candidates="global"),
    MaskedText(),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_shipped_objective_is_process_invariant(objective):
    assert_process_invariant(objective, draws=draws_by_row)


@pytest.mark.parametrize("objective", ON_VLMO, ids=str)
def test_objective_on_vlmo_is_process_invariant(objective):
    assert_process_invariant(objective, VLMO, draws=draws_by_row)


def test_every_shipped_objective_is_checked():
    shipped = {name for module, names in MODULES.items() if module.startswith("vlp.objectives.") for name in names}
    assert {type(objective).__name__ for objective in OBJECTIVES} == shipped - {"Predictor", "TextMasking"}
    assert all(objective.supports_grad_cache for objective in OBJECTIVES)


# --- an objective that somebody writes with f.all ------------------------------------------------------------------


@dataclass(frozen=True)
class ImageTextDcl(Objective):
    """Decoupled contrastive loss (Yeh et al. 2022): the positive pair is not in the denominator."""

    temperature: float = 0.1

    def __call__(self, f: Forward) -> Tensor:
        image, text = f.image.embed, f.text.embed
        i2t, t2i = image @ f.all.text.T / self.temperature, text @ f.all.image.T / self.temperature
        own = torch.zeros_like(i2t).scatter_(1, f.all.rows[:, None], 1).bool()
        loss = 0
        for logits in (i2t, t2i):
            positive = logits[own]
            negatives = logits.masked_fill(own, -torch.inf).logsumexp(1)
            loss = loss + (negatives - positive).mean() / 2
        return loss


def test_naive_objective_with_all_rows_is_process_invariant():
    assert_process_invariant(ImageTextDcl())


# --- what the check finds ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnRowsOnly(Objective):
    def __call__(self, f: Forward) -> Tensor:
        ids = torch.arange(len(f.batch))
        return info_nce(f.image.embed, f.text.embed, 10.0, ids, ids)


def test_loss_of_the_own_rows_only_is_found():
    with pytest.raises(AssertionError, match="OwnRowsOnly, two processes, step 1: the loss is .*, on one process"):
        assert_process_invariant(OwnRowsOnly())


@dataclass(frozen=True)
class GatheredByHand(Objective):
    """Gathers from processes, and not from micro-batches."""

    def __call__(self, f: Forward) -> Tensor:
        ids = gather(f.batch.image_id)
        scope = Gathered([f], 0, "global")
        return info_nce(f.image.embed, scope.gather(lambda bundle: bundle.text.embed), 10.0, f.batch.image_id, ids)


def test_loss_that_ignores_micro_batches_is_found():
    with pytest.raises(AssertionError, match="two micro-batches under gradient caching, step 1: the loss"):
        assert_process_invariant(GatheredByHand())


@dataclass(frozen=True)
class LocalGatheredByHand(GatheredByHand):
    supports_grad_cache: ClassVar[bool] = False


def test_objective_without_grad_cache_is_checked_on_two_processes_only():
    assert_process_invariant(LocalGatheredByHand())


@contextmanager
def exchanged_rows():
    """A mutant of the row arithmetic: processes and micro-batches are exchanged."""

    def rows(self: Gathered) -> Tensor:
        size = len(self.bundles[self.own].batch)
        process = rank() if self.scope == "global" else 0
        first = (process * len(self.bundles) + self.own) * size
        return torch.arange(first, first + size)

    with patch.object(Gathered, "rows", property(rows)):
        yield


@pytest.mark.parametrize("objective", [SimClr(), ImageTextDcl(), PairContrast()], ids=str)
def test_exchanged_processes_and_micro_batches_are_found(objective):
    with pytest.raises(AssertionError, match="two processes with two micro-batches each, step 1: the loss"):
        assert_process_invariant(objective, draws=exchanged_rows)


@contextmanager
def exchanged_order():
    """A mutant of the order of gathered rows: by process first."""

    def gathered(self: Gathered, rows) -> Tensor:
        parts = torch.stack([rows(bundle) for bundle in self.bundles])  # (micro-batches, B, ...)
        if self.scope == "global" and world_size() > 1:
            parts = gather(parts[None])  # (processes, micro-batches, B, ...)
        return parts.flatten(0, -rows(self.bundles[0]).dim())

    with patch.object(Gathered, "gather", gathered):
        yield


@contextmanager
def no_gradient_between_processes():
    def gathered(self: Gathered, rows) -> Tensor:
        parts = [rows(bundle) for bundle in self.bundles]
        return torch.cat([gather(part) if world_size() > 1 else part for part in parts])

    with patch.object(Gathered, "gather", gathered):
        yield


def test_missing_gradient_between_processes_is_found():
    with pytest.raises(AssertionError, match="two processes, step 1: the gradient of .* differs"):
        assert_process_invariant(ImageTextDcl(), draws=no_gradient_between_processes)


def test_wrong_order_in_the_queue_is_found():
    with pytest.raises(
        AssertionError, match="two processes with two micro-batches each, step 1: the enqueued image_id"
    ):
        assert_process_invariant(Moco(queue_size=9), draws=exchanged_order)


@pytest.mark.parametrize("objective", [MaskedText(mean_over="local"), ImageTextMatching()], ids=str)
def test_mean_over_the_own_rows_is_found(objective):
    with pytest.raises(AssertionError, match="two processes, step 1"):
        assert_process_invariant(objective, draws=draws_by_row)


@dataclass(frozen=True)
class Constant(Objective):
    def __call__(self, f: Forward) -> Tensor:
        return 0 * f.image.embed.sum()


def test_loss_without_a_gradient_is_refused():
    with pytest.raises(AssertionError, match="the loss of Constant has no gradient"):
        assert_process_invariant(Constant())


# --- the small models and batches ----------------------------------------------------------------------------------


def test_small_model_is_the_first_that_the_objective_accepts():
    assert small_model(ImageTextDcl()) is SMALL_MODELS[0]
    assert small_model(MaskedImage()).mim is not None and small_model(MaskedText()).mlm
    assert small_model(ImageTextContrast(head="vl")) is VLMO


@dataclass(frozen=True)
class Impossible(Objective):
    def validate(self, experiment) -> None:
        raise UserError("Impossible needs a model of its own")


def test_objective_that_accepts_no_small_model_says_what_it_needs():
    with pytest.raises(UserError, match="needs a model of its own"):
        small_model(Impossible())


def test_parts_of_a_batch_are_the_batch():
    (batch,) = small_batches(1)
    parts = [part_of(batch, slice(n, n + 2)) for n in range(0, 8, 2)]
    assert len(set(batch.image_id.tolist())) == 7
    assert torch.equal(torch.cat([part.views[0].image for part in parts]), batch.views[0].image)
    assert torch.equal(torch.cat([part.answers.weight for part in parts]), batch.answers.weight)
    assert torch.equal(torch.cat([part.answers.row + 2 * n for n, part in enumerate(parts)]), batch.answers.row)


# --- the pool of processes -----------------------------------------------------------------------------------------


def answer(rank: int, value):
    return rank, value


def fail_on_one(rank: int):
    """Raise on process 1, while process 0 waits in a collective for it."""
    if rank == 1:
        raise UserError("process 1 fails")
    gather(torch.zeros(1))


def fail_on_both(rank: int):
    raise UserError(f"process {rank} fails")


def end_one(rank: int):
    if rank == 1:
        os._exit(3)
    gather(torch.zeros(1))


def sleep(rank: int):
    time.sleep(60)


def unpicklable(rank: int):
    return lambda: rank


@pytest.fixture(scope="module")
def pool(fork_server):
    pool = ProcessPool(timeout_seconds=60, grace_seconds=0.5)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (fail_on_one, UserError, "process 1 fails"),
        (fail_on_both, UserError, "process [01] fails"),
        (unpicklable, RuntimeError, "cannot be sent to the test"),
    ],
)
def test_pool_raises_the_error_of_a_process_and_then_answers_the_next_call(pool, function, error, message):
    assert pool(answer, 1) == [(0, 1), (1, 1)]
    with pytest.raises(error, match=message):
        pool(function)
    assert pool(answer, 2) == [(0, 2), (1, 2)]


def test_pool_starts_again_after_a_process_has_ended(pool):
    with pytest.raises(RuntimeError, match="ended|closed"):
        pool(end_one)
    assert pool(answer, 3) == [(0, 3), (1, 3)]


def test_pool_gives_no_stale_answer_after_a_timeout(pool):
    assert pool(answer, 4) == [(0, 4), (1, 4)]
    with patch.object(pool, "timeout_seconds", 0.5), pytest.raises(TimeoutError, match="within 0.5 s"):
        pool(sleep)
    assert pool(answer, 5) == [(0, 5), (1, 5)]
