"""A traced step has the operations, the memory and the communication of a real one."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import allocated_peak
from tests import test_matrix as matrix
from vlp.config import Experiment, Training
from vlp.optim.optimizers import AdamW
from vlp.planning.trace import CPU, StepLosses, state_per_gradient, trace_step
from vlp.training.setup import configure_model, initial_state

LENGTH = 7
CELLS = [
    ("ITC, softmax (ALIGN, CLIP)", "two towers (ALIGN, CLIP)"),
    ("ITC + ITM + MLM (ALBEF, VLMo)", "two towers, cross-attention (ALBEF)"),
    ("ITC + ITM + MLM (ALBEF, VLMo)", "shared attention, experts (VLMo)"),
    ("MLM with the image, distilled", "two towers, cross-attention (ALBEF)"),
    ("MoCo", "one tower"),
    ("SimCSE", "one tower"),
]


def experiment(row: str, column: str, **train) -> Experiment:
    spec = matrix.experiment(matrix.ROWS_OF_TABLE[row], matrix.COLUMNS[column])
    return replace(spec, model=spec.model.resolved(), train=Training(steps=1, **train))


def real_step(spec: Experiment, rows: int = matrix.ROWS) -> StepLosses:
    torch.manual_seed(0)
    model = spec.build_model(load_weights=False)
    configure_model(model, spec.train)
    return StepLosses(spec, model, initial_state(spec, model, 20, CPU), rows, LENGTH)


@pytest.mark.parametrize("cell", CELLS, ids=" | ".join)
def test_operations_equal_those_of_a_real_step(cell):
    spec = experiment(*cell)
    losses = real_step(spec)
    with FlopCounterMode(display=False) as flops:
        losses().backward()
    traced = trace_step(spec, tokens=LENGTH, samples=20)
    assert sum(traced.operations.values()) == pytest.approx(flops.get_total_flops(), rel=0.01)


def measured_and_traced(cell: tuple[str, str], how: str) -> tuple[int, int]:
    spec = experiment(*cell, activation_checkpointing=how)
    spec = replace(spec, data=replace(spec.data, batch_size=64))
    losses = real_step(spec, 64)
    losses().backward()  # first calls fill caches of libraries
    losses.attempt.zero_grad()
    return allocated_peak(lambda: losses().backward()), trace_step(spec, tokens=LENGTH, samples=20).peak


@pytest.mark.parametrize("cell", CELLS, ids=" | ".join)
def test_peak_memory_is_within_ten_percent_of_what_torch_allocates(cell):
    measured, traced = measured_and_traced(cell, "none")
    assert traced == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("cell", CELLS[1:3], ids=" | ".join)
def test_peak_memory_is_not_too_small_with_full_activation_checkpointing(cell):
    stored, _ = measured_and_traced(cell, "none")
    measured, traced = measured_and_traced(cell, "full")
    assert 0.9 * measured < traced < stored


def test_weights_gradients_and_optimizer_state_are_counted_as_they_are():
    spec = experiment("ITC, momentum queues (ALBEF)", "two towers (ALIGN, CLIP)", frozen=("text.",), ema_decay=0.9)
    traced = trace_step(spec, samples=20)
    model = spec.build_model(load_weights=False)
    weights = {name: p.nbytes for name, p in model.named_parameters()}
    trained = sum(size for name, size in weights.items() if not name.startswith("text."))
    assert traced.weights == traced.momentum == traced.average == sum(weights.values())
    assert traced.gradients == trained and traced.moments == 2 * trained
    assert 4 * sum(traced.parameters.values()) == traced.weights
    assert traced.queues >= 16 * (8 + 2 * 24 * 4)  # ids, and rows of both modalities
    assert state_per_gradient(AdamW()) == 2


def test_objectives_compare_with_the_rows_of_all_processes_and_the_gathers_are_counted():
    spec = experiment("ITC, softmax (ALIGN, CLIP)", "two towers (ALIGN, CLIP)")
    spec = replace(spec, data=replace(spec.data, batch_size=8 * matrix.ROWS))
    alone = trace_step(replace(spec, data=replace(spec.data, batch_size=matrix.ROWS)))
    together = trace_step(spec, processes=8)
    assert alone.exchanged == {}
    # keys of both modalities and their ids
    assert together.exchanged["allgather"] == 8 * matrix.ROWS * (2 * 24 * 4 + 8)
    assert together.operations["image"] == alone.operations["image"]
    losses = "losses and other"
    assert together.operations[losses] == pytest.approx(8 * alone.operations[losses], rel=0.01)
    assert not torch.distributed.is_initialized()


def test_gradients_of_earlier_passes_count_when_a_step_accumulates():
    once = trace_step(experiment("ITC, softmax (ALIGN, CLIP)", "two towers (ALIGN, CLIP)"))
    spec = experiment("ITC, softmax (ALIGN, CLIP)", "two towers (ALIGN, CLIP)", accumulation=2)
    twice = trace_step(replace(spec, data=replace(spec.data, batch_size=2 * matrix.ROWS)))
    assert twice.peak == once.peak + once.gradients
    assert sum(twice.operations.values()) == 2 * sum(once.operations.values())
