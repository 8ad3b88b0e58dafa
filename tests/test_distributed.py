"""Two gloo processes compute what one does with the whole batch: values, and the gradient of every parameter."""

import math

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vlp.distributed import all_reduce_sum, broadcast_from_main, gather, gather_objects, gather_with_gradient
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.forward import StepContext
from vlp.models.dual import Dual
from vlp.objectives.itc import ImageTextContrast, SigmoidContrast
from vlp.testing import part_of
from vlp.train import Pretrainer
from vlp.types import Batch, Encoded

ROWS = 8
OBJECTIVES = {
    "itc-mean": ImageTextContrast(),
    "itc-sum-smoothed": ImageTextContrast(label_smoothing=0.1, reduction="sum"),
    "itc-tiled": ImageTextContrast(label_smoothing=0.1, tile_rows=3),
    "sigmoid": SigmoidContrast(),
    "sigmoid-tiled": SigmoidContrast(tile_rows=3),
}


class Linear(nn.Module):
    """The smallest dual encoder, in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(12, 5), nn.Embedding(20, 5)
        self.logit_scale, self.bias = nn.Parameter(torch.tensor([1.5])), nn.Parameter(torch.tensor([-2.0]))
        self.double()

    @property
    def scale(self):
        return self.logit_scale.exp()

    def _encoded(self, tokens):
        embed = nn.functional.normalize(tokens.mean(1), dim=-1)
        return Encoded(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), embed)

    def encode_image(self, image):
        return self._encoded(self.image(image.flatten(1))[:, None])

    def encode_text(self, input_ids, attention_mask):
        return self._encoded(self.text(input_ids))


def small_dual() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"model_type": "bert", "vocab_size": 20, "max_position_embeddings": 16}
    text = BertText(config=sizes, dropout=0.0)
    spec = Dual(image=TimmImage("test_vit", image_size=32), text=text, projection="both", temperature=0.2, bias=-2.0)
    return spec.build()


def batch_of(image_size: int, dtype: torch.dtype) -> Batch:
    torch.manual_seed(1)
    ids = torch.randint(1, 20, (ROWS, 6))
    # rows 1 and 6 show the same picture: positives of each other, on different processes
    index = torch.tensor([0, 1, 2, 3, 4, 5, 1, 7])
    return Batch(index, torch.randn(ROWS, 3, image_size, image_size, dtype=dtype), ids, torch.ones_like(ids).bool())


def gradients(rank: int, world: int, objective, real: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean of the loss over processes and the gradients that DDP leaves, for this process's part of the batch."""
    model, batch = (small_dual(), batch_of(32, torch.float32)) if real else (Linear(), batch_of(2, torch.float64))
    part = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    pretrainer = Pretrainer(model, {"loss": objective})
    # The softmax does not use the bias.
    called = DistributedDataParallel(pretrainer, find_unused_parameters=True) if world > 1 else pretrainer
    losses, total, _ = called([part_of(batch, part)], None, StepContext())
    total.backward()
    mean = all_reduce_sum([losses["loss"].item()])[0] / world
    return mean, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("real", [False, True], ids=["float64", "float32 with towers"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_of_every_parameter_is_that_of_one_process(pair, name, real):
    loss, expected = gradients(0, 1, OBJECTIVES[name], real)
    assert ("logit_scale" if not real else "temperature") in expected
    if "sigmoid" in name:
        assert ("bias" if not real else "logit_bias") in expected
    tolerance = 1e-4 if real else 1e-9
    for total, found in pair(gradients, 2, OBJECTIVES[name], real):
        assert total == pytest.approx(loss, rel=1e-6 if real else 1e-12)
        assert found.keys() == expected.keys()
        for parameter, gradient in expected.items():
            error = (found[parameter] - gradient).norm()
            # an attention key's bias has a true gradient of zero, of which rounding leaves some
            assert error <= tolerance * max(gradient.norm(), 1e-3 if real else 0), parameter


def gathered(rank: int) -> tuple:
    """Gathers x, weighs row j of rank r's copy by (10 r + j), and returns the result and the gradient."""
    x = (torch.arange(6.0).view(3, 2) + 100 * rank).requires_grad_()
    y = gather_with_gradient(x.t().contiguous().t())  # not contiguous
    (y * (10 * rank + torch.arange(6.0))[:, None]).sum().backward()
    return y.detach(), x.grad, gather(x.detach()), gather(x).requires_grad


def test_gathered_rows_are_in_the_order_of_the_processes_and_get_the_gradient_of_all(pair):
    expected = torch.cat([torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2) + 100])
    for rank, (y, gradient, plain, plain_has_gradient) in enumerate(pair(gathered)):
        assert torch.equal(y, expected) and torch.equal(plain, expected) and not plain_has_gradient
        rows = torch.arange(3.0) + 3 * rank
        assert torch.equal(gradient, (rows + (10 + rows))[:, None].expand(3, 2))


def test_one_process_gathers_itself():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_with_gradient(x) is x and gather(x) is x
    assert gather_objects("a") == ["a"] and all_reduce_sum([1.5]) == [1.5]


def agreements(rank: int) -> tuple:
    tensors = [torch.full((2,), float(rank + 5)), torch.tensor(rank)]
    broadcast_from_main(tensors)
    return (
        all_reduce_sum([1.0, math.nan if rank else 0.0, float(rank)]),
        gather_objects({"rank": rank}),
        [t.tolist() for t in tensors],
    )


def test_a_nan_of_one_process_reaches_all_and_nothing_else_does(pair):
    for sums, objects, tensors in pair(agreements):
        assert sums[0] == 2.0 and math.isnan(sums[1]) and sums[2] == 1.0
        assert objects == [{"rank": 0}, {"rank": 1}]
        assert tensors == [[5.0, 5.0], 0]
