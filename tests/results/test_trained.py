"""A run that was trained and evaluated by the commands becomes a record without further settings."""

import json

import pytest

from results.page import section
from results.record import make_record
from tests.conftest import TOY, toy_overrides, vlp
from vlp.specs.origin import commit


@pytest.mark.slow
def test_record_of_a_trained_run(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # as in a checkout: commands name what is below it
    (tmp_path / "toy.py").write_text(TOY.read_text())
    for name in ("shards", "tokenizer"):
        (tmp_path / name).symlink_to(world / name)
    data = [text.replace(f"{world}/", "") for text in toy_overrides(world, tmp_path) if not text.startswith("output=")]
    train = ["train", "toy.py", "train.steps=2", "save.every=2", *data]
    evaluate = ["eval", "runs/toy", "retrieval", "data=shards", "allow_contamination=true", "ks=1"]
    for command in (train, evaluate):
        done = vlp(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    said = []
    record = make_record([tmp_path / "runs" / "toy"], title="Toy", curves=["loss"], warn=said.append)
    assert record.commands == (" ".join(["vlp", *train]), " ".join(["vlp", *evaluate]))
    assert record.config == "toy.py" and bool(said) == (not commit() or commit().endswith("+changes"))
    ((run,),) = record.variants.values()
    assert run.commits == (commit(),) and run.steps == 2 and run.threads == 1 and len(run.curves["loss"]) == 2
    evaluations = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "runs/toy/eval").glob("*.json")}
    assert len(evaluations) == 2
    for metric in record.metrics:
        file, _, name = metric.partition("/")
        assert vars(run.metric(metric)) == evaluations[file]["metrics"][name]
    text = section("toy", record)
    assert "50 of its images are training images, so this is not a held-out result." in text and "### Toy" in text
