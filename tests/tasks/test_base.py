"""Checks that all tasks share, and names of result files."""

from dataclasses import replace

import pytest

from tests.conftest import TOY, toy_overrides
from tests.models.test_albef import SPEC
from tests.tasks.fakes import eval_model
from vlp.cli import main
from vlp.data.reading.annotated import Annotated
from vlp.encoders.mome import Mome
from vlp.errors import UserError
from vlp.models.single import Single
from vlp.models.vlmo import Vlmo
from vlp.specs.fields import check_limits
from vlp.tasks.naming import result_name
from vlp.tasks.pair_classification import PairClassification
from vlp.tasks.probe import Knn
from vlp.tasks.rerank import Rerank
from vlp.tasks.sentence_similarity import SentenceSimilarity
from vlp.tasks.vqa import Vqa
from vlp.tasks.zero_shot import ZeroShot

MOME = Mome(32, 2, 2, 64, vl_from=1, image_size=32, vocab_size=99, max_text_length=16)
TOGETHER = Vlmo(MOME, itc=False, itc_vl=False, itm=False, mlm=False, classes=2)


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (Knn(k=0), "k"),
        (Knn(batch_size=0), "batch_size"),
        (Vqa(questions=0), "questions"),
        (Rerank(text_batch=0), "text_batch"),
        (SentenceSimilarity(resamples=-1), "resamples"),
    ],
)
def test_numbers_outside_their_limits_are_refused(task, name):
    with pytest.raises(UserError, match=rf"^sts-dev\.{name} is -?\d; set it to at least \d"):
        check_limits(task, "sts-dev")


@pytest.mark.parametrize(
    "wrong",
    ["batch_size=0", "resamples=-1", "ks=", "ks=0,1", "workers=-1", "max_length=0", "image_size=0", "head_width=0"],
)
def test_number_outside_its_limits_on_the_command_line_is_one_line(wrong, tmp_path, capsys):
    assert main(["eval", str(tmp_path / "nothing"), "retrieval", "data=x", wrong]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and wrong.partition("=")[0] in err


def test_number_outside_its_limits_in_an_experiment_is_one_line(world, tmp_path, capsys):
    assert main(["train", str(TOY), *toy_overrides(world, tmp_path), "evaluate.retrieval.batch_size=0"]) == 2
    assert "evaluate.retrieval.batch_size is 0; set it to at least 1" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("task", [Knn, SentenceSimilarity])
def test_model_that_only_reads_pairs_has_no_features_of_one_modality(task, monkeypatch):
    """In a VLMo fine-tuned to classify pairs, no layer has processed the first token of a single modality."""
    monkeypatch.setattr(task, "_read", lambda self: ({}, {}, []) if task is Knn else {})
    with pytest.raises(UserError, match="reads images and texts only together"):
        task()(eval_model(TOGETHER.build()))


def test_model_that_reads_another_number_of_images_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text('{"image": "a.png", "image1": "b.png", "text": "?", "label": "no"}\n')
    twins = eval_model(replace(SPEC, fusion=replace(SPEC.fusion, images=2), itm=False, mlm=False, classes=2).build())
    single = eval_model(replace(SPEC, itm=False, mlm=False, classes=2).build())
    given = {"data": str(tmp_path / "x.jsonl"), "label": "label", "classes": ("no", "yes")}
    for model, fields, message in (
        (twins, ("image",), "gives 1 image with each text, and this model reads 2"),
        (single, ("image", "image1"), "gives 2 images with each text, and this model reads 1"),
        (eval_model(TOGETHER.build()), ("image", "image1"), "reads 1"),
    ):
        with pytest.raises(UserError, match=message):
            PairClassification(image=fields, **given)(model)
    with pytest.raises(UserError, match="vqa gives 1 image"):
        Vqa(data=given["data"])(twins)


@pytest.mark.parametrize("task", [PairClassification, Vqa])
def test_model_without_a_tokenizer_is_refused(tmp_path, task):
    (tmp_path / "x.jsonl").write_text('{"image": "a.png", "text": "?", "label": "no", "answers": ["no"]}\n')
    untokenized = replace(eval_model(Single(image=SPEC.image, classes=2).build()), tokenizer=None)
    source = Annotated(str(tmp_path / "x.jsonl"), label="label", classes=("no", "yes"))
    untokenized = replace(untokenized, data=replace(untokenized.data, train=(source,)))
    with pytest.raises(UserError, match="needs a model of images and texts"):
        task(data=source.path)(untokenized)


def test_options_that_change_the_result_are_part_of_its_file_name():
    names = [
        result_name("rerank", Rerank(), ["data=data/flickr8k/val", *given])
        for given in ([], ["k=16", "batch_size=8"], ["k=16", "score=itm+itc"], ["resamples=9"])
    ]
    assert names == [
        "rerank-flickr8k-val",
        "rerank-flickr8k-val-k=16",
        "rerank-flickr8k-val-k=16-score=itm+itc",
        names[0],
    ]
    assert result_name("zero-shot", ZeroShot(), ["split=../a b"]) == "zero-shot-split=.._a_b"
    long, longer = (result_name("zero-shot", ZeroShot(), [f"prompts={'a photo of {}|' * n}"]) for n in (20, 21))
    assert long != longer and len(long) == len(longer) < 120
