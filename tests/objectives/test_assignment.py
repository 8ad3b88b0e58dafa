from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.objectives.fusing import pairs, tiny
from vlp.config import Data, Experiment
from vlp.encoders.fusion import Fusion
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.objectives.assignment import TextAssignment
from vlp.testing import part_of

SPEC = tiny(itm=False, mlm=False, assignment=True)
SPEC = replace(SPEC, fusion=Fusion(layers=2, images=2))


def bundle(batch=None):
    torch.manual_seed(0)
    return Forward(SPEC.build().double(), batch or pairs())


def test_loss_equals_texts_assigned_one_by_one():
    f, objective = bundle(), TextAssignment()
    torch.manual_seed(3)
    images, labels = objective.sample(f, f.scope("local"))
    rows = []
    for row, (first, second) in enumerate(images.T.tolist()):
        length = int(f.batch.attention_mask[row].sum())
        text = f.model.encode_text(
            f.batch.input_ids[row : row + 1, :length], f.batch.attention_mask[row : row + 1, :length]
        )
        shown = f.model.project(f.model.encode_image(f.batch.image[[first, second]]))
        rows.append(f.model.assign((shown[0:1], shown[1:2]), text))
    torch.manual_seed(3)
    loss = objective(f)
    torch.testing.assert_close(loss, F.cross_entropy(torch.cat(rows), labels), rtol=1e-6, atol=1e-7)
    loss.backward()
    unused = {name for name, p in f.model.named_parameters() if p.grad is None}
    # They are only used to sample images, and must be frozen.
    assert {name.partition(".")[0] for name in unused} == {"image_projection", "text_projection", "temperature"}


def test_label_is_the_position_of_the_own_image_and_others_show_another_image():
    f = bundle()
    index = f.batch.image_id
    torch.manual_seed(0)
    seen = torch.zeros(3)
    for _ in range(300):
        images, labels = TextAssignment().sample(f, f.scope("local"))
        own = images == torch.arange(8)
        assert torch.equal(own, torch.stack([labels == 0, labels == 1]))
        assert ((index[images] == index) <= own).all()  # an equal image is only shown as the own one
        assert (images[0] != images[1]).all()
        seen += labels.bincount(minlength=3)
    assert (seen / seen.sum() - 1 / 3).abs().max() < 0.03


def test_others_are_sampled_with_probability_softmax_of_cosines():
    embed = F.normalize(torch.randn(8, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(5)), dim=1)
    f = bundle()
    f = Forward(f.model, f.batch, encoded={"image": replace(f.image, embed=embed)})
    cosine = (f.image.embed[0] @ f.image.embed.T) / 0.5
    expected = cosine[1:].softmax(0)
    torch.manual_seed(0)
    counts = torch.zeros(8)
    for _ in range(4000):
        images, labels = TextAssignment(temperature=0.5, neither=0.0).sample(f, f.scope("local"))
        counts[images[1 - labels[0], 0]] += 1
    assert (counts[1:] / 4000 - expected).abs().max() < 0.025


def test_batch_of_two_always_shows_the_own_image_and_batch_of_one_shows_it_twice():
    batch = pairs()
    two = bundle(part_of(batch, slice(2, 4)))
    for _ in range(20):
        images, labels = TextAssignment().sample(two, two.scope("local"))
        assert (labels < 2).all() and (images[0] != images[1]).all()
    one = bundle(part_of(batch, slice(0, 1)))
    images, labels = TextAssignment().sample(one, one.scope("local"))
    assert images.tolist() == [[0], [0]] and labels.item() < 2 and TextAssignment()(one).isfinite()


@pytest.mark.parametrize(
    ("model", "objective", "complaint"),
    [
        (tiny(), TextAssignment(), "set model.assignment=true and model.fusion.images=2"),
        (tiny(itm=False, mlm=False, assignment=True), TextAssignment(), "model.fusion.images=2"),
    ],
)
def test_validate_names_the_missing_setting(model, objective, complaint):
    with pytest.raises(UserError, match=complaint):
        objective.validate(Experiment("x", model, {"a": objective}, Data(train=())))
