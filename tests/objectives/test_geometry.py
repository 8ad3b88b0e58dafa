from dataclasses import replace

import pytest
import torch

from tests.objectives.toys import Net, assert_two_are_one, forward_of, views
from vlp.config import Data, Experiment
from vlp.data.augment import simclr
from vlp.data.reading.sentences import Sentences
from vlp.data.text_views import Same
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.models.dual import Dual
from vlp.models.single import Single
from vlp.objectives.geometry import Alignment, Uniformity, sides_of
from vlp.types import Encoded

SIDES = ("image_text", "images", "texts")


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_alignment_equals_equation_2_on_the_first_two_views(sides, alpha):
    f = forward_of(Alignment(), views(others=2))
    x, y = (side.embed for side in sides_of(f, sides))
    expected = sum((a - b).norm() ** alpha for a, b in zip(x, y)) / len(x)
    assert Alignment(alpha=alpha, sides=sides)(f).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("sides", SIDES)
def test_uniformity_equals_the_mean_of_equation_3_over_both_sides(sides):
    f = forward_of(Uniformity(), views())
    per_side = [torch.pdist(side.embed).pow(2).mul(-3).exp().mean().log() for side in sides_of(f, sides)]
    assert Uniformity(t=3.0, sides=sides)(f).item() == pytest.approx(sum(per_side).item() / 2)


def test_sides_are_image_and_text_or_two_views():
    f = forward_of(Alignment(), views())
    other = f.batch.views[0]
    for sides, (x, y) in {
        "image_text": (f.image, f.text),
        "images": (f.image, f.model.encode_image(other.image)),
        "texts": (f.text, f.model.encode_text(other.input_ids, other.attention_mask)),
    }.items():
        found = sides_of(f, sides)
        torch.testing.assert_close(found[0].embed, x.embed)
        torch.testing.assert_close(found[1].embed, y.embed)


@pytest.mark.parametrize(
    "objective", [Alignment(), Alignment(alpha=1.0, sides="image_text"), Uniformity(), Uniformity(sides="texts")]
)
def test_two_processes_equal_one(pair, objective):
    assert_two_are_one(pair, objective, objective)


def test_minimising_uniformity_spreads_points_evenly():
    """Gradient descent on three points in a plane ends at 120 degrees between them."""
    batch, mask = views(rows=3), torch.ones(3, 1, dtype=torch.bool)
    x = torch.nn.functional.normalize(torch.randn(3, 2, dtype=torch.float64), dim=1).requires_grad_()
    for _ in range(500):
        points = Encoded(x[:, None], mask, torch.nn.functional.normalize(x, dim=1))
        f = Forward(Net(), batch, encoded={"image": points, "text": points})
        (gradient,) = torch.autograd.grad(Uniformity(sides="image_text")(f), x)
        x.data -= 0.1 * gradient
    cosines = (f.image.embed @ f.image.embed.T)[~torch.eye(3, dtype=torch.bool)]
    torch.testing.assert_close(cosines, torch.full_like(cosines, -0.5), atol=1e-3, rtol=0)


def test_validate_names_the_missing_side():
    image, text = TimmImage("test_vit"), BertText(config={})
    with_images = Experiment("x", Single(image=image), {}, Data(train=(), views=(simclr(),) * 3))
    texts = Experiment("x", Single(text=text), {}, Data(train=(Sentences("a.txt"),)))
    both = Experiment("x", Dual(image=image, text=text), {}, Data(train=()))
    Alignment().validate(with_images)
    Alignment(sides="texts").validate(replace(texts, data=replace(texts.data, text_views=(Same(),))))
    two = Sentences("a.tsv", columns=("one", "two"))
    Alignment(sides="texts").validate(replace(texts, data=Data(train=(two,))))
    Alignment(sides="image_text").validate(both)
    for experiment, sides, missing in (
        (replace(with_images, data=Data(train=())), "images", "at least one further view of each image, not 0"),
        (texts, "images", "an image tower"),
        (with_images, "texts", "a text tower"),
        (with_images, "image_text", "a text tower"),
        (texts, "texts", "a further view of each text"),
        (replace(texts, data=Data(train=(replace(two, join=" "),))), "texts", "a further view of each text"),
    ):
        for objective in (Alignment(sides=sides), Uniformity(sides=sides)):
            with pytest.raises(UserError, match=f"{type(objective).__name__} needs {missing}"):
                objective.validate(experiment)
