import math
from dataclasses import replace

import pytest
import torch

from tests.objectives.toys import ROWS, Net, assert_two_are_one, forward_of, views
from vlp.config import Data, Experiment
from vlp.data.augment import simclr
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.models.single import Single
from vlp.objectives.simclr import SimClr


def by_the_equation(z: list[torch.Tensor], temperature: float) -> float:
    """Compute Chen et al. 2020, eq. 1. Rows i and i + B of z are two views of an image."""
    n, total = len(z), 0.0
    for i in range(n):
        j = (i + n // 2) % n
        others = [math.exp(float(z[i] @ z[k]) / temperature) for k in range(n) if k != i]
        total -= math.log(math.exp(float(z[i] @ z[j]) / temperature) / sum(others))
    return total / n


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_loss_equals_equation_1_also_with_duplicate_images(temperature):
    batch = views()
    assert len(set(batch.image_id.tolist())) == ROWS - 1
    model = Net()
    z = [row for view in (batch, *batch.views) for row in model.encode_image(view.image).embed.detach()]
    objective = SimClr(temperature=temperature)
    assert objective(forward_of(objective, batch)).item() == pytest.approx(by_the_equation(z, temperature), rel=1e-9)


def test_equal_embeddings_give_log_of_all_other_views():
    batch = views()
    batch = replace(
        batch, image=torch.zeros_like(batch.image), views=(replace(batch, image=torch.zeros_like(batch.image)),)
    )
    assert SimClr()(forward_of(SimClr(), batch)).item() == pytest.approx(math.log(2 * ROWS - 1))


def test_single_image_has_zero_loss():
    assert SimClr()(forward_of(SimClr(), views(rows=1))).item() == pytest.approx(0)


def test_both_views_share_batch_norm_statistics():
    f = forward_of(SimClr(), views(), norm=True)
    SimClr()(f)
    assert f.model.body[1].num_batches_tracked == 1


def test_two_processes_equal_one(pair):
    assert_two_are_one(pair, SimClr(temperature=0.3), SimClr(temperature=0.3))


def test_validate_names_the_missing_setting():
    experiment = Experiment("x", Single(image=TimmImage("test_vit")), {"simclr": SimClr()}, Data(train=()))
    for count in (0, 2):
        with pytest.raises(UserError, match=f"SimClr needs 1 further view of each image, not {count}"):
            SimClr().validate(replace(experiment, data=Data(train=(), views=(simclr(),) * count)))
    with pytest.raises(UserError, match="SimClr needs an image tower"):
        SimClr().validate(replace(experiment, model=Single(text=BertText(config={}))))
