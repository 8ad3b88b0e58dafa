"""The multiway transformer: the expert of each token, attention, stochastic depth and sizes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vlp.encoders.mome import BASE, BASE_PLUS, LARGE, SMALL, MomeEncoder
from vlp.encoders.mome_layer import SharedAttention
from vlp.encoders.ragged import RaggedBatch
from vlp.encoders.relative_position import RelativePositions, text_index

CPU = torch.device("cpu")
SIZES = replace(SMALL, width=16, layers=4, heads=2, vl_from=2, vocab_size=30, image_size=32, max_text_length=10)
LENGTHS, P, L = (3, 6, 1), 5, 7


def encoder(seed=0, **changes):
    torch.manual_seed(seed)
    model = MomeEncoder(replace(SIZES, **changes), ("image", "text"), True).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def given():
    torch.manual_seed(1)
    text, image = torch.randn(3, L, 16, dtype=torch.float64), torch.randn(3, P, 16, dtype=torch.float64)
    return RaggedBatch(LENGTHS, P, CPU), text, image


# --- experts ---------------------------------------------------------------------------------------------------------


def used(run):
    """Return (layer, expert, number of tokens) of every call of an expert."""
    model = encoder()
    calls = []
    for number, layer in enumerate(model.layers):
        for name, expert in layer.experts.items():
            expert.register_forward_pre_hook(
                lambda m, inputs, number=number, name=name: calls.append((number, name, len(inputs[0])))
            )
    run(model)
    return calls


def test_each_token_is_served_by_its_modality_below_and_by_the_vision_language_expert_above():
    rows, text, image = given()
    words, patches = sum(LENGTHS), 3 * P
    assert used(lambda m: m(rows, text, image, joint=True)) == [
        *[(n, name, count) for n in (0, 1) for name, count in (("text", words), ("image", patches))],
        *[(n, "vl", words + patches) for n in (2, 3)],
    ]
    texts = RaggedBatch(LENGTHS, 0, CPU)
    assert used(lambda m: m(texts, text)) == [(n, "text", words) for n in range(4)]
    images = RaggedBatch((0, 0, 0), P, CPU)
    assert used(lambda m: m(images, image=image)) == [(n, "image", patches) for n in range(4)]
    assert used(lambda m: m(images, image=image, joint=True))[-1] == (3, "vl", patches)


def slow(model, row, text, image, joint):
    """Encode one row, token by token and head by head."""
    x = torch.cat([*([text] if text is not None else []), *([image] if image is not None else [])])
    words = 0 if text is None else len(text)
    positions = model.positions
    for number, layer in enumerate(model.layers):

        def bias(i, j, head, number=number):
            column = number * 2 + head
            kinds = (i < words, j < words)
            if kinds == (True, True):
                return positions.text[text_index(words, 10)[i, j], column]
            if kinds == (False, False):
                from vlp.encoders.relative_position import image_index

                return positions.image[image_index((2, 2))[i - words, j - words], column]
            return positions.cross[0 if kinds[0] else 1, column]

        attention, normed = layer.attention, layer.norm(x)
        own = torch.cat([attention.q_bias, torch.zeros(16), attention.v_bias])
        q, k, v = (normed @ attention.qkv.weight.T + own).unflatten(1, (3, 2, 8)).unbind(1)
        attended = torch.zeros(len(x), 2, 8, dtype=torch.float64)
        for head in range(2):
            for i in range(len(x)):
                scores = torch.stack([q[i, head] @ k[j, head] / 8**0.5 + bias(i, j, head) for j in range(len(x))])
                attended[i, head] = scores.softmax(0) @ v[:, head]
        x = x + layer.gamma_1 * attention.out(attended.flatten(1))
        new = []
        for i, state in enumerate(x):
            name = "vl" if joint and number >= 2 else "text" if i < words else "image"
            new.append(state + layer.gamma_2 * layer.experts[name](state[None], None)[0])
        x = torch.stack(new)
    return model.norm(x)


@pytest.mark.parametrize("which", ["both", "text", "image"])
@torch.no_grad()
def test_outputs_equal_a_token_by_token_reference(which):
    model, (rows, text, image) = encoder(), given()
    text, image = (None if which == "image" else text), (None if which == "text" else image)
    rows = RaggedBatch(LENGTHS if text is not None else (0, 0, 0), P if image is not None else 0, CPU)
    found = rows.pad(model(rows, text, image, joint=which == "both"))
    for row in range(3):
        words = None if text is None else text[row, : LENGTHS[row]]
        expected = slow(model, row, words, None if image is None else image[row], which == "both")
        own = found[row] if rows.attention_mask is None else found[row][rows.attention_mask[row, 0, 0]]
        torch.testing.assert_close(own, expected)


@torch.no_grad()
def test_selected_outputs_equal_those_of_the_full_layer():
    model, (rows, text, image) = encoder(), given()
    whole = model(rows, text, image, joint=True)
    first = model(rows, text, image, joint=True, outputs=rows.first_tokens())
    torch.testing.assert_close(first, whole[rows.starts])
    row, column = torch.tensor([1, 0, 1]), torch.tensor([5, 2, 0])
    some = model(rows, text, image, joint=True, outputs=rows.tokens_at(row, column))
    torch.testing.assert_close(some, rows.pad(whole)[row, column])
    images = RaggedBatch((0, 0, 0), P, CPU)
    whole = model(images, image=image)
    some = model(images, image=image, outputs=images.tokens_at(row, (column - 1).clamp(min=0)))
    torch.testing.assert_close(some, images.pad(whole)[row, (column - 1).clamp(min=0)])


# --- stochastic depth -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [(True, False, True), (False, False, True), (True, True, True)])
def test_dropped_rows_keep_their_states_and_the_others_are_rescaled(kept, monkeypatch):
    model, (rows, text, image) = encoder(drop_path=0.5).train(), given()
    layer, states = model.layers[1], model.pack(rows, text, image)
    bias = model.positions(rows.width, True)[1]
    kept = np.array(kept)
    monkeypatch.setattr(layer, "_draw_kept_rows", lambda rows: (kept, 2.0))
    factor = 2.0 * torch.from_numpy(kept).double()[rows.owner, None]
    expected = states + factor * layer.attention(layer.norm(states), rows, bias, layer.gamma_1)
    expected = expected + factor * layer._experts(expected, rows, False)
    torch.testing.assert_close(layer(states, rows, bias, False), expected)
    top, first = model.layers[3], rows.first_tokens()
    monkeypatch.setattr(top, "_draw_kept_rows", lambda rows: (kept, 2.0))
    torch.testing.assert_close(top(states, rows, bias, True, first), top(states, rows, bias, True)[rows.starts])


def test_drop_rate_grows_with_depth_and_one_row_is_always_computed():
    layers = encoder(drop_path=0.6).train().layers
    assert [layer.drop_path for layer in layers] == pytest.approx([0, 0.2, 0.4, 0.6])
    kept, share = layers[2]._draw_kept_rows(RaggedBatch((0,) * 5000, P, CPU))
    assert kept.mean() == pytest.approx(0.6, abs=0.03) and share == pytest.approx(1 / 0.6)
    draws = [layers[3]._draw_kept_rows(RaggedBatch((0,), P, CPU)) for _ in range(200)]
    assert all(kept.any() for kept, _ in draws)
    assert {share for _, share in draws} == {0.0, 1 / (1 - layers[3].drop_path)}
    assert layers[3].eval()._draw_kept_rows(RaggedBatch((0,) * 5, P, CPU))[0].all()


def test_biases_are_those_of_one_layer_and_grow_with_it_alone():
    positions = RelativePositions(2, 3, (2, 2), 6, True)
    with torch.no_grad():
        positions.text.copy_(torch.arange(12.0)[:, None] * 100 + torch.arange(6.0))
    first, second = positions(4, False)
    assert first.shape == (3, 4, 4) and torch.equal(second - first, torch.full((3, 4, 4), 3.0))
    assert torch.equal(first[1] - first[0], torch.ones(4, 4))


def test_any_text_length_up_to_the_table_has_its_own_rows():
    for length in (1, 2, 9, 10):
        index = text_index(length, 10)
        assert index.shape == (length, length) and index.min() >= 0 and index.max() == 19
        assert len(index.unique()) == (2 * (length - 1) - 1 + 2 if length > 1 else 0) + 1
    assert torch.equal(text_index(10, 10)[:6, :6], text_index(6, 10))


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [BASE, BASE_PLUS, LARGE])
def test_published_sizes_have_their_experts(spec):
    with torch.device("meta"):
        model = MomeEncoder(spec, ("image", "text"), True)
    width, deep = spec.width, spec.layers
    assert [("vl" in layer.experts) for layer in model.layers] == [n >= spec.vl_from for n in range(deep)]
    experts = 2 * deep + deep - spec.vl_from
    matrices = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    assert matrices == deep * 4 * width**2 + experts * 8 * width**2
    assert (model.positions is None) == (spec is BASE_PLUS)
    if (
        model.positions is not None
    ):  # rows of the published table: 27 x 27 distances, 3 of the class token, 2 across, 392 of texts
        assert len(model.positions.image) + 2 + len(model.positions.text) == 27**2 + 3 + 2 + 392


@pytest.mark.skipif(torch.cuda.is_available(), reason="the fused forms of a GPU round the bias")
def test_biases_are_not_rounded_where_the_rest_is():
    """Rounded to bfloat16, a bias of 16 has an error of 0.06, and the attention weight one of 6 %."""
    torch.manual_seed(0)
    attention, rows = SharedAttention(32, 2), RaggedBatch((5, 5), 4, torch.device("cpu"))
    states, bias = torch.randn(18, 32), 8 * torch.randn(2, 9, 9)
    torch.nn.init.zeros_(attention.qkv.weight[:64].data)  # without queries and keys only the bias decides
    with torch.no_grad():
        exact = attention(states, rows, bias)
        rounded = attention(states, rows, bias.bfloat16().float())
        with torch.autocast("cpu", torch.bfloat16):
            found = attention(states, rows, bias)
    assert (found.float() - exact).abs().max() < 0.5 * (rounded - exact).abs().max()
