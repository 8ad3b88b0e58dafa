"""What the contrastive objectives without queues require."""

from dataclasses import replace

import pytest

from vlp.config import Data, Experiment
from vlp.encoders.open_clip import OpenClip
from vlp.errors import UserError
from vlp.models.dual import Dual
from vlp.objectives.itc import SigmoidContrast
from vlp.testing import IMAGE, TEXT


@pytest.mark.parametrize("model", [Dual(IMAGE, TEXT), Dual(towers=OpenClip("ViT-B-32"), projection="none")])
def test_sigmoid_contrast_needs_a_learned_bias(model):
    experiment = Experiment("x", model, {}, Data(train=()))
    with pytest.raises(UserError, match="needs a model with a learned bias; set model.bias=-10"):
        SigmoidContrast().validate(experiment)
    SigmoidContrast().validate(replace(experiment, model=replace(model, bias=-10.0)))
