"""The profile of a training names the parts of a step and how long each takes."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.conftest import TOY, toy_overrides
from vlp.cli import main
from vlp.forward import mark_part
from vlp.training.profile import Times, marked, table, times_by_part


def event(name: str, micros: float, parent=None, kernels=()):
    return SimpleNamespace(name=name, cpu_time_total=micros, cpu_parent=parent, kernels=kernels)


def test_time_of_a_part_leaves_out_the_parts_inside_it():
    forward = event("vlp/forward", 100)
    loss = event("vlp/loss itc", 80, forward)
    block = event("aten::block", 75, loss)  # an operation between two parts
    tower = event("vlp/image", 50, block)
    parts = times_by_part([forward, loss, block, tower])
    assert {name: times.host for name, times in parts.items()} == {"forward": 20, "loss itc": 30, "image": 50}


def test_nested_events_of_one_part_count_once():
    gather = event("c10d::allgather_", 10)
    assert times_by_part([gather, event("record_param_comms", 9, gather)]) == {"communication": Times(10, 0)}


def test_kernels_belong_to_the_part_that_launched_them_and_those_of_the_autograd_thread_to_backward():
    tower = event("vlp/image", 10)
    launched = event("aten::mm", 5, tower, [SimpleNamespace(duration=7), SimpleNamespace(duration=8)])
    other_thread = event("aten::mm", 5, None, [SimpleNamespace(duration=40)])
    parts = times_by_part([tower, launched, other_thread])
    assert parts["image"].device == 15 and parts["backward"].device == 40
    lines = table([tower, launched, other_thread], 1).splitlines()
    assert lines[0].split() == ["part", "host", "ms", "device", "ms", "share"] and lines[1].startswith("backward")


def test_module_is_marked_while_it_is_profiled_only():
    layer = nn.Linear(2, 2)
    with torch.profiler.profile() as profiler:
        with marked(layer, "layer"), mark_part("forward"):
            layer(torch.ones(1, 2))
            with pytest.raises(RuntimeError):
                layer(torch.ones(1, 3))
        layer(torch.ones(1, 2))
    names = [each.name for each in profiler.events() if each.name.startswith("vlp/")]
    assert sorted(names) == ["vlp/forward", "vlp/layer", "vlp/layer"]


@pytest.mark.slow
def test_training_writes_a_trace_and_a_table(world, tmp_path):
    assert (
        main(["train", str(TOY), *toy_overrides(world, tmp_path), "name=r", "train.steps=11", "train.profile=true"])
        == 0
    )
    lines = (tmp_path / "r" / "profile" / "parts.txt").read_text().splitlines()
    parts = {line[:24].strip() for line in lines[1:-1]}
    assert {"loader", "image", "text", "loss itc", "backward", "optimizer", "averages and queues"} <= parts
    assert lines[-1] == "means of 5 steps"
    assert json.loads((tmp_path / "r" / "profile" / "trace.json").read_text())["traceEvents"]
