"""Heat maps of words, against a reference that computes one pair at a time, and as a PNG."""

import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

from tests.objectives.fusing import pairs, tiny
from vlp.config import Data
from vlp.data.preparing.formats import Pair
from vlp.data.preparing.pack import pack
from vlp.data.preprocess import Preprocess
from vlp.data.text import Tokenizer, train_tokenizer
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmTower
from vlp.errors import UserError
from vlp.tasks.base import EvalModel
from vlp.tasks.grad_cam import choose_layer, draw_words, enlarge, grad_cam, mean_over_tokens, word_maps


def build(**changed):
    torch.manual_seed(0)
    return replace(tiny(), **changed).build().double().eval()


def heads_of(x, count):
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


def attend(attention, states, source):
    """Compute (L, D) outputs and (heads, L, P) probabilities of attention by definition."""
    query, key = (heads_of(part, attention.heads) for part in (attention.query(states), attention.key(source)))
    probabilities = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
    seen = probabilities @ heads_of(attention.value(source), attention.heads)
    return attention.out(seen.transpose(0, 1).flatten(1)), probabilities


def straightforward(model, image, text, layer):
    """Compute the (L, h, w) maps of one pair without padding, from (P, image width) and (L, D) tokens."""
    states, seen = text, None
    for number, part in enumerate(model.fusion.layers):
        states = part.self_norm(states + attend(part.self_attention, states, states)[0])
        looked, probabilities = attend(part.cross_attention, states, image)
        if number == layer:
            seen = probabilities
        states = part.cross_norm(states + looked)
        states = part.norm(states + part.contract(F.gelu(part.expand(states))))
    gradient = torch.autograd.grad(model.itm(states[0])[1], seen)[0]
    cam = sum(a * g.clamp(min=0) for a, g in zip(seen, gradient)) / len(seen)
    return cam[:, 1:].unflatten(1, model.image.grid).detach().float()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("trained", [True, False])
def test_maps_equal_the_reference_for_any_padding_and_order_of_images(layer, trained):
    model, batch = build(), pairs()
    rows = torch.tensor([3, 3, 0, 7, 1, 5, 5, 2])
    with torch.no_grad():
        image = model.encode_image(batch.image)
        text = model.encode_text(batch.input_ids, batch.attention_mask)
    expected = []
    for row, length in zip(rows, batch.attention_mask.sum(1)):
        expected.append(straightforward(model, image.tokens[row], text.tokens[len(expected), :length], layer))
    model.requires_grad_(trained)
    found = grad_cam(model, image, text, layer, rows)
    assert found.shape == (8, 9, 2, 2) and not found.requires_grad
    for row, cam in enumerate(expected):
        assert cam.any()
        torch.testing.assert_close(found[row, : len(cam)], cam)
        assert not found[row, len(cam) :].any()
    whole = mean_over_tokens(found, batch.attention_mask)
    torch.testing.assert_close(whole, torch.stack([cam.mean(0) for cam in expected]))
    assert all(p.grad is None for p in model.parameters())


def test_enlarged_map_keeps_values_at_its_own_size_and_the_place_of_its_maximum():
    cam = torch.zeros(3, 4)
    cam[1, 3] = 1.0
    torch.testing.assert_close(enlarge(cam, 3, 4), cam)
    y, x = divmod(int(enlarge(cam, 60, 120).argmax()), 120)
    assert 20 <= y < 40 and 90 <= x < 120


@pytest.mark.parametrize(
    "name", ["test_vit", "test_efficientnet", "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224"]
)
def test_grid_of_each_kind_of_image_tower(name):
    size = (64, 64) if name == "test_vit" else (224, 224)
    if name == "test_efficientnet":
        size = (150, 70)  # not a multiple of its stride
    given = {} if name == "test_efficientnet" else {"img_size": size}
    model = timm.create_model(name, num_classes=0, **given).eval()
    tower = TimmTower(model, Preprocess(size, (0.5,) * 3, (0.5,) * 3, "bicubic"))
    with torch.no_grad():
        tokens = tower(torch.zeros(1, 3, *size))
    height, width = tower.grid
    assert tokens.shape[1] == 1 + height * width and abs(height / width - size[0] / size[1]) < 0.6


def test_words_have_the_positions_of_their_pieces():
    tokenizer = train_tokenizer(["dogs run", "a dog runs"], 40, min_frequency=1)
    caption = "The dogs, running!"
    rows = tokenizer.rows([caption])[0]
    found = tokenizer.words(caption)
    assert [word for word, _ in found] == ["The", "dogs", ",", "running", "!"]
    places = [place for _, own in found for place in own]
    assert places == list(range(1, len(rows) - 1))  # [CLS] first, [SEP] last
    for word, own in found:
        alone = tokenizer.rows([word])[0][1:-1]
        assert [rows[place] for place in own] == alone
    assert [own for _, own in Tokenizer(tokenizer._backend, sep=False).words(caption)] == [own for _, own in found]


def test_default_layer_is_the_published_one():
    assert choose_layer(build(fusion=Fusion(layers=6)), None) == 2
    with pytest.raises(UserError, match="layer 2 of fusion; this model has layers 0 to 1"):
        choose_layer(build(), 2)
    with pytest.raises(UserError, match="an ALBEF with itm"):
        choose_layer(build(itm=False), None)


@pytest.fixture
def subject():
    tokenizer = train_tokenizer(["a red dog", "two cats of snow"], 60, min_frequency=1)
    return EvalModel(build().float(), tokenizer, Data(train=(), max_length=12), torch.device("cpu"))


def test_function_words_and_truncated_words_have_no_map(subject):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    found = word_maps(subject, pixels, "a dog, of snow", 0, most=6)
    assert [word for word, _ in found.maps] == ["dog", "snow"]
    assert all(cam.shape == (20, 30) for _, cam in found.maps)
    subject.data = replace(subject.data, max_length=4)  # [CLS] a dog [SEP]
    assert [word for word, _ in word_maps(subject, pixels, "a dog, of snow", 0, most=6).maps] == ["dog"]


def test_maps_are_drawn_for_captions_with_the_words(subject, tmp_path):
    rng = np.random.default_rng(0)
    given = []
    for number, caption in enumerate(["a red dog", "two cats of snow", "a dog of snow"]):
        path = tmp_path / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
        given.append(Pair(str(path), (caption,), str(number), "test", {}))
    pack(given, tmp_path / "shards")
    png = tmp_path / "out" / "grid.png"
    captions = draw_words(subject, str(tmp_path / "shards"), png, words=("Dog",))
    assert sorted(captions) == ["a dog of snow", "a red dog"]
    with Image.open(png) as image:
        assert image.format == "PNG" and image.size[0] > 300
    assert len(draw_words(subject, str(tmp_path / "shards"), png, images=1)) == 1
    with pytest.raises(UserError, match="no caption of .* has horse"):
        draw_words(subject, str(tmp_path / "shards"), png, words=("horse",))
