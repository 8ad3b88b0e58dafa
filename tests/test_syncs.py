"""The host waits for the device once a step, and not between the start of a micro-batch and the end of its backward pass.

tests/test_matrix.py checks the micro-batches of its objectives and models; here are the other settings of objectives, split
graphs, and whole steps.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.conftest import make_world, toy_overrides
from tests.fixtures import toy, toy_moco, toy_stages, toy_vlmo_stages
from tests.syncs import host_reads
from tests.test_matrix import COLUMNS, ROWS_OF_TABLE, batch, experiment, start
from vlp.config import Experiment, Training
from vlp.forward import Graph, StepContext
from vlp.objectives.answer import AnswerGeneration, Captioning
from vlp.objectives.assignment import TextAssignment
from vlp.objectives.cutoff import Cutoff
from vlp.objectives.itc import ImageTextContrast, MomentumContrast, SigmoidContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.masking import TextMasking
from vlp.objectives.mlm import MaskedText
from vlp.objectives.moco import Moco
from vlp.objectives.pairwise import NPair, PairContrast, Triplet, Tuplet
from vlp.optim.ema import MomentumConfig
from vlp.specs.overrides import override
from vlp.testing import SMALL_MODELS, float64, small_batches, small_model, vocabulary
from vlp.train import Attempt, Pretrainer, Trainer, single_graph
from vlp.training.detached import DetachedGraph
from vlp.training.interrupts import TrainingInterrupt
from vlp.training.run_lock import RunLock
from vlp.training.setup import set_up

CPU = torch.device("cpu")


def reads_of_micro_batch(objectives, model, momentum, batches, context, graph=single_graph) -> dict[str, int]:
    """Return the host-device syncs of a forward and a backward pass, by line."""
    attempt = Attempt(Pretrainer(model, objectives, graph))
    moved = [each.to(CPU) for each in batches]
    with host_reads() as reads:
        losses, total, _, _ = attempt(moved, momentum, context)
        total.backward()
    assert losses.keys() == objectives.keys() and total.isfinite()
    return dict(reads)


MORE = [
    AnswerGeneration(),
    Captioning(),
    Cutoff(cut="token"),
    Cutoff(cut="feature"),
    Cutoff(cut="span", copies=2),
    ImageTextContrast(tile_rows=3, label_smoothing=0.1),
    ImageTextMatching(candidates="global", keys="student"),
    ImageTextMatching(hard_share=0.5, hard_ramp_epochs=2),
    MaskedText(masking=TextMasking(unit="span")),
    MaskedText(masking=TextMasking(unit="word", capacity=0.5)),
    MomentumContrast(queue_size=9, duplicates="negative", random_start=True),
    Moco(queue_size=9, duplicates="mask"),
    NPair(),
    PairContrast(num_others=3),
    SigmoidContrast(tile_rows=3),
    TextAssignment(),
    Triplet(),
    Triplet(mining="hardest"),
    Tuplet(num_negatives=3),
]
GRAPHS = {
    "one graph": single_graph,
    "gradient caching": partial(DetachedGraph, recompute=True),
    "backward per loss": partial(DetachedGraph, per_loss=True),
}


def small_step(objective, model, batches, graph=single_graph) -> dict[str, int]:
    with float64():
        networks = []
        for _ in range(2):
            network = model.build(load_weights=False)
            network.add_heads(objective.heads())
            networks.append(network.double().train())
        student, teacher = networks[0], networks[1].requires_grad_(False)
        queue = objective.init_queue(student, 16, CPU, torch.Generator().manual_seed(2))
        context = StepContext({} if queue is None else {objective: queue}, vocabulary().to(CPU), 0.5)
        return reads_of_micro_batch({"loss": objective}, student, teacher, batches, context, graph)


@pytest.mark.parametrize("objective", MORE, ids=str)
def test_no_variant_of_an_objective_waits(objective):
    assert small_step(objective, small_model(objective), small_batches(1)) == {}


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS.keys())
@pytest.mark.parametrize("model", [SMALL_MODELS[3], SMALL_MODELS[-1]], ids=["ALBEF", "VLMo"])
@pytest.mark.parametrize(
    "objective",
    [ImageTextContrast(), ImageTextMatching(candidates="global", keys="student"), MaskedText()],
    ids=["itc", "itm", "mlm"],
)
def test_no_split_of_the_graph_waits(objective, model, graph):
    batches = small_batches(2 if graph is GRAPHS["gradient caching"] else 1)
    assert small_step(objective, model, batches, graph) == {}


def test_read_is_counted_with_its_place():
    def read(self: Graph, value: Tensor) -> Tensor:
        value.sum().item()
        return value

    spec = experiment(ROWS_OF_TABLE["ITM, hard negatives, + ITC"], COLUMNS["shared attention, experts (VLMo)"])
    model, momentum, context = start(spec)
    with patch.object(Graph, "share", read):
        reads = reads_of_micro_batch(spec.objectives, model, momentum, [batch(spec, model)], context)
    assert sum(reads.values()) == 1 and "forward.py" in next(iter(reads))
    mask = torch.tensor([True, False])
    with host_reads() as reads:
        torch.arange(2)[mask], mask.nonzero(), mask.tolist(), mask.cpu(), mask.any().item()
        torch.arange(2)[mask] = 3  # a single number needs no sync
    assert sum(reads.values()) == 5


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def toys() -> dict[str, Experiment]:
    momentum = MomentumConfig(0.9)
    albef = replace(
        toy_stages.config().stages["2-words"],
        objectives={
            "itc": MomentumContrast(queue_size=16),
            "itm": ImageTextMatching(),
            "mlm": MaskedText(distill=0.4, word_classes={"colour": ("red", "blue"), "shape": ("square", "circle")}),
        },
        momentum=momentum,
    )
    return {
        "CLIP": toy.config(),
        "ALBEF": albef,
        "VLMo": toy_vlmo_stages.config().stages["3-pairs"],
        "MoCo": toy_moco.config(),
    }


@pytest.mark.parametrize("name", ["CLIP", "ALBEF", "VLMo", "MoCo"])
def test_optimizer_step_reads_all_its_numbers_at_once(name, small_world, tmp_path):
    spec = replace(toys()[name], train=Training(steps=4, accumulation=2, threads=1))
    overrides = [
        f"data.train={small_world / 'shards'}",
        f"output={tmp_path}",
        "evaluate_every=0",
        "log.geometry_every=1",
    ]
    if spec.data.tokenizer:
        overrides = [*toy_overrides(small_world, tmp_path), *overrides[2:]]
    spec = override(spec, overrides)
    run = set_up(spec, False, RunLock(spec.folder))
    trainer, interrupted = Trainer(run), TrainingInterrupt()
    with closing(trainer.micro_batches()) as micro_batches:
        trainer.step(micro_batches, interrupted)
        with host_reads() as reads:
            record = trainer.step(micro_batches, interrupted)
    run.close(together=True)
    assert name != "ALBEF" or {"itm/accuracy_positive", "itm/accuracy_hard", "mlm/accuracy"} <= record.keys()
    scalars = run.model.scalars()
    assert [number for place, number in reads.items() if "in _read" in place] == [1]
    others = {place for place in reads if "in _read" not in place}
    assert all("in scalars" in place for place in others), reads
    assert sum(reads.values()) == 1 + len(scalars), reads
