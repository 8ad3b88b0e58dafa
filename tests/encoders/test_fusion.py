import math
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlp.encoders.fusion import BERT_LAYER, Fusion, FusionEncoder, ImageTokens
from vlp.encoders.text import BertText
from vlp.errors import UserError

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
SIZES |= {"model_type": "bert", "num_hidden_layers": 5}
TEXT = BertText(config=SIZES, dropout=0.0)
WIDTH, IMAGE_WIDTH, PATCHES, LENGTH = 32, 24, 11, 8


def fusion(**fields) -> FusionEncoder:
    torch.manual_seed(0)
    model = Fusion(**{"layers": 3, **fields}).resolved(TEXT).build(WIDTH, IMAGE_WIDTH)
    for parameter in model.parameters():  # larger than the initial values, which would hide errors
        nn.init.normal_(parameter, std=0.3)
    return model


def inputs(images=3, lengths=(6, 2, 4)):
    torch.manual_seed(1)
    mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    image = torch.randn(images, PATCHES, IMAGE_WIDTH, requires_grad=True)
    return image, torch.randn(len(mask), LENGTH, WIDTH, requires_grad=True), mask


def one_pair(model: FusionEncoder, image, tokens):
    """Fuse the (l, D) real tokens of one text with (P, D') image tokens, one head at a time."""

    def attention(part, states, source):
        query, key, value = part.query(states), part.key(source), part.value(source)
        size, heads = WIDTH // part.heads, []
        for start in range(0, WIDTH, size):
            q, k, v = (x[:, start : start + size] for x in (query, key, value))
            heads.append((q @ k.T / math.sqrt(size)).softmax(1) @ v)
        return part.out(torch.cat(heads, 1))

    for layer in model.layers:
        tokens = layer.self_norm(tokens + attention(layer.self_attention, tokens, tokens))
        tokens = layer.cross_norm(tokens + attention(layer.cross_attention, tokens, image))
        tokens = layer.norm(tokens + layer.contract(F.gelu(layer.expand(tokens))))
    return tokens


# texts and images of pairs in the order of the images, and of some that are not
PAIRS = {
    "one each": (None, None),
    "another order": (None, [2, 0, 0]),
    "two rounds": ([0, 1, 2, 1, 1, 0], None),
    "rounds and others": ([0, 1, 2, 2, 2, 1, 0, 0], [1, 2]),
    "fewer": ([1, 0], [2, 2]),
}


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_fusion_and_gradient_equal_those_of_single_pairs(name, pack, layers):
    model = fusion(layers=layers, pack=pack)
    image, tokens, mask = inputs()
    texts, images = (None if rows is None else torch.tensor(rows) for rows in PAIRS[name])
    texts_of = list(range(3)) if texts is None else texts.tolist()
    others = [] if images is None else images.tolist()
    images_of = [i % 3 for i in range(len(texts_of) - len(others))] + others
    found = model(tokens, mask, model.project(image), texts, images)
    assert found.shape == (len(texts_of), LENGTH, WIDTH)
    slow = [one_pair(model, image[i], tokens[t][mask[t]]) for i, t in zip(images_of, texts_of)]
    real = mask[texts_of]
    torch.testing.assert_close(found[real], torch.cat(slow), rtol=1e-4, atol=1e-5)

    wanted = [image, tokens, *model.parameters()]
    weights = torch.randn_like(found[real])
    gradients = torch.autograd.grad((found[real] * weights).sum(), wanted)
    expected = torch.autograd.grad((torch.cat(slow) * weights).sum(), wanted)
    for one, other in zip(gradients, expected):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-4


@pytest.mark.parametrize("name", PAIRS)
def test_image_tokens_give_the_result_and_gradient_of_projected_images(name):
    model = fusion()
    image, tokens, mask = inputs()
    texts, images = (None if rows is None else torch.tensor(rows) for rows in PAIRS[name])
    wanted = [
        image,
        tokens,
        *(p for n, p in model.named_parameters() if "key.bias" not in n),
    ]  # whose exact gradient is 0
    results = []
    for given in (model.project(image), ImageTokens(image)):
        found = model(tokens, mask, given, texts, images, at="first")
        results.append((found, torch.autograd.grad(found.square().sum(), wanted)))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("pack", [True, False])
def test_selected_outputs_equal_those_among_all(pack, layers):
    model = fusion(layers=layers, pack=pack)
    image, tokens, mask = inputs()
    texts, images = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([2, 2])
    everything = (tokens, mask, model.project(image), texts, images)
    whole = model(*everything)
    torch.testing.assert_close(model(*everything, at="first"), whole[:, 0], rtol=1e-4, atol=1e-5)
    positions = torch.tensor([1, LENGTH, 2 * LENGTH + 3, 4 * LENGTH + 5, 0, 0])
    found = model(*everything, at=positions)
    torch.testing.assert_close(found, whole.flatten(0, 1)[positions], rtol=1e-4, atol=1e-5)
    kept = [p for n, p in model.named_parameters() if "key.bias" not in n]  # whose exact gradient is 0
    one = torch.autograd.grad(found[:4].square().sum(), kept, retain_graph=True)
    other = torch.autograd.grad(whole.flatten(0, 1)[positions[:4]].square().sum(), kept)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_one_image_is_read_without_padding_by_all_its_texts():
    model = fusion()
    image, tokens, mask = inputs(images=1)
    projected = model.project(image)
    texts = torch.tensor([0, 1, 2, 0, 1])
    together = model(tokens, mask, projected, texts)
    copied = model(tokens, mask, projected, texts, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(together, copied, rtol=1e-4, atol=1e-5)


def test_layers_are_transformers_bert_layers_with_cross_attention():
    config = transformers.BertConfig(
        **{k: v for k, v in SIZES.items() if k != "model_type"},
        is_decoder=True,
        add_cross_attention=True,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    theirs = transformers.BertModel(config, add_pooling_layer=False).encoder
    ours = Fusion(layers=5).resolved(TEXT).build(WIDTH, WIDTH)
    state = {}
    for key, value in theirs.state_dict().items():
        number, _, rest = key.removeprefix("layer.").partition(".")
        part, leaf = rest.rsplit(".", 1)
        state[f"{number}.{BERT_LAYER[part]}.{leaf}"] = nn.init.normal_(value, std=0.3)
    theirs.load_state_dict({key: state[_ours(key)] for key in theirs.state_dict()})
    ours.layers.load_state_dict(state)
    _, tokens, mask = inputs()
    image = torch.randn(3, PATCHES, WIDTH)
    hidden = tokens
    hidden_mask = torch.zeros(3, 1, LENGTH, LENGTH).masked_fill(~mask[:, None, None], -1e9)
    for layer in theirs.layer:
        hidden = layer(hidden, hidden_mask, image)
    found = ours(tokens, mask, ours.project(image))
    torch.testing.assert_close(found[mask], hidden[mask], rtol=1e-4, atol=1e-5)


def _ours(key):
    number, _, rest = key.removeprefix("layer.").partition(".")
    part, leaf = rest.rsplit(".", 1)
    return f"{number}.{BERT_LAYER[part]}.{leaf}"


def test_fusion_starts_from_the_last_layers_of_bert_and_new_cross_attention(tmp_path):
    published = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    published.save_pretrained(tmp_path)
    model = Fusion(layers=2, weights=str(tmp_path), first_layer=3).resolved(TEXT).build(WIDTH, IMAGE_WIDTH)
    for number, layer in enumerate(model.layers):
        source = published.bert.encoder.layer[3 + number]
        assert torch.equal(layer.self_attention.value.weight, source.attention.self.value.weight)
        assert torch.equal(layer.self_attention.out.bias, source.attention.output.dense.bias)
        assert torch.equal(layer.contract.weight, source.output.dense.weight)
        assert 0.015 < layer.cross_attention.key.weight.std() < 0.025
    assert len(model.report.loaded) == 32 and len(model.report.new) == 20 and not model.report.unexpected
    with pytest.raises(UserError, match="fusion from layers 3 to 5") as error:
        Fusion(layers=3, weights=str(tmp_path), first_layer=3).resolved(TEXT).build(WIDTH, IMAGE_WIDTH)
    assert "\n" not in str(error.value)


def test_sizes_come_from_the_weights_or_else_the_text_tower(tmp_path):
    own = SIZES | {"num_attention_heads": 8, "intermediate_size": 96, "hidden_dropout_prob": 0.3}
    transformers.BertConfig(**own).save_pretrained(tmp_path)
    resolved = Fusion(weights=str(tmp_path)).resolved(replace(TEXT, dropout=None))
    assert (resolved.heads, resolved.hidden_size, resolved.dropout, resolved.eps) == (8, 96, 0.3, 1e-12)
    (tmp_path / "config.json").unlink()
    assert resolved.resolved(TEXT) == resolved
    assert Fusion(hidden_size=7).resolved(TEXT) == Fusion(heads=4, hidden_size=7, dropout=0.0, eps=1e-12)
    other = BertText(config={"model_type": "distilbert", "hidden_dim": 64})
    with pytest.raises(UserError, match="no heads and hidden_size for fusion"):
        Fusion().resolved(other)


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def test_linear_layers_see_no_padding_and_an_image_is_projected_once():
    model = fusion()
    image, tokens, mask = inputs()
    projection = flops(lambda: model.project(image))
    assert projection == 3 * 2 * 2 * 3 * PATCHES * IMAGE_WIDTH * WIDTH
    projected = model.project(image)
    real, width = int(mask.sum()), 6  # of the longest
    linear = 3 * 2 * real * WIDTH * (6 * WIDTH + 2 * 64)
    attention = 3 * 2 * 2 * 3 * width * WIDTH * (width + PATCHES)
    assert flops(lambda: model(tokens, mask, projected)) == linear + attention
    # two pairs per text: the first self-attention still runs once per text
    twice = flops(lambda: model(tokens, mask, projected, torch.tensor([0, 1, 2] * 2)))
    assert twice == 2 * (linear + attention) - 4 * 2 * real * WIDTH**2 - 2 * 2 * 3 * width**2 * WIDTH
    # the last layer computes keys and values of all tokens, and everything else for 3 first tokens
    first = flops(lambda: model(tokens, mask, projected, at="first"))
    last = 2 * WIDTH * (2 * WIDTH * real + 3 * (4 * WIDTH + 2 * 64)) + 2 * 2 * 3 * WIDTH * (width + PATCHES)
    assert first == (linear + attention) * 2 // 3 + last


def test_attention_probabilities_are_part_of_the_graph():
    model = fusion()
    image, tokens, mask = inputs()
    texts, images = torch.tensor([0, 1, 2, 2]), torch.tensor([1])
    given = (tokens, mask, model.project(image), texts, images)
    fused, probabilities = model.with_attention(1, *given)
    assert probabilities.shape == (4, 4, LENGTH, PATCHES)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(4, 4, LENGTH))
    real = mask[texts]
    torch.testing.assert_close(fused[real], model(*given)[real], rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(fused[:, 0].square().sum(), probabilities)
    # attention of padding has no effect, attention of real tokens does
    assert gradient[~real[:, None].expand(-1, 4, -1)].abs().max() == 0
    assert (gradient[:, :, 0].abs().amax((1, 2)) > 0).all()
    # the gradient of the score with respect to the probabilities, by finite differences
    shift = torch.zeros_like(probabilities)
    shift[0, 2, 0, 5] = 1e-3

    def score(sign):
        layer = model.layers[1].cross_attention
        plain = layer.attend

        def attend(query, key, value):
            weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
            return (weights + sign * shift) @ value

        layer.attend = attend
        rows = torch.tensor([0, 1, 2, 1])
        out = model.double()(tokens.double(), mask, model.project(image.double()), texts, rows)
        layer.attend = plain
        return out[:, 0].square().sum()

    model.pack, shift = False, shift.double()
    slope = (score(1) - score(-1)) / 2e-3
    torch.testing.assert_close(slope.float(), gradient[0, 2, 0, 5], rtol=1e-3, atol=1e-4)


def test_text_without_tokens_counts_as_one_token():
    model = fusion()
    image, tokens, mask = inputs(lengths=(6, 0, 4))
    found = model(tokens, mask, model.project(image))
    torch.testing.assert_close(found[1, :1], one_pair(model, image[1], tokens[1, :1]), rtol=1e-4, atol=1e-5)
    assert found[1, 1:].abs().max() == 0


def test_incomplete_rounds_of_images_are_an_error():
    model = fusion()
    image, tokens, mask = inputs()
    with pytest.raises(ValueError, match="4 texts in the order of 3 images"):
        model(tokens, mask, model.project(image), torch.tensor([0, 1, 2, 0]))


def test_checkpointing_recomputes_with_the_same_dropout():
    model = fusion(dropout=0.3).train()
    image, tokens, mask = inputs()
    gradients = []
    for how in ("none", "full", "cheap"):
        model.set_activation_checkpointing(how)
        torch.manual_seed(5)
        out = model(tokens, mask, model.project(image), at="first")
        gradients.append(torch.autograd.grad(out.square().sum(), list(model.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    torch.manual_seed(6)
    assert not torch.equal(out, model(tokens, mask, model.project(image), at="first"))


def test_bf16_autocast_stays_close():
    model = fusion().eval()
    nn.init.normal_(model.layers[0].expand.weight, std=0.05)
    image, tokens, mask = inputs()
    exact = model(tokens, mask, model.project(image), at="first")
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(tokens, mask, model.project(image), at="first")
    assert (rough - exact).norm() < 0.05 * exact.norm()
