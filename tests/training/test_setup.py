"""What a run builds before its first step."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests import test_matrix as matrix
from vlp.errors import UserError
from vlp.training.setup import compile_blocks

FUSING = "ITC + ITM + MLM (ALBEF, VLMo)"


@pytest.mark.slow
def test_blocks_compile_without_graph_breaks_and_change_no_gradient():
    spec = matrix.experiment(matrix.ROWS_OF_TABLE[FUSING], matrix.COLUMNS["two towers, cross-attention (ALBEF)"])
    losses, gradients = matrix.take_step(spec)
    torch._dynamo.reset()
    counters.clear()
    compiled, its_gradients = matrix.take_step(spec, prepare=lambda model: compile_blocks(model, "aot_eager"))
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    for name, loss in losses.items():
        torch.testing.assert_close(compiled[name], loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(its_gradients[name], gradient)


def test_model_without_blocks_in_its_towers_is_refused():
    spec = matrix.experiment(matrix.ROWS_OF_TABLE[FUSING], matrix.COLUMNS["shared attention, experts (VLMo)"])
    with pytest.raises(UserError, match="the model has none"):
        compile_blocks(spec.build_model(load_weights=False))
