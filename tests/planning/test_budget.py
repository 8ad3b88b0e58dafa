"""Memory and communication by engine, from sizes that are easy to add up."""

from dataclasses import replace

import pytest

from vlp.planning.budget import DEVICES, communication, memory, seconds_of_step
from vlp.planning.trace import Trace

TRACE = Trace({"image": 25}, 100, 80, 160, 100, 100, 7, 500, 550, {"image": 6e12}, {"allgather": 40})


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ("ddp", 100 + 550 + 160 + 100 + 100 + 7 + 80),  # and the buckets of the gradients
        ("zero1", 100 + 550 + 40 + 100 + 100 + 7),
        ("zero2", 100 + 20 + 500 + 40 + 100 + 100 + 7),
        ("zero3", 25 + 20 + 500 + 40 + 25 + 25 + 7),
        ("fsdp2", 25 + 20 + 500 + 40 + 25 + 25 + 7),
    ],
)
def test_each_engine_shards_its_parts(engine, expected):
    assert sum(memory(TRACE, engine, 4).values()) == expected


def test_one_device_holds_everything_and_exchanges_nothing():
    assert sum(memory(TRACE, "ddp", 1).values()) == 100 + 550 + 160 + 100 + 100 + 7
    assert communication(replace(TRACE, exchanged={}), "ddp", 1, 1) == {}


def test_bytes_of_collectives():
    assert communication(TRACE, "ddp", 4, 3) == {"gradients, all-reduce": 120, "objectives, allgather": 30}
    zero2 = communication(TRACE, "zero2", 4, 3)
    assert zero2["gradients, reduce-scatter"] == 3 * 60 and zero2["weights, all-gather"] == 75
    fsdp2 = communication(TRACE, "fsdp2", 4, 3)
    assert fsdp2["gradients, reduce-scatter"] == 3 * 60 and fsdp2["weights, all-gather"] == 3 * 150


def test_time_is_operations_at_the_share_of_the_published_figure():
    assert seconds_of_step(TRACE, DEVICES["a100"], "bf16", 0.5) == pytest.approx(6e12 / (312e12 * 0.5))
    assert seconds_of_step(TRACE, DEVICES["a100"], "fp32", 0.5) == pytest.approx(6e12 / (19.5e12 * 0.5))
