"""Fusion with two images per text equals a reference that computes one pair at a time."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.encoders.test_fusion import IMAGE_WIDTH, PATCHES, TEXT, WIDTH, fusion, inputs
from vlp.encoders.fusion import AlternatingImages, Fusion
from vlp.errors import UserError


def attention(part, keys, states, source):
    """Attend one head at a time, with keys and values projected by the layers of ``keys``."""
    size, heads = WIDTH // part.heads, []
    query, key, value = part.query(states), keys.key(source), keys.value(source)
    for start in range(0, WIDTH, size):
        q, k, v = (x[:, start : start + size] for x in (query, key, value))
        heads.append((q @ k.T / math.sqrt(size)).softmax(1) @ v)
    return part.out(torch.cat(heads, 1))


def one_text(model, images, tokens):
    """Fuse the (l, D) real tokens of one text with two images of (P, D') tokens."""
    for number, layer in enumerate(model.layers):
        shared = model.layers[number - number % 2].cross_attention
        tokens = layer.self_norm(tokens + attention(layer.self_attention, layer.self_attention, tokens, tokens))
        looked = attention(layer.cross_attention, shared, tokens, images[number % 2])
        tokens = layer.cross_norm(tokens + looked)
        tokens = layer.norm(tokens + layer.contract(F.gelu(layer.expand(tokens))))
    return tokens


def two_images():
    torch.manual_seed(2)
    return [torch.randn(3, PATCHES, IMAGE_WIDTH, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("at", [None, "first"])
def test_twins_attend_to_one_image_each(pack, at):
    model, images = fusion(layers=2, images=2, pack=pack), two_images()
    _, tokens, mask = inputs()
    found = model(tokens, mask, AlternatingImages(tuple(map(model.project, images))), at=at)
    slow = [one_text(model, [image[row] for image in images], tokens[row][mask[row]]) for row in range(3)]
    found, slow = (found, torch.stack([x[0] for x in slow])) if at else (found[mask], torch.cat(slow))
    torch.testing.assert_close(found, slow, rtol=1e-4, atol=1e-5)
    wanted = [*images, tokens, *model.parameters()]
    weights = torch.randn_like(found)
    gradients = torch.autograd.grad((found * weights).sum(), wanted)
    expected = torch.autograd.grad((slow * weights).sum(), wanted)
    for one, other in zip(gradients, expected):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-4


def test_twins_share_keys_and_values_of_images():
    model, images = fusion(layers=2, images=2), two_images()
    names = {name for name, _ in model.named_parameters() if ".cross_attention." in name}
    has_keys = {int(name.split(".")[1]) for name in names if ".key." in name or ".value." in name}
    has_queries = {int(name.split(".")[1]) for name in names if ".query." in name or ".out." in name}
    assert (has_keys, has_queries) == ({0, 2}, {0, 1, 2, 3})
    projected = model.project(images[0])
    assert projected.keys[0] is projected.keys[1] and projected.values[2] is projected.values[3]
    assert not torch.equal(projected.keys[1], projected.keys[2])


def test_exchanging_the_images_is_exchanging_the_twins():
    model, images = fusion(layers=2, images=2), two_images()
    _, tokens, mask = inputs()
    first, second = map(model.project, images)
    one = model(tokens, mask, AlternatingImages((first, second)))
    assert (one - model(tokens, mask, AlternatingImages((second, first)))).abs().max() > 0.01
    torch.testing.assert_close(
        model(tokens, mask, AlternatingImages((first, first))), model(tokens, mask, first), rtol=0, atol=0
    )


def test_twins_count_as_one_layer():
    torch.manual_seed(0)
    model = Fusion(layers=2, images=2).resolved(TEXT).build(WIDTH, IMAGE_WIDTH)
    depths = model.layer_ids()
    assert {depths[f"layers.{n}.expand.weight"] for n in (0, 1)} == {1}
    assert {depths[f"layers.{n}.expand.weight"] for n in (2, 3)} == {2}
    with pytest.raises(UserError, match="images is 0; set it to at least 1"):
        Fusion(images=0).resolved(TEXT).build(WIDTH, IMAGE_WIDTH)
