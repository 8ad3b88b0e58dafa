"""VLMo on two processes: the gradients of ITC, ITM and MLM do not depend on the number of processes."""

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.models.test_vlmo import OBJECTIVES, SPEC, apart
from tests.objectives.fusing import assert_same, drawn_by_row, step
from vlp.forward import StepContext
from vlp.objectives.itc import MomentumContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.mlm import MaskedText
from vlp.train import Pretrainer


def test_two_processes_equal_one_for_every_parameter_and_loss(pair):
    expected = step(0, 1, OBJECTIVES, SPEC)
    for found in pair(step, 2, OBJECTIVES, SPEC):
        assert_same(found, expected)


def test_two_processes_equal_one_with_queues_and_a_teacher(pair):
    objectives = {
        "itc": MomentumContrast(queue_size=7, ramp_epochs=1.0),
        "itc_vl": MomentumContrast(queue_size=7, ramp_epochs=1.0, head="vl"),
        "itm": ImageTextMatching(candidates="global"),
        "mlm": MaskedText(distill=0.4, ramp_epochs=1.0),
    }
    expected = step(0, 1, objectives, SPEC)
    for found in pair(step, 2, objectives, SPEC):
        assert_same(found, expected)
    assert not torch.equal(expected[2]["itc"]["image"], expected[2]["itc_vl"]["image"])


def ddp_step(rank, spec, objectives):
    model = spec.build()
    with drawn_by_row():
        module = DistributedDataParallel(Pretrainer(model, objectives))
        for _ in range(2):  # DDP reports unused parameters in the second step
            batch = apart()
            batch.image = batch.image.float()
            module([batch], None, StepContext())[1].backward()
    return True


def test_ddp_finds_no_unused_parameter(pair):
    assert pair(ddp_step, SPEC, OBJECTIVES) == [True, True]
