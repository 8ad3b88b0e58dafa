"""`vlp.load`: the numbers of ``vlp eval`` from Python."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import vlp
from tests import processes
from tests.conftest import COLOURS, ROOT, toy_overrides
from tests.models.test_albef import SPEC
from tests.weights.test_run import BERT, IMAGE, run_of
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.loading.api import TrainedModel
from vlp.loading.base import on_device
from vlp.models.single import Single
from vlp.tasks.embeddings import encode_pairs
from vlp.tasks.zero_shot import class_embedding

NAMES = [f"{colour} square" for colour in COLOURS]


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    processes.train(*toy_overrides(world, output), "train.steps=2", "save.every=2", "data.workers=0")
    return output / "toy"


@pytest.fixture(scope="module")
def model(run):
    return vlp.load(run)


@pytest.fixture(scope="module")
def files(world):
    return sorted((world / "pictures").glob("*.png"))[:7]


def test_embeddings_are_those_of_retrieval(model, world):
    pairs = encode_pairs(model.eval_model, str(world / "shards"), batch_size=16)
    files = sorted((world / "pictures").glob("*.png"))
    images, texts = model.encode_images(files, batch_size=16), model.encode_texts(pairs.captions)
    assert images.shape == (50, 24) and texts.shape == (100, 24)
    torch.testing.assert_close(images, pairs.images, rtol=0, atol=1e-6)
    torch.testing.assert_close(texts, pairs.texts, rtol=0, atol=1e-6)
    similarity = model.similarity(files, pairs.captions)
    torch.testing.assert_close(similarity, pairs.images @ pairs.texts.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(50))


def test_file_pil_image_and_array_are_encoded_alike(model, files):
    opened = [Image.open(file) for file in files]
    pixels = [np.array(image.convert("RGB")) for image in opened]
    from_files = model.encode_images([str(file) for file in files])
    assert torch.equal(from_files, model.encode_images(opened))
    assert torch.equal(from_files, model.encode_images(pixels))
    assert len({tuple(row) for row in from_files.tolist()}) == len(files)


def test_result_does_not_depend_on_the_batch_size_and_may_be_empty(model, files):
    torch.testing.assert_close(model.encode_images(files, batch_size=3), model.encode_images(files), rtol=0, atol=1e-6)
    assert model.encode_images([]).shape == model.encode_texts([]).shape == (0, 24)


def test_probabilities_of_classes_are_the_softmax_of_scaled_similarities(model, files):
    templates = ["a {}", "the {} thing"]
    scores = model.classify(files[0], NAMES, prompts=templates)
    classes = torch.stack([class_embedding(model.eval_model, name, templates) for name in NAMES])
    scale = float(model.eval_model.model.scale.detach())
    expected = (scale * model.encode_images(files[:1])[0] @ classes.T).softmax(0)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    torch.testing.assert_close(torch.tensor([scores[name] for name in NAMES]), expected.detach())
    assert scores == model.classify(files[0], NAMES, prompts="|".join(templates))


def test_training_mode_is_restored(model, files):
    model.eval_model.model.train()
    model.encode_images(files)
    model.similarity(files, ["a"])
    assert all(module.training for module in model.eval_model.model.modules())
    model.eval_model.model.eval()


@pytest.fixture
def albef(model):
    """An ALBEF with the data settings and the tokenizer of the toy run."""
    torch.manual_seed(0)
    text = replace(SPEC.text, config=SPEC.text.config | {"vocab_size": 200})
    data = model.eval_model.data
    return TrainedModel(on_device(replace(SPEC, text=text).build(), model.eval_model.tokenizer, data, name="albef"))


def test_match_is_the_probability_of_the_matching_head(albef, files):
    module, eval_model = albef.eval_model.model, albef.eval_model
    found = albef.match(files[0], "red thing")
    pixels = eval_model.data.resize(np.array(Image.open(files[0])), (32, 32), eval_model.preprocess.interpolation)
    with torch.no_grad():
        image, text = eval_model.encode_images([pixels]), eval_model.encode_texts(["red thing"])
        expected = module.match(module.project(image), text).softmax(1)[0, 1]
    assert found == pytest.approx(float(expected)) and 0 < found < 1
    assert found != albef.match(files[1], "red thing")


def test_unsupported_method_is_a_user_error(tmp_path, model, albef, files, world):
    run_of(tmp_path / "text", Single(text=BertText(config=BERT | {"vocab_size": 200})))
    run_of(tmp_path / "image", Single(image=IMAGE))
    (tmp_path / "text" / "tokenizer").symlink_to(world / "tokenizer")
    texts, images = vlp.load(tmp_path / "text", max_length=9), vlp.load(tmp_path / "image")
    assert texts.encode_texts(["red"]).shape[0] == images.encode_images(files[:1]).shape[0] == 1
    without = TrainedModel(replace(albef.eval_model, tokenizer=None))
    for call, message in (
        (lambda: model.match(files[0], "red"), "toy .DualEncoder. has no head for image-text matching"),
        (lambda: texts.encode_images(files), "no embeddings of images alone"),
        (lambda: images.encode_texts(["red"]), "no embeddings of texts alone"),
        (lambda: images.similarity(files, ["red"]), "does not put images and texts into one space"),
        (lambda: texts.classify(files[0], NAMES), "does not put images and texts into one space"),
        (lambda: without.encode_texts(["red"]), "without a tokenizer; give vlp.load"),
        (lambda: without.match(files[0], "red"), "without a tokenizer"),
        (lambda: model.classify(files[0], NAMES, "a photo"), "has no {} for the class name"),
        (lambda: model.encode_images([tmp_path / "nothing.png"]), "cannot read the image"),
        (lambda: model.encode_images([np.zeros((3, 8, 8), dtype=np.float32)]), "give .height, width, 3. uint8"),
        (lambda: vlp.load(tmp_path / "nothing"), "no such file or folder"),
        (lambda: vlp.load(tmp_path / "image", image_size=64), "leave it out"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="a list is needed"):
        model.encode_texts("red")


def test_checkpoint_and_device_can_be_chosen(run):
    chosen = vlp.load(run, checkpoint=2, device="cpu")
    assert chosen.eval_model.device == torch.device("cpu")
    with pytest.raises(UserError, match="no checkpoint step-00000099"):
        vlp.load(run, checkpoint=99)


def test_run_with_own_classes_needs_their_config(tmp_path, world):
    config = ROOT / "examples" / "my_towers.py"
    overrides = [*toy_overrides(world, tmp_path), "train.steps=1", "data.batch_size=8", "data.max_length=16"]
    assert processes.run("train", config, *overrides).codes == [0]
    with pytest.raises(UserError, match="--config"):
        vlp.load(tmp_path / "my-towers")
    assert vlp.load(tmp_path / "my-towers", config=str(config)).encode_texts(["red"]).shape == (1, 64)


def test_importing_vlp_imports_neither_torch_nor_its_own_modules():
    code = "import sys, vlp; print(*(m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'vlp')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.split() == ["vlp"]
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        vlp.lod  # noqa: B018
