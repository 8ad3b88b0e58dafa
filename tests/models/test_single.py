import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from vlp.encoders.image import TimmImage
from vlp.encoders.patch_targets import Pixels, RandomCodes
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.models.single import Single
from vlp.specs.json import dump, from_plain
from vlp.types import Batch

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 40}
BERT = BertText(config=SIZES | {"model_type": "bert"}, dropout=0.0)
VIT = TimmImage("test_vit", image_size=64)


def texts(lengths=(4, 12, 5, 7), width=14):
    torch.manual_seed(0)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return torch.randint(5, 99, mask.shape).masked_fill(~mask, 0), mask


def text_forward(model, ids, mask):
    return Forward(model, Batch(torch.arange(len(ids)), input_ids=ids, attention_mask=mask))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_masked_text_equals_transformers_bert_at_masked_positions(tmp_path, pool, groups):
    torch.manual_seed(0)
    published = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval()
    for parameter in published.parameters():
        nn.init.normal_(parameter, std=0.3)
    published.save_pretrained(tmp_path)
    text = BertText(weights=str(tmp_path), pool=pool, length_groups=groups)
    model = Single(text=text, mlm=True).build().eval()
    assert model.reports["text"] and len(model.reports["mlm"].loaded) == 5
    ids, mask = texts()
    positions = mask.flatten().nonzero()[::3, 0]
    with torch.no_grad():
        expected = published(input_ids=ids, attention_mask=mask.long()).logits.flatten(0, 1)[positions]
        found = model.masked_text(text_forward(model, ids, mask), ids, positions)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_masked_text_reads_the_masked_ids():
    model = Single(text=BERT, mlm=True).build().eval()
    ids, mask = texts()
    other = torch.where(mask, 7, 0)
    positions = torch.tensor([1, 15])
    found = model.masked_text(text_forward(model, ids, mask), other, positions)
    torch.testing.assert_close(found, model.masked_text(text_forward(model, other, mask), other, positions))
    assert not torch.allclose(found, model.masked_text(text_forward(model, ids, mask), ids, positions))


def test_tied_embeddings_are_saved_once_and_restored(tmp_path):
    model = Single(text=BERT, mlm=True).build()
    state = model.state_dict()
    assert sum(value.shape == (99, 32) for value in state.values()) == 1
    save_file(state, tmp_path / "model.safetensors")
    again = Single(text=BERT, mlm=True).build()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    ids, mask = texts()
    at = torch.tensor([1])
    outputs = [m.eval().masked_text(text_forward(m, ids, mask), ids, at) for m in (model, again)]
    assert torch.equal(*outputs)


def test_only_the_heads_of_the_spec_are_built():
    text, image = Single(text=BERT).build(), Single(image=VIT).build()
    assert text.mlm is None and not any("mlm" in name for name in text.state_dict())
    assert image.mim is None and not any("mim" in name for name in image.state_dict())
    assert text.reports.keys() == {"text"} and image.reports.keys() == {"image"}


@pytest.mark.parametrize("mim", [Pixels(), RandomCodes(codes=50)])
def test_masked_image_predicts_the_given_patches_and_every_parameter_has_a_gradient(mim):
    torch.manual_seed(0)
    model = Single(image=VIT, mim=mim).build()
    image = torch.randn(2, 3, 64, 64)
    f = Forward(model, Batch(torch.arange(2), image))
    positions = torch.tensor([0, 3, 5, 17, 30])
    found = model.masked_image(f, positions)
    assert found.shape == (5, model.mim.targets.width)
    found.square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert model.mim.mask_token.grad.abs().sum() > 0
    # each answer is of its own patch: one of another place in the list is the same
    torch.testing.assert_close(model.masked_image(f, positions.flip(0)), found.flip(0))


@pytest.mark.parametrize("spec", [Single(text=BERT, mlm=True), Single(image=VIT, mim=RandomCodes(codes=9))])
def test_model_is_rebuilt_from_json_and_state_dict(spec):
    spec = spec.resolved()
    assert from_plain(json.loads(json.dumps(json.loads(dump(spec))))) == spec
    model, again = spec.build(), spec.build(load_weights=False)
    again.load_state_dict(model.state_dict())


def test_layer_ids_cover_all_parameters_with_the_heads_on_top():
    for spec, head in ((Single(text=BERT, mlm=True), "mlm"), (Single(image=VIT, mim=Pixels()), "mim")):
        model = spec.build()
        ids = model.layer_ids()
        assert ids.keys() == {name for name, _ in model.named_parameters()}
        heads = {depth for name, depth in ids.items() if name.startswith(head)}
        towers = {depth for name, depth in ids.items() if not name.startswith(head)}
        assert heads == {max(ids.values())} and max(towers) < max(heads)


@pytest.mark.parametrize(
    ("head", "more", "size"),
    [
        ("none", {}, 32),
        ("tanh", {}, 32),
        ("linear", {"embed_size": 8}, 8),
        ("mlp", {"embed_size": 8, "hidden_size": 20}, 8),
        ("mlp", {"embed_size": 8, "head_norm": True}, 8),
    ],
)
def test_embeddings_have_unit_norm_and_tokens_are_those_of_the_tower(head, more, size):
    model = Single(text=BERT, head=head, **more).build()
    ids, mask = texts()
    encoded = model.encode_text(ids, mask)
    assert encoded.embed.shape == (4, size) and model.embed_size == size
    torch.testing.assert_close(encoded.embed.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(encoded.tokens, model.text(ids, mask))


def test_invalid_specs_are_refused():
    for spec, complaint in (
        (Single(), "exactly one|takes either image or text"),
        (Single(image=VIT, text=BERT), "takes either image or text"),
        (Single(image=VIT, mlm=True), "mlm is the head of a text tower"),
        (Single(text=BERT, mim=Pixels()), "mlm is the head of a text tower"),
        (Single(image=TimmImage("test_resnet", image_size=64), mim=Pixels()), "needs a ViT"),
        (Single(text=BERT, head="tanh", embed_size=8), "embed_size needs"),
        (Single(text=BERT, head="linear", hidden_size=8), "are of head='mlp'"),
    ):
        with pytest.raises(UserError, match=complaint):
            spec.build()
