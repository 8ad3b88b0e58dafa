import json
import logging
import math
from unittest.mock import patch

import open_clip
import pytest
import torch

from vlp.data.text import OpenClipTokenizer
from vlp.encoders.open_clip import OpenClip
from vlp.errors import UserError
from vlp.models.dual import Dual

VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 16}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 3}
BIDIRECTIONAL = TEXT | {"vocab_size": 100, "no_causal_mask": True, "pool_type": "last", "pad_id": 1}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
MODELS = {
    "toy-clip": {"embed_dim": 40, "vision_cfg": VISION, "text_cfg": TEXT},
    "toy-siglip": {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": BIDIRECTIONAL, "init_logit_bias": -10},
    "toy-resnet": {
        "embed_dim": 40,
        "vision_cfg": VISION | {"layers": [1, 1, 1, 1], "image_size": 64},
        "text_cfg": TEXT,
    },
    "toy-timm": {"embed_dim": 40, "vision_cfg": TIMM, "text_cfg": TEXT},
}


@pytest.fixture(scope="module", autouse=True)
def toy_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, config in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def published(name, path, **kwargs):
    """Save open_clip's model with random values in every parameter to ``path``."""
    model = open_clip.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    torch.save(model.state_dict(), path)
    return model


def captions(vocab=49408, end=49407, lengths=(5, 12, 7, 20, 6, 5)):
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]
    ids = torch.randint(2, vocab - 10, mask.shape)
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = end
    return ids.masked_fill(~mask, 0), mask


@pytest.mark.parametrize("custom", [False, True])
def test_dual_encoder_gives_open_clips_own_embeddings(tmp_path, custom):
    model = published("toy-clip", tmp_path / "clip.pt", force_custom_text=custom)
    towers = OpenClip("toy-clip", weights=str(tmp_path / "clip.pt"), length_groups=3)
    dual = Dual(towers=towers, projection="none", temperature=None, temperature_form="logit_scale").build().eval()
    image, (ids, mask) = torch.randn(3, 3, 32, 32), captions()
    torch.testing.assert_close(dual.encode_image(image).embed, model.encode_image(image, normalize=True))
    text = dual.encode_text(ids, mask)
    torch.testing.assert_close(text.embed, model.encode_text(ids, normalize=True), rtol=1e-5, atol=1e-6)
    assert text.tokens.shape == (6, 1, 40) and text.mask.tolist() == [[True]] * 6
    torch.testing.assert_close(dual.scale, model.logit_scale.exp()[None])
    assert dual.reports["image"].unexpected == () and len(dual.reports["image"].loaded) == len(model.state_dict())


def test_grouped_run_has_the_gradient_of_the_padded_one(tmp_path):
    model = published("toy-clip", tmp_path / "clip.pt", force_custom_text=True)
    text = OpenClip("toy-clip", weights=str(tmp_path / "clip.pt"), length_groups=3).build().text
    ids, mask = captions()
    text(ids, mask).cos().sum().backward()
    model.encode_text(ids).cos().sum().backward()
    for one, other in zip(text.text.parameters(), model.text.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)  # the largest are about 80


def test_text_tower_with_visible_padding_runs_on_the_whole_context(tmp_path):
    model = published("toy-siglip", tmp_path / "siglip.pt")
    towers = OpenClip("toy-siglip", weights=str(tmp_path / "siglip.pt"))
    text = towers.build().text
    ids, mask = captions(vocab=100, end=99)
    expected = model.encode_text(ids.masked_fill(~mask, 1))
    short = mask.sum(1) <= 12
    torch.testing.assert_close(text(ids, mask)[:, 0], expected)
    torch.testing.assert_close(text(ids[short, :12], mask[short, :12])[:, 0], expected[short])


def test_bias_of_the_weights_comes_with_their_temperature(tmp_path):
    model = published("toy-siglip", tmp_path / "siglip.pt")
    towers = OpenClip("toy-siglip", weights=str(tmp_path / "siglip.pt"))
    spec = {"towers": towers, "projection": "none", "temperature_form": "logit_scale", "bias": -3.0}
    taken, given = Dual(**spec, temperature=None).build(), Dual(**spec, temperature=0.5).build()
    torch.testing.assert_close(taken.bias, model.logit_bias.reshape(1))
    assert (given.bias.item(), given.scale.item()) == (-3.0, pytest.approx(2.0))


def test_text_beyond_the_context_is_an_error_and_a_shorter_context_can_be_set():
    text = OpenClip("toy-clip", context_length=8).build().text
    ids, mask = captions(lengths=(5, 8, 6))
    assert text(ids[:, :8], mask[:, :8]).shape == (3, 1, 40)
    with pytest.raises(ValueError, match="9 tokens"):
        text(ids[:, :9], mask[:, :9])
    with pytest.raises(UserError, match="20 or less"):
        OpenClip("toy-clip", context_length=21).build()


def test_own_tokenizer_and_tower_agree_on_vocabulary_and_end_token():
    tokenizer = OpenClipTokenizer("toy-clip")
    text = OpenClip("toy-clip").build().text.eval()
    ids, mask, _ = tokenizer(["a dog!", "two dogs run over a green field"], 20)
    theirs = open_clip.get_tokenizer("toy-clip")(["a dog!", "two dogs run over a green field"])
    assert tokenizer.vocab_size == text.vocab_size
    model = open_clip.create_model("toy-clip", force_custom_text=True).eval()
    model.text.load_state_dict(text.text.state_dict())
    torch.testing.assert_close(text(ids, mask)[:, 0], model.encode_text(theirs))


@pytest.mark.parametrize("name", ["hf-hub:timm/ViT-B-16-SigLIP", "local-dir:/tmp/model"])
def test_name_with_a_schema_downloads_and_reads_nothing(name):
    def refuse(*args, **kwargs):
        raise AssertionError("open_clip was asked for the model")

    with patch.object(open_clip, "get_model_config", refuse), patch.object(open_clip, "create_model", refuse):
        for use in (OpenClip(name).resolved, OpenClip(name).build, Dual(towers=OpenClip(name)).resolved):
            with pytest.raises(UserError, match="is not one of open_clip's own models, and nothing is downloaded"):
                use()


def test_preprocessing_is_that_of_the_weights():
    assert OpenClip("ViT-B-32").resolved().mean == open_clip.OPENAI_DATASET_MEAN
    siglip = OpenClip("ViT-B-16-SigLIP").resolved()
    assert (siglip.mean, siglip.std, siglip.interpolation, siglip.context_length) == (
        (0.5,) * 3,
        (0.5,) * 3,
        "bicubic",
        64,
    )
    preprocess = OpenClip("toy-clip", std=(0.1, 0.2, 0.3)).build().image.preprocess
    assert (preprocess.size, preprocess.std) == ((32, 32), (0.1, 0.2, 0.3))


@pytest.mark.parametrize("name", ["toy-clip", "toy-resnet", "toy-timm"])
def test_all_parameters_learn_and_have_a_depth(name):
    dual = Dual(towers=OpenClip(name), projection="none").build()
    size = dual.preprocess.size
    image, text = dual.encode_image(torch.randn(2, 3, *size)), dual.encode_text(*captions())
    (image.embed @ text.embed.T * dual.scale).square().sum().backward()
    names = [key for key, _ in dual.named_parameters()]
    assert [key for key, parameter in dual.named_parameters() if parameter.grad is None] == []
    ids = dual.layer_ids()
    assert set(ids) == set(names)
    assert [ids[f"text.text.transformer.resblocks.{i}.ln_1.weight"] for i in range(3)] == sorted(
        ids[f"text.text.transformer.resblocks.{i}.ln_1.weight"] for i in range(3)
    )
    assert ids["text.text.text_projection"] == max(ids.values()) - 1
    assert {"text.text.positional_embedding", "temperature"} < dual.no_weight_decay() <= set(names)


def test_layer_ids_follow_the_blocks():
    towers = OpenClip("toy-clip").build()
    image, text = towers.image.layer_ids(), towers.text.layer_ids()
    assert image["visual.conv1.weight"] == image["visual.class_embedding"] == text["text.token_embedding.weight"] == 0
    assert [image[f"visual.transformer.resblocks.{i}.ln_1.weight"] for i in range(2)] == [1, 2]
    assert image["visual.ln_post.weight"] == image["visual.proj"] == 3
    assert text["text.ln_final.weight"] == text["text.text_projection"] == 4


def test_checkpointing_leaves_gradients_as_they_are():
    towers = OpenClip("toy-clip").build()
    calls, gradients = [], []
    towers.image.visual.transformer.resblocks[0].register_forward_pre_hook(lambda *_: calls.append("image"))
    towers.text.text.transformer.resblocks[0].register_forward_pre_hook(lambda *_: calls.append("text"))
    image, (ids, mask) = torch.randn(2, 3, 32, 32), captions(lengths=(6, 6))
    for how in ("none", "full"):
        for tower in towers[:2]:
            tower.zero_grad()
            tower.set_activation_checkpointing(how)
        (towers.image(image) * towers.text(ids, mask)).sum().backward()
        gradients.append([p.grad.clone() for tower in towers[:2] for p in tower.parameters()])
    assert sorted(calls) == ["image"] * 3 + ["text"] * 3
    torch.testing.assert_close(gradients[0], gradients[1])
    with pytest.raises(UserError, match="whole blocks only"):
        towers.text.set_activation_checkpointing("cheap")
    with pytest.raises(UserError, match="ResNet"):
        OpenClip("toy-resnet").build().image.set_activation_checkpointing("full")


def test_building_leaves_the_programs_logging_alone():
    handlers = list(logging.getLogger().handlers)
    OpenClip("toy-clip").build()
    assert logging.getLogger().handlers == handlers


def test_resolved_spec_builds_without_weights(tmp_path):
    published("toy-clip", tmp_path / "clip.pt")
    spec = OpenClip("toy-clip", weights=str(tmp_path / "clip.pt")).resolved()
    (tmp_path / "clip.pt").unlink()
    towers = spec.build(load_weights=False)
    assert (towers.scale, towers.image.preprocess.mean) == (None, spec.mean)


@pytest.mark.parametrize(
    "spec, message",
    [
        (OpenClip("ViT-B-31"), "did you mean ViT-B-32"),
        (OpenClip("ViT-B-32", weights="nowhere.pt"), "no such file"),
        (OpenClip("coca_ViT-B-32"), "decoder"),
        (OpenClip("roberta-ViT-B-32"), "BertText"),
    ],
)
def test_invalid_spec_is_a_user_error(spec, message):
    with pytest.raises(UserError, match=message) as error:
        spec.build()
    assert "\n" not in str(error.value)


def test_weights_of_another_model_are_refused(tmp_path):
    published("toy-resnet", tmp_path / "resnet.pt")
    with pytest.raises(UserError, match="visual"):
        OpenClip("toy-clip", weights=str(tmp_path / "resnet.pt")).build()


def test_failed_download_is_a_user_error(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no route\nto the hub")

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(UserError, match="no route to the hub"):
        OpenClip("ViT-B-32", weights="laion2b_s34b_b79k").build()


def test_scale_of_the_weights_is_their_exponential(tmp_path):
    model = published("toy-clip", tmp_path / "clip.pt")
    towers = OpenClip("toy-clip", weights=str(tmp_path / "clip.pt")).build()
    assert towers.scale == pytest.approx(math.exp(model.logit_scale.item())) and towers.bias is None
