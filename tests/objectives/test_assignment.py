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

SPEC = tiny(itm=False, mlm=False, assignment=True)
SPEC = replace(SPEC, fusion=Fusion(layers=2, images=2))


def bundle(batch=None):
    torch.manual_seed(0)
    return Forward(SPEC.build().double(), batch or pairs())


def test_loss_is_that_of_each_text_with_its_two_images_alone():
    f, objective = bundle(), TextAssignment()
    torch.manual_seed(3)
    images, labels = objective.draw(f)
    rows = []
    for row, (first, second) in enumerate(images.T.tolist()):
        length = int(f.batch.attention_mask[row].sum())
        text = f.model.encode_text(
            f.batch.input_ids[row : row + 1, :length], f.batch.attention_mask[row : row + 1, :length]
        )
        seen = Forward(f.model, replace(f.batch, image=f.batch.image[[first, second]]))
        seen.text = text
        rows.append(f.model.assign(seen, torch.tensor([[0], [1]])))
    torch.manual_seed(3)
    loss = objective(f)
    torch.testing.assert_close(loss, F.cross_entropy(torch.cat(rows), labels), rtol=1e-6, atol=1e-7)
    loss.backward()
    unused = {name for name, p in f.model.named_parameters() if p.grad is None}
    # they choose the images only, and are to be frozen
    assert {name.partition(".")[0] for name in unused} == {"image_projection", "text_projection", "temperature"}


def test_where_the_own_image_is_is_what_the_label_says_and_the_others_show_another_picture():
    f = bundle()
    index = f.batch.image_id
    torch.manual_seed(0)
    seen = torch.zeros(3)
    for _ in range(300):
        images, labels = TextAssignment().draw(f)
        own = images == torch.arange(8)
        assert torch.equal(own, torch.stack([labels == 0, labels == 1]))
        assert ((index[images] == index) <= own).all()  # the same picture comes as the own one alone
        assert (images[0] != images[1]).all()
        seen += labels.bincount(minlength=3)
    assert (seen / seen.sum() - 1 / 3).abs().max() < 0.03


def test_others_are_drawn_in_proportion_to_the_softmax_of_cosines():
    f = bundle()
    f.image.embed = F.normalize(
        torch.randn(8, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(5)), dim=1
    )
    cosine = (f.image.embed[0] @ f.image.embed.T) / 0.5
    expected = cosine[1:].softmax(0)
    torch.manual_seed(0)
    counts = torch.zeros(8)
    for _ in range(4000):
        images, labels = TextAssignment(temperature=0.5, none=0.0).draw(f)
        counts[images[1 - labels[0], 0]] += 1
    assert (counts[1:] / 4000 - expected).abs().max() < 0.025


def test_a_batch_of_two_always_shows_the_own_image_and_a_batch_of_one_shows_it_twice():
    batch = pairs()
    two = bundle(
        replace(batch, **{k: getattr(batch, k)[2:4] for k in ("image_id", "image", "input_ids", "attention_mask")})
    )
    for _ in range(20):
        images, labels = TextAssignment().draw(two)
        assert (labels < 2).all() and (images[0] != images[1]).all()
    one = bundle(
        replace(batch, **{k: getattr(batch, k)[:1] for k in ("image_id", "image", "input_ids", "attention_mask")})
    )
    images, labels = TextAssignment().draw(one)
    assert images.tolist() == [[0], [0]] and labels.item() < 2 and TextAssignment()(one).isfinite()


@pytest.mark.parametrize(
    ("model", "objective", "complaint"),
    [
        (tiny(), TextAssignment(), "set model.assignment=true and model.fusion.images=2"),
        (tiny(itm=False, mlm=False, assignment=True), TextAssignment(), "model.fusion.images=2"),
        (SPEC, TextAssignment(temperature=0.0), "temperature=0"),
        (SPEC, TextAssignment(none=1.5), "none=1.5"),
    ],
)
def test_what_is_missing_is_said(model, objective, complaint):
    with pytest.raises(UserError, match=complaint):
        objective.validate(Experiment("x", model, {"a": objective}, Data(train=())))
