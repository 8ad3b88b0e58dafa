"""An evaluation that shares images with the training data is refused, or the images are counted."""

import json
from pathlib import Path

import pytest

from tests.conftest import draw_pairs, toy_overrides
from tests.processes import train
from vlp.cli import main
from vlp.config import Data
from vlp.data.preparing.pack import Packing, pack
from vlp.data.reading.annotated import Annotated
from vlp.data.reading.shards import Source
from vlp.errors import UserError
from vlp.tasks.base import Task
from vlp.tasks.captioning import CaptionQuality
from vlp.tasks.contamination import contaminated_images
from vlp.tasks.grounding import Grounding
from vlp.tasks.pair_classification import PairClassification
from vlp.tasks.probe import Knn
from vlp.tasks.retrieval import Retrieval
from vlp.tasks.vqa import Vqa


class Undeclared(Task):
    """Task that does not tell which images it evaluates."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """``train`` and ``val`` shards that share images 10 to 13, and ``clean`` shards without shared images."""
    folder = tmp_path_factory.mktemp("mixed")
    pairs = draw_pairs(folder / "pictures", 40)
    for name, part in (("train", pairs[:14]), ("val", pairs[10:30]), ("clean", pairs[30:])):
        pack(part, folder / name, Packing(shard_samples=6))
    return folder


def data_of(mixed: Path, *sources: str) -> Data:
    return Data(train=tuple(Source(str(mixed / name)) for name in sources or ("train",)))


def test_shared_images_are_counted_or_refused(mixed):
    task = Retrieval(data=str(mixed / "val"))
    with pytest.raises(
        UserError, match=r"^4 of the 20 images to evaluate were trained on, the first .*/0010 as .*/0010"
    ):
        contaminated_images(task, data_of(mixed), allow=False)
    assert contaminated_images(task, data_of(mixed), allow=True) == 4
    assert contaminated_images(Retrieval(data=str(mixed / "clean")), data_of(mixed, "train", "val"), allow=False) == 0


def test_training_shards_may_be_evaluated_and_are_counted(mixed):
    assert contaminated_images(Retrieval(data=str(mixed / "train" / ".." / "train")), data_of(mixed), allow=False) == 14


def test_images_in_folders_are_compared_with_shards(mixed, tmp_path):
    rows = [
        {"image": str(path), "label": n % 2, "split": "train" if n < 20 else "val"}
        for n, path in enumerate(sorted((mixed / "pictures").glob("*.png")))
    ]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = Knn(data=str(tmp_path))
    assert contaminated_images(task, data_of(mixed), allow=False) == 0  # images of the train split do not count
    pack(draw_pairs(tmp_path / "again", 24)[16:], tmp_path / "shards", Packing(shard_samples=9))
    with pytest.raises(UserError, match=r"^4 of the 20 .* the first .*0020\.png as "):
        contaminated_images(
            task, Data(train=(Source(str(mixed / "train")), Source(str(tmp_path / "shards")))), allow=False
        )


def annotations(path: Path, images: Path, names: list[str]) -> Annotated:
    lines = [{"image": name, "text": "what is it?", "answers": ["a"], "split": "val"} for name in names]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Annotated(str(path), images=str(images), answers="answers")


@pytest.mark.parametrize("task", [Vqa, PairClassification, Grounding])
def test_images_of_annotations_are_compared_with_all_training_images(mixed, tmp_path, task):
    pictures = mixed / "pictures"
    trained = annotations(tmp_path / "a.jsonl", pictures, [f"{n:04d}.png" for n in (0, 0, 1, 2, 20)])
    asked = annotations(tmp_path / "b.jsonl", pictures, [f"{n:04d}.png" for n in (2, 2, 3, 20, 39, 99)])
    task, both = task(data=asked.path, images=str(pictures)), Data(train=(trained, Source(str(mixed / "train"))))
    with pytest.raises(
        UserError, match="^2 of the 5 images to evaluate were trained on, the first 0002.png as 0002.png"
    ):
        contaminated_images(task, Data(train=(trained,)), allow=False)
    assert contaminated_images(task, both, allow=True) == 3  # and 0003 of the shards
    assert contaminated_images(task, Data(train=(Source(str(mixed / "clean")),)), allow=True) == 1


def test_captioning_refuses_training_images(mixed):
    with pytest.raises(UserError, match="^4 of the 20"):
        contaminated_images(CaptionQuality(data=str(mixed / "val")), data_of(mixed), allow=False)


def test_count_is_none_where_it_is_not_known(mixed):
    task = Retrieval(data=str(mixed / "val"))
    assert contaminated_images(task, Data(train=()), allow=False) is None  # weights without a run
    assert contaminated_images(task, data_of(mixed, "train", "nowhere"), allow=False) is None
    assert contaminated_images(task, Data(train=(Source("s3://bucket/train"),)), allow=False) is None
    assert contaminated_images(Undeclared(), data_of(mixed), allow=False) is None


def test_eval_refuses_contamination_unless_allowed(mixed, world, tmp_path, capsys):
    train(*toy_overrides(world, tmp_path), f"data.train={mixed / 'train'}", "train.steps=1", "data.workers=0")
    arguments = ["eval", str(tmp_path / "toy"), "retrieval", f"data={mixed / 'val'}", "resamples=5"]
    capsys.readouterr()
    assert main(arguments) == 2
    assert "say allow_contamination=true" in capsys.readouterr().err
    assert main([*arguments, "allow_contamination=true"]) == 0
    assert "4 of the images trained on" in capsys.readouterr().out
    assert main([*arguments, "allow_leak=true"]) == 0  # the earlier name
    written = next((tmp_path / "toy" / "eval").glob("retrieval-*.json"))
    assert json.loads(written.read_text())["trained_on"] == 4


def test_evaluation_during_training_counts_contamination(mixed, world, tmp_path):
    own = [f"data.train={mixed / 'train'}", f"data.val={mixed / 'val'}", "train.steps=1", "data.workers=0"]
    train(*toy_overrides(world, tmp_path), *own)
    assert json.loads((tmp_path / "toy" / "eval" / "retrieval.json").read_text())["trained_on"] == 4
