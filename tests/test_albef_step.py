"""The step of ALBEF that shares and packs has the numbers of the one that does not."""

import torch

from tests.albef_reference import plain, reference_step
from tests.objectives.fusing import ROWS, StepContext, drawn_by_row, networks, pairs, queue_of
from vlp.losses.masked import IGNORED
from vlp.objectives.itc import MomentumContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.mlm import MaskedText
from vlp.train import Pretrainer

OBJECTIVES = {
    "itc": MomentumContrast(queue_size=7, keys="local", duplicates="negative"),
    "itm": ImageTextMatching(duplicates="negative"),
    "mlm": MaskedText(distill=0.4, ramp_epochs=1.0, mean_over="local"),
}


def test_losses_and_every_gradient_are_those_of_the_passes_one_by_one():
    batch = pairs()
    batch.image_id = torch.arange(ROWS)
    context = StepContext({OBJECTIVES["itc"]: queue_of(7, 5)}, progress=1.0)
    model, momentum = networks()
    with drawn_by_row():
        losses, total, (f,) = Pretrainer(model, OBJECTIVES)([batch], momentum, context)
        masked = f.masked(OBJECTIVES["mlm"].masking)
    total.backward()
    labels = torch.full_like(batch.input_ids, IGNORED)
    labels.view(-1)[masked.positions] = masked.labels
    slow, slow_momentum = (plain(network) for network in networks())
    expected = reference_step(
        slow,
        slow_momentum,
        batch,
        masked.input_ids,
        labels,
        context.queues[OBJECTIVES["itc"]],
        pick=lambda weights: weights.argmax(),
    )
    sum(expected.values()).backward()
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-9, atol=0)
    for (name, found), wanted in zip(model.named_parameters(), slow.parameters()):
        assert (found.grad - wanted.grad).norm() <= 1e-9 * wanted.grad.norm() + 1e-12, name
