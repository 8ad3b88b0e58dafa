"""An evaluation that shares pictures with the training data is refused, or says so."""

import json
from pathlib import Path

import pytest

from tests.conftest import draw_pairs, toy_overrides
from tests.processes import train
from vlp.cli import main
from vlp.config import Data
from vlp.data.pack import Packing, pack
from vlp.data.shards import Source
from vlp.errors import UserError
from vlp.leaks import leaked
from vlp.tasks.probe import Knn
from vlp.tasks.retrieval import Retrieval


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """``train`` and ``val`` shards that share the pictures 10 to 13, and ``clean``, which shares none."""
    folder = tmp_path_factory.mktemp("mixed")
    pairs = draw_pairs(folder / "pictures", 40)
    for name, part in (("train", pairs[:14]), ("val", pairs[10:30]), ("clean", pairs[30:])):
        pack(part, folder / name, Packing(shard_samples=6))
    return folder


def data_of(mixed: Path, *sources: str) -> Data:
    return Data(train=tuple(Source(str(mixed / name)) for name in sources or ("train",)))


def test_shared_pictures_are_counted_or_refused(mixed):
    task = Retrieval(data=str(mixed / "val"))
    with pytest.raises(
        UserError, match=r"^4 of the 20 pictures to evaluate were trained on, the first .*/0010 as .*/0010"
    ):
        leaked(task, data_of(mixed), allow=False)
    assert leaked(task, data_of(mixed), allow=True) == 4
    assert leaked(Retrieval(data=str(mixed / "clean")), data_of(mixed, "train", "val"), allow=False) == 0


def test_the_training_shards_themselves_may_be_evaluated_and_are_counted(mixed):
    assert leaked(Retrieval(data=str(mixed / "train" / ".." / "train")), data_of(mixed), allow=False) == 14


def test_pictures_in_folders_are_compared_with_shards(mixed, tmp_path):
    rows = [
        {"image": str(path), "label": n % 2, "split": "train" if n < 20 else "val"}
        for n, path in enumerate(sorted((mixed / "pictures").glob("*.png")))
    ]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = Knn(data=str(tmp_path))
    assert leaked(task, data_of(mixed), allow=False) == 0  # those of the train split do not count
    pack(draw_pairs(tmp_path / "again", 24)[16:], tmp_path / "shards", Packing(shard_samples=9))
    with pytest.raises(UserError, match=r"^4 of the 20 .* the first .*0020\.png as "):
        leaked(task, Data(train=(Source(str(mixed / "train")), Source(str(tmp_path / "shards")))), allow=False)


def test_what_cannot_be_told_is_not_made_up(mixed):
    task = Retrieval(data=str(mixed / "val"))
    assert leaked(task, Data(train=()), allow=False) is None  # weights without a run
    assert leaked(task, data_of(mixed, "train", "nowhere"), allow=False) is None
    assert leaked(task, Data(train=(Source("s3://bucket/train"),)), allow=False) is None
    assert leaked(object(), data_of(mixed), allow=False) is None


def test_eval_refuses_unless_told_otherwise(mixed, world, tmp_path, capsys):
    train(*toy_overrides(world, tmp_path), f"data.train={mixed / 'train'}", "train.steps=1", "data.workers=0")
    arguments = ["eval", str(tmp_path / "toy"), "retrieval", f"data={mixed / 'val'}", "resamples=5"]
    capsys.readouterr()
    assert main(arguments) == 2
    assert "say allow_leak=true" in capsys.readouterr().err
    assert main([*arguments, "allow_leak=true"]) == 0
    assert "4 of the pictures trained on" in capsys.readouterr().out
    written = next((tmp_path / "toy" / "eval").glob("retrieval-*.json"))
    assert json.loads(written.read_text())["trained_on"] == 4
