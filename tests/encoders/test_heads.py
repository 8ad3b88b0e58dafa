import pytest
import timm
import torch
import transformers
from torch import nn

from vlp.data.preprocess import Preprocess
from vlp.encoders.heads import VocabularyHead, check_patch_masking, vocabulary_head
from vlp.encoders.image import TimmImage, TimmTower
from vlp.encoders.text import BertText
from vlp.errors import UserError

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "bert": (transformers.BertForMaskedLM, {"intermediate_size": 64}),
    "roberta": (transformers.RobertaForMaskedLM, {"intermediate_size": 64, "type_vocab_size": 1}),
    "mpnet": (transformers.MPNetForMaskedLM, {"intermediate_size": 64}),
    "distilbert": (transformers.DistilBertForMaskedLM, {"hidden_dim": 64}),
}


def published(model_type, folder):
    """Save a random model of transformers with large weights, so that every parameter affects the logits."""
    torch.manual_seed(0)
    cls, more = FAMILIES[model_type]
    model = cls(cls.config_class(**SIZES, **more)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("model_type", FAMILIES)
def test_head_of_a_transformers_folder_gives_its_logits(model_type, tmp_path):
    model = published(model_type, tmp_path)
    spec = BertText(weights=str(tmp_path), dropout=0.0)
    tower = spec.build().eval()
    head = vocabulary_head(spec, tower)
    assert len(head.report.loaded) == 5 and not head.report.new
    ids = torch.randint(5, 99, (3, 9))
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        found = head(tower(ids, ids > 0).flatten(0, 1), tower.get_input_embeddings())
    torch.testing.assert_close(found.view_as(expected), expected, rtol=1e-4, atol=1e-4)


def test_folder_without_a_head_does_not_change_the_head(tmp_path):
    published("bert", tmp_path).bert.save_pretrained(tmp_path)
    tower = BertText(weights=str(tmp_path)).build()
    head = VocabularyHead(tower.width, tower.get_input_embeddings())
    before = {name: value.clone() for name, value in head.state_dict().items()}
    head.load(str(tmp_path))
    assert head.report is None
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())


def test_word_embeddings_are_not_a_parameter_of_the_head():
    tower = BertText(config=SIZES | {"model_type": "electra", "embedding_size": 16, "intermediate_size": 64}).build()
    head = VocabularyHead(tower.width, tower.get_input_embeddings())
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "dense.weight": (16, 32),
        "dense.bias": (16,),
        "norm.weight": (16,),
        "norm.bias": (16,),
        "bias": (99,),
    }
    head(torch.randn(4, 32), tower.get_input_embeddings()).sum().backward()
    assert tower.get_input_embeddings().weight.grad is not None


def tower_of(name, size=64):
    torch.manual_seed(0)
    tower = TimmImage(name, image_size=size).build().eval()
    for parameter in tower.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0, std=0.2)  # norms and scales far from the identity
    return tower


def masks(tower, rows=3):
    patches = tower.model.patch_embed.num_patches
    return torch.rand(rows, patches, generator=torch.Generator().manual_seed(1)) < 0.4


def test_masked_vit_equals_its_layers_called_one_by_one():
    tower = tower_of("test_vit")
    image, masked, token = torch.randn(3, 3, 64, 64), masks(tower), torch.randn(tower.width)
    model = tower.model
    patches = model.patch_embed(image).detach().contiguous()
    for row in range(3):
        for patch in range(masked.shape[1]):
            if masked[row, patch]:
                patches.view(3, -1, tower.width)[row, patch] = token
    states = model.norm(model.blocks(model.norm_pre(model._pos_embed(patches))))[:, model.num_prefix_tokens :]
    torch.testing.assert_close(tower.forward_masked(image, masked, token), states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "beit_base_patch16_224", "vit_wee_patch16_reg1_gap_256"])
def test_masked_pixels_have_no_effect(name):
    tower = tower_of(name)
    assert check_patch_masking(tower) is None
    image, masked, token = torch.randn(2, 3, 64, 64), masks(tower, 2), torch.randn(tower.width)
    with torch.no_grad():
        plain = tower(image)
        states = tower.forward_masked(image, masked, token)
        assert states.shape == (2, masked.shape[1], tower.width)
        other = image.clone()
        rows, columns = tower.model.patch_embed.grid_size
        hidden = masked.view(2, 1, rows, columns)
        hidden = hidden.repeat_interleave(64 // rows, 2).repeat_interleave(64 // columns, 3)
        other[hidden.expand_as(other)] += 1
        torch.testing.assert_close(tower.forward_masked(other, masked, token), states, rtol=0, atol=0)
        assert not torch.allclose(tower(other), plain)
        nothing = tower.forward_masked(image, torch.zeros_like(masked), token)
        last = tower.model.fc_norm if isinstance(tower.model.norm, nn.Identity) else nn.Identity()
        torch.testing.assert_close(nothing, last(plain[:, 1:]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tower(image), plain, rtol=0, atol=0)  # the hook was removed
        assert isinstance(last, nn.LayerNorm) == ("gap" in name or "beit" in name)


def test_tower_without_patch_tokens_is_refused():
    for name in ("test_resnet", "test_efficientnet"):
        with pytest.raises(UserError, match="needs a ViT"):
            check_patch_masking(TimmImage(name, image_size=64).build())
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=224, depths=(1, 1, 1, 1))
    tower = TimmTower(swin, Preprocess((224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic"))
    with pytest.raises(UserError, match="needs a ViT"):
        check_patch_masking(tower)
