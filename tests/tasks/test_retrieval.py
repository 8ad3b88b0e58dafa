"""Retrieval: recalls of models with known answers, and the same result for any batch size and number of processes."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.conftest import ROOT, environment, toy_overrides, vlp
from tests.processes import free_port, run, train
from tests.tasks.fakes import BlindModel, ColourModel, eval_model
from vlp.data.preparing.formats import Pair
from vlp.data.preparing.pack import Packing, pack
from vlp.data.reading.shards import Source
from vlp.errors import UserError
from vlp.tasks.embeddings import encode_pairs
from vlp.tasks.metrics import ranks
from vlp.tasks.naming import protocol_name
from vlp.tasks.rerank import Shortlist
from vlp.tasks.retrieval import Retrieval
from vlp.types import Encoded


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """Shards with one plain image of each colour. The first has three captions, the others one."""
    import numpy as np
    from PIL import Image

    from tests.conftest import COLOURS

    folder = tmp_path_factory.mktemp("colours")
    pairs = []
    for n, (name, value) in enumerate(COLOURS.items()):
        Image.fromarray(np.full((9, 9, 3), value, dtype=np.uint8)).save(folder / f"{n}.png")
        captions = tuple(f"{name} number {i}" for i in range(1 if n else 3))
        pairs.append(Pair(image=str(folder / f"{n}.png"), captions=captions, key=str(n), source="colours", extra={}))
    pack(pairs, folder / "shards", Packing(shard_samples=2))
    return folder / "shards"


def test_perfect_model_has_recall_one(colours):
    result = Retrieval(data=str(colours), ks=(1, 2))(eval_model(ColourModel()))
    assert {m: i.value for m, i in result.metrics.items()} == pytest.approx(dict.fromkeys(result.metrics, 1.0))
    assert set(result.metrics) == {f"{way}_r@{k}" for way in ("i2t", "t2i", "mean") for k in (1, 2)} | {"mean_recall"}
    assert result.n == {"images": 5, "captions": 7} and result.data == str(colours)


def test_blind_model_has_recall_zero(colours):
    result = Retrieval(data=str(colours), ks=(1, 4, 5))(eval_model(BlindModel()))
    recalls = {m: i.value for m, i in result.metrics.items()}
    assert recalls["i2t_r@1"] == recalls["t2i_r@4"] == 0
    assert recalls["t2i_r@5"] == 1.0  # there are five images
    assert recalls["mean_recall"] == pytest.approx((recalls["i2t_r@5"] + 1.0) / 6)


def test_both_directions_have_the_same_weight(world):
    metrics = Retrieval(data=str(world / "shards"), resamples=100)(eval_model(ColourModel())).metrics
    for k in (1, 5, 10):
        mean = (metrics[f"i2t_r@{k}"].value + metrics[f"t2i_r@{k}"].value) / 2
        assert metrics[f"mean_r@{k}"].value == pytest.approx(mean)
        assert metrics[f"mean_r@{k}"].low <= mean <= metrics[f"mean_r@{k}"].high
    means = [metrics[f"mean_r@{k}"].value for k in (1, 5, 10)]
    assert metrics["mean_recall"].value == pytest.approx(sum(means) / 3)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_pairs_are_encoded_once_in_the_order_of_the_source(world, batch_size):
    pairs = encode_pairs(eval_model(ColourModel()), str(world / "shards"), batch_size)
    assert len(pairs.images) == 50 and len(pairs.texts) == 100 == len(pairs.captions)
    assert len(set(pairs.image_ids.tolist())) == 50 and pairs.rows.tolist() == list(range(50))
    assert torch.equal(pairs.text_ids, pairs.image_ids.repeat_interleave(2))
    assert [int(c.split()[-1]) for c in pairs.captions[::2]] == list(range(50))


def test_examples_have_the_retrieved_images(colours):
    result = Retrieval(data=str(colours), examples=4)(eval_model(ColourModel()))
    examples = result.details["text_to_image"]
    assert len(examples) == 4
    for example in examples:
        assert example["rank"] == 1 and example["found"][0] == example["answer"]
        assert len(example["found"]) == 5


def test_no_data_is_an_error():
    with pytest.raises(UserError, match="give data=SHARDS"):
        Retrieval()(eval_model(ColourModel()))


@dataclass
class Evaluated:
    folder: Path
    one: dict
    two: dict


def strip(path: Path) -> dict:
    """Return a result without the time, the duration and the command of the evaluation."""
    found = json.loads(path.read_text())
    return {k: v for k, v in found.items() if k not in ("seconds", "time", "command")}


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(world, tmp_path):
    """Runs through the launcher, as a user would."""
    train(*toy_overrides(world, tmp_path), "train.ema_decay=0.5", "name=toy")
    folder = tmp_path / "toy"
    arguments = ("eval", folder, "retrieval", f"data={world / 'shards'}", "batch_size=7", "resamples=200")
    done = run(*arguments)
    assert done.codes == [0], done.errors
    path = folder / "eval" / "retrieval-shards.json"
    one = strip(path)
    launcher = ("--config_file", str(ROOT / "launch" / "ddp_cpu2.yaml"), "--main_process_port", str(free_port()))
    done = vlp(*arguments, launch=launcher)
    assert done.returncode == 0, done.stderr
    assert strip(path) == one
    assert done.stdout.count("written to") == 1
    assert one["checkpoint_sha256"] and one["step"] == 12 and one["seed"] == 0 and one["protocol"]
    classes = tmp_path / "classes"
    for n, picture in enumerate(sorted((world / "pictures").glob("*.png"))[:20]):
        (classes / f"class_{n % 4}").mkdir(parents=True, exist_ok=True)
        (classes / f"class_{n % 4}" / picture.name).write_bytes(picture.read_bytes())
    arguments = (
        "eval",
        folder,
        "zero-shot",
        f"data={classes}",
        "batch_size=3",
        "prompts=a {}|the {}",
        "allow_contamination=true",
    )
    results = []
    for world_size in (1, 2):
        done = run(*arguments, world=world_size)
        assert done.codes == [0] * world_size, done.errors
        results.append(strip(folder / "eval" / "zero-shot-classes-prompts=a_the_.json"))
    assert results[0] == results[1]


@pytest.mark.slow
def test_ranks_of_five_thousand_images_fit_in_a_gigabyte():
    script = ROOT / "benchmarks" / "retrieval_memory.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment(), check=True)
    measured = json.loads(done.stdout)
    assert measured["peak_growth_mib"] < 1024
    assert measured["images"] == 5000 and measured["captions"] == 25000


def test_embeddings_that_are_not_finite_are_refused(colours):
    class Diverged(ColourModel):
        def encode_image(self, image):
            encoded = super().encode_image(image)
            return Encoded(encoded.tokens, encoded.mask, encoded.embed * torch.nan)

    with pytest.raises(UserError, match="not finite"):
        Retrieval(data=str(colours))(eval_model(Diverged()))


@pytest.mark.parametrize(
    ("location", "setting", "name"),
    [
        ("data/flickr8k/val", None, "flickr8k-val-fine-tuned@run"),
        ("data/coco-val", None, "coco-val-unstated@run"),
        ("data/coco/karpathy/{000..004}.tar", "fine-tuned", "karpathy-fine-tuned@run"),
    ],
)
def test_protocol_name_has_data_setting_and_weights(location, setting, name):
    given = eval_model(ColourModel())
    given = replace(given, name="run", data=replace(given.data, train=(Source("data/flickr8k/train"),)))
    assert protocol_name(given, location, setting) == name
    assert protocol_name(replace(given, data=replace(given.data, train=())), "flickr30k-test", None) == (
        "flickr30k-test-unstated@run"
    )


class Largest(TorchFunctionMode):
    """Record the largest number of elements that an operation returned."""

    numbers = 0

    def __torch_function__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_memory_is_that_of_the_scores_of_a_chunk():
    """The whole matrix of 5,000 images x 25,000 captions would be 500 MB for each copy."""
    torch.manual_seed(0)
    images, texts, ids = torch.randn(600, 4), torch.randn(3000, 4), torch.arange(600)
    with Largest() as largest:
        ranks(images, texts, ids, ids.repeat_interleave(5))
        ranks(texts, images, ids.repeat_interleave(5), ids)
        shortlist = Shortlist(images, texts, 16)
    assert 0 < largest.numbers <= 256 * 3000 < 600 * 3000
    assert shortlist.t2i[1].shape == (3000, 16)
