"""Published models see the pixels of their own preprocessing, on images of odd sizes; other preprocessing is refused."""

import json

import numpy as np
import open_clip
import pytest
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image

from tests.loading.test_load_model import TEXT, VISION, WORDS, unit
from vlp.data.augment import Resize
from vlp.data.preprocess import Preprocess
from vlp.encoders.open_clip import OpenClip, pretrained_settings
from vlp.errors import UserError
from vlp.loading.base import LoadOptions
from vlp.loading.load_model import load_model
from vlp.loading.open_clip import RESIZE_MODES

SIZES = [(97, 131), (131, 97), (64, 65), (33, 200), (301, 50), (41, 40), (479, 641), (15, 13)]  # (height, width)


def image_of(height: int, width: int) -> Image.Image:
    """A smooth image with sharp edges, as a photo has them."""
    rng = np.random.default_rng(height * 1000 + width)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (255, 0, 128)
    return Image.fromarray(pixels)


IMAGES = [image_of(*size) for size in SIZES]


def save(folder, processor, kind: str = "clip", size: tuple[int, int] = (32, 32)) -> None:
    """A tiny model of transformers with weights far from their initial values, and this processor."""
    torch.manual_seed(0)
    vision = VISION | {"image_size": size[0], "patch_size": 8}
    if kind == "clip":
        text = TEXT | {"bos_token_id": 2, "eos_token_id": 3, "projection_dim": 10}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)
        model = transformers.CLIPModel(config)
    else:
        config = transformers.SiglipConfig(text_config=TEXT | {"projection_size": 16}, vision_config=vision)
        model = transformers.SiglipModel(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)


def pixels_of(eval_model, image: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) as the model gets them."""
    resized = eval_model.data.resize(np.array(image), eval_model.preprocess.size, eval_model.preprocess.interpolation)
    return eval_model.preprocess.normalise(resized[None])


PROCESSORS = {
    "shortest 32": ("clip", transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)),
    "shortest 37, crop 32": ("clip", transformers.CLIPImageProcessor(size={"shortest_edge": 37}, crop_size=32)),
    "bilinear": ("clip", transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32, resample=2)),
    "not normalised": (
        "clip",
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32, do_normalize=False),
    ),
    "squashed": ("siglip", transformers.SiglipImageProcessor(size={"height": 32, "width": 32})),
    "squashed, cropped": (
        "siglip",
        transformers.CLIPImageProcessor(size={"height": 41, "width": 41}, crop_size=32),
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_and_embeddings_equal_those_of_the_folders_own_processor(tmp_path, name):
    kind, processor = PROCESSORS[name]
    save(tmp_path, processor, kind)
    eval_model = load_model(str(tmp_path)).eval_model
    own_processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    own = transformers.AutoModel.from_pretrained(tmp_path).eval()
    step = 1 / 255 / min(eval_model.preprocess.std)
    for image in IMAGES:
        given, found = own_processor(images=[image], return_tensors="pt"), pixels_of(eval_model, image)
        torch.testing.assert_close(found, given["pixel_values"].float(), rtol=0, atol=1.01 * step)
        with torch.no_grad():
            expected = unit(own.get_image_features(**given))
            torch.testing.assert_close(eval_model.model.encode_image(found).embed, expected, rtol=0, atol=1e-4)


REFUSED = {
    "not resized": (transformers.CLIPImageProcessor(do_resize=False), "does not resize images"),
    "not cropped": (transformers.CLIPImageProcessor(do_center_crop=False), "does not crop images"),
    "crop larger than the image": (
        transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=32),
        "which would be padded",
    ),
    "crop of another shape": (
        transformers.CLIPImageProcessor(size={"height": 40, "width": 48}, crop_size=32),
        "only crops of the same shape",
    ),
    "crop that is no square": (
        transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 24}),
        "only squares are supported",
    ),
    "two edges": (
        transformers.CLIPImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}, crop_size=32),
        "only shortest_edge, or height and width",
    ),
    "another filter": (transformers.CLIPImageProcessor(resample=0), "only bilinear and bicubic"),
    "another processor": (transformers.ConvNextImageProcessor(), "whose steps are unknown"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_preprocessing_that_cannot_be_expressed_is_refused(tmp_path, name):
    processor, message = REFUSED[name]
    save(tmp_path, processor)
    with pytest.raises(UserError, match=message) as raised:
        load_model(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_siglip2_is_squashed_only_on_request(tmp_path):
    torch.manual_seed(0)
    vision = VISION | {"num_patches": 4, "patch_size": 16}
    config = transformers.Siglip2Config(text_config=TEXT | {"projection_size": 16}, vision_config=vision)
    transformers.Siglip2Model(config).save_pretrained(tmp_path)
    transformers.Siglip2ImageProcessor(patch_size=16, max_num_patches=4).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="keeps the aspect ratio of images, .* say resize=squash"):
        load_model(str(tmp_path))
    eval_model = load_model(str(tmp_path), options=LoadOptions(resize="squash")).eval_model
    assert pixels_of(eval_model, IMAGES[0]).shape == (1, 3, 32, 32)


def test_weights_in_a_file_outside_the_folder_are_refused(tmp_path):
    save(tmp_path, PROCESSORS["shortest 32"][1])
    (tmp_path / "model.safetensors").rename(tmp_path.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"logit_scale": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names '../outside.safetensors', which is not a file in the folder"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name, tag", [("ViT-B-32", "openai"), ("ViT-B-16-SigLIP", "webli")])
def test_a_file_of_open_clips_weights_keeps_their_preprocessing(tmp_path, name, tag):
    """Of SigLIP also the resize mode, which squashes the image."""
    settings = pretrained_settings(name, str(tmp_path / "weights.pt"))
    assert settings["resize_mode"] == ("squash" if "SigLIP" in name else "shortest") or "resize_mode" not in settings
    spec = OpenClip(name, weights=str(tmp_path / "weights.pt")).resolved()
    own = open_clip.get_pretrained_cfg(name, tag)
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    theirs = image_transform_v2(PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(size), own)), is_train=False)
    preprocess = Preprocess((size, size), spec.mean, spec.std, spec.interpolation)
    resize = Resize(RESIZE_MODES[settings.get("resize_mode") or "shortest"], resampler="pil")
    for image in IMAGES:
        pixels = resize(np.array(image), preprocess.size, preprocess.interpolation)
        torch.testing.assert_close(preprocess.normalise(pixels[None])[0], theirs(image), rtol=0, atol=1e-5)
