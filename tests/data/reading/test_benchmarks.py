"""Public sets of labelled images in their own forms."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from tests.tasks.fakes import NAMES, ColourModel, eval_model
from vlp.data.reading.labelled import read_labelled, read_pixels, read_train_and_test
from vlp.errors import UserError
from vlp.tasks.zero_shot import ZeroShot

RNG = np.random.default_rng(0)


def records(count: int, *labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 32, 32, 3), and the file that holds them behind their labels."""
    pictures = RNG.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    rows = pictures.transpose(0, 3, 1, 2).reshape(count, -1)
    return pictures, np.concatenate([*(label[:, None] for label in labels), rows], axis=1).astype(np.uint8)


@pytest.fixture
def cifar10(tmp_path):
    (tmp_path / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n\n")
    labels, pictures = np.arange(18) % 3, []
    for n in range(6):
        name = f"data_batch_{n + 1}.bin" if n < 5 else "test_batch.bin"
        own, data = records(3, labels[3 * n : 3 * n + 3])
        data.tofile(tmp_path / name)
        pictures.append(own)
    return tmp_path, np.concatenate(pictures)


def test_cifar10_is_what_its_binary_files_hold(cifar10):
    folder, pictures = cifar10
    found, names = read_labelled(folder, None)
    assert names == ["airplane", "automobile", "bird"] and [label for _, label in found] == [0, 1, 2] * 6
    assert all(np.array_equal(read_pixels(p, 0), own) for (p, _), own in zip(found, pictures))
    train, test, _ = read_train_and_test(folder, "train", "test")
    assert len(train) == 15 and np.array_equal(read_pixels(test[2][0], 0), pictures[17])


def test_cifar100_has_the_fine_label_second(tmp_path):
    (tmp_path / "fine_label_names.txt").write_text("apple\naquarium_fish\nbaby\n")
    pictures, data = records(4, np.array([9, 9, 8, 8]), np.array([2, 0, 1, 2]))
    data.tofile(tmp_path / "test.bin")
    found, names = read_labelled(tmp_path, "test")
    assert names == ["apple", "aquarium_fish", "baby"] and [label for _, label in found] == [2, 0, 1, 2]
    assert np.array_equal(read_pixels(found[3][0], 0), pictures[3])


def test_damaged_or_pickled_cifar_is_refused(cifar10, tmp_path_factory):
    folder, _ = cifar10
    with pytest.raises(UserError, match="no split 'val'"):
        read_labelled(folder, "val")
    whole = (folder / "test_batch.bin").read_bytes()
    (folder / "test_batch.bin").write_bytes(whole[:-1])
    with pytest.raises(UserError, match="not a multiple of the record size"):
        read_labelled(folder, "test")
    (folder / "test_batch.bin").write_bytes(b"\x07" + whole[1:])
    with pytest.raises(UserError, match="has the class 7"):
        read_labelled(folder, "test")
    (folder / "test_batch.bin").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        read_labelled(folder, "test")
    python = tmp_path_factory.mktemp("python")
    (python / "batches.meta").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match="fetch the binary version"):
        read_labelled(python, None)


def test_zero_shot_on_cifar_takes_its_prompts(tmp_path):
    from tests.conftest import COLOURS

    (tmp_path / "batches.meta.txt").write_text("\n".join(NAMES))
    pixels = np.concatenate([np.repeat(np.array(COLOURS[name], np.uint8), 32 * 32)[None] for name in NAMES])
    np.concatenate([np.arange(5, dtype=np.uint8)[:, None], pixels], axis=1).tofile(tmp_path / "test_batch.bin")
    result = ZeroShot(data=str(tmp_path), split="test")(eval_model(ColourModel()))
    assert result.metrics["top1"].value == 1.0 and result.n == {"images": 5, "classes": 5, "prompts": 18}
    assert "prompts: cifar" in result.protocol


def test_objectnet_counts_the_classes_that_imagenet_has_by_its_own_mappings(tmp_path):
    labels = {"mug": "Mug", "t-shirt": "T-shirt", "leaf": "Leaf"}
    (tmp_path / "mappings").mkdir()
    (tmp_path / "mappings" / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    shared = {"Mug": "coffee mug", "T-shirt": "jersey, T-shirt, tee shirt"}
    (tmp_path / "mappings" / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
    for name in labels:
        (tmp_path / "images" / name).mkdir(parents=True)
        pixels = np.full((20, 30, 3), (255, 0, 0), np.uint8)
        pixels[2:-2, 2:-2] = 90
        Image.fromarray(pixels).save(tmp_path / "images" / name / "0.png")
    found, names = read_labelled(tmp_path, None)
    assert names == ["mug", "t-shirt"] and [label for _, label in found] == [0, 1]
    assert np.array_equal(read_pixels(found[0][0], 1000), np.full((16, 26, 3), 90))
    (tmp_path / "mappings" / "objectnet_to_imagenet_1k.json").write_text("[")
    with pytest.raises(UserError, match="cannot be read"):
        read_labelled(tmp_path, None)
