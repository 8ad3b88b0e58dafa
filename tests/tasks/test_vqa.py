"""Answers equal those of each question alone, and are scored by the official rules."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import COLOURS
from tests.models.test_albef import SPEC
from tests.tasks.fakes import eval_model
from vlp.data.augment import Resize
from vlp.data.by_image import AnnotatedImageDataset
from vlp.data.reading.annotated import Annotated
from vlp.data.text import load_tokenizer
from vlp.data.vqa_answers import accuracy
from vlp.encoders.decoder import Decoder
from vlp.encoders.generate import rank
from vlp.encoders.mome import Mome
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.models.vlmo import Vlmo
from vlp.tasks.question_prior import QuestionPrior
from vlp.tasks.vqa import Vqa
from vlp.types import Batch

ANSWERS = (*COLOURS, "left", "right", "top", "bottom")


def write(path, lines) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def asked(world, tmp_path_factory) -> Annotated:
    """Two questions about each of 20 images of coloured squares, in separate lines, and the first ten again for training."""
    lines = []
    for question in ("what colour is it?", "where is the thing?"):
        for n in range(20):
            answer = list(COLOURS)[n % 5] if "colour" in question else ("left", "right", "top", "bottom")[n // 5 % 4]
            line = {"image": f"{n:04d}.png", "question": question, "answer": answer, "question_id": len(lines)}
            lines.append(line | {"answer_type": question.split()[0], "split": "test"})
    lines += [line | {"split": "train"} for line in lines[:10]]
    path = write(tmp_path_factory.mktemp("vqa") / "questions.jsonl", lines)
    return Annotated(path, str(world / "pictures"), text="question", answers="answer", split="train")


@pytest.fixture
def given(world, asked):
    """A small ALBEF with random weights, a decoder and a classifier."""
    torch.manual_seed(0)
    text = replace(SPEC.text, config=SPEC.text.config | {"vocab_size": 200})
    model = replace(SPEC, text=text, decoder=Decoder(layers=2), classes=len(ANSWERS)).build().eval()
    for part in (*model.image.modules(), *model.fusion.modules(), *model.decoder.modules()):
        if isinstance(part, torch.nn.Linear):
            torch.nn.init.normal_(part.weight, std=0.4)  # so that answers differ
    found = eval_model(model)
    data = replace(found.data, train=(replace(asked, classes=ANSWERS),), max_length=16, resize=Resize(mode="squash"))
    return replace(found, tokenizer=load_tokenizer(str(world / "tokenizer")), data=data)


def one_by_one(given, asked, double_first=False) -> list[str]:
    """Answer each question separately, with its own copy of the image."""
    tokenizer, model, said = given.tokenizer, given.model, {}
    ids, mask, _ = tokenizer.targets(ANSWERS, 16)
    dataset = AnnotatedImageDataset(replace(asked, split="test").open(), given.data.resize, given.preprocess, 10_000)
    with torch.no_grad():
        for pictured in dataset.__getitems__(range(len(dataset)))[0]:
            for line in pictured.lines:
                image = model.encode_image(given.preprocess.normalise(pictured.images[0][None]))
                text = model.encode_text(*tokenizer([line.captions[0]], 16)[:2])
                found = rank(model.decoder, model.ask(model.project(image), text), ids, mask, 99, double_first)
                said[line.source_row] = ANSWERS[found.answers[0, 0]]
    return [said[number] for number in sorted(said)]


@pytest.mark.parametrize("batches", [(3, 4), (32, 64), (1, 1)])
def test_answers_do_not_depend_on_batches_and_are_submitted(given, asked, tmp_path, batches):
    path = tmp_path / "out" / "results.json"
    task = Vqa(split="test", batch_size=batches[0], questions=batches[1], submission=str(path), resamples=20)
    result = task(given)
    said = one_by_one(given, asked)
    assert json.loads(path.read_text()) == [{"question_id": n, "answer": a} for n, a in enumerate(said)]
    true = [json.loads(line)["answer"] for line in Path(asked.path).read_text().splitlines()][:40]
    assert result.metrics["accuracy"].value == pytest.approx(sum(a == b for a, b in zip(said, true)) / 40)
    assert result.metrics["accuracy_what"].value == pytest.approx(
        sum(a == b for a, b in zip(said[:20], true[:20])) / 20
    )
    assert result.metrics["answerable"].value == 1 and result.n == {"questions": 40, "images": 20}
    assert len(set(said)) > 1
    # the training has only "what ..." questions with five equally frequent answers, of which the first counts
    assert result.metrics["prior"].value == pytest.approx(4 / 40)


def two_of(rank: int, given, expected) -> bool:
    result = Vqa(split="test", batch_size=3, questions=4, resamples=20)(given)
    return (result.metrics, result.blind) == expected and result.n["questions"] == 40


def test_two_processes_give_the_result_of_one(given, two_processes):
    result = Vqa(split="test", batch_size=3, questions=4, resamples=20)(given)
    assert result.blind.keys() == {"accuracy", "accuracy_what"} | {k for k in result.metrics if "accuracy_" in k}
    assert two_processes(two_of, given, (result.metrics, result.blind)) == [True, True]


def test_vlmo_answers_do_not_depend_on_batches(given, asked, tmp_path):
    torch.manual_seed(1)
    mome = Mome(32, 3, 2, 64, vl_from=2, image_size=32, vocab_size=200, max_text_length=16, layer_scale=None)
    spec = Vlmo(mome, itc=False, itc_vl=False, itm=False, mlm=False, classes=len(ANSWERS))
    model = spec.build().eval()
    for part in model.modules():
        if isinstance(part, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding)):
            torch.nn.init.normal_(part.weight, std=0.4)
    found = replace(given, model=model)
    path = tmp_path / "results.json"
    Vqa(split="test", batch_size=3, questions=4, submission=str(path), resamples=20)(found)
    said = {}
    dataset = AnnotatedImageDataset(replace(asked, split="test").open(), given.data.resize, model.preprocess, 10_000)
    with torch.no_grad():
        for pictured in dataset.__getitems__(range(len(dataset)))[0]:
            for line in pictured.lines:
                pixels = model.preprocess.normalise(pictured.images[0][None])
                f = Forward(model, Batch(torch.zeros(1), pixels, *given.tokenizer([line.captions[0]], 16)[:2]))
                said[line.source_row] = ANSWERS[int(model.classify(f).argmax())]
    assert [line["answer"] for line in json.loads(path.read_text())] == [said[n] for n in sorted(said)]
    assert len(set(said.values())) > 1


def test_classifier_answers_with_the_class_of_the_highest_logit(given, asked):
    with torch.no_grad():
        given.model.classifier[-1].weight.zero_()
        given.model.classifier[-1].bias.copy_(torch.arange(float(len(ANSWERS))))
    result = Vqa(split="test", mode="classify", resamples=20)(given)
    assert result.metrics["accuracy"].value == 5 / 40 and "highest of 9 classes" in result.protocol  # "bottom"
    as_class = replace(
        given, data=replace(given.data, train=(replace(asked, answers=None, label="answer", classes=ANSWERS),))
    )
    assert Vqa(split="test", mode="classify", resamples=20)(as_class).metrics == result.metrics


def test_written_answers_are_compared_in_the_form_of_the_decoder(given, asked, tmp_path, monkeypatch):
    lines = [
        {"image": "0000.png", "question": "?", "answer": "Top-Left"},
        {"image": "0001.png", "question": "?", "answer": "red"},
    ]
    task = Vqa(data=write(tmp_path / "x.jsonl", lines), mode="write", resamples=20, blind=False)
    said = iter([["top - left", "green"]])
    monkeypatch.setattr(
        "vlp.tasks.answering.beam_search", lambda *_: [given.tokenizer.rows([a])[0] for a in next(said)]
    )
    result = task(given)
    assert result.metrics["accuracy"].value == 0.5 and "written with 3 beams" in result.protocol
    assert [(e["prediction"], e["truth"]) for e in result.details["wrong"]] == [("green", "red")]


def test_answers_of_several_annotators_are_scored_by_the_official_rules(given, asked, tmp_path):
    said = [["Red"] * 2 + ["the red"] * 2 + ["blue"] * 6, ["left"] * 10]
    lines = [{"image": "0000.png", "question": "?", "answer": each} for each in said]
    result = Vqa(data=write(tmp_path / "x.jsonl", lines), resamples=20)(given)
    answer = one_by_one(given, replace(asked, path=write(tmp_path / "y.jsonl", [x | {"split": "test"} for x in lines])))
    assert result.metrics["accuracy"].value == pytest.approx(sum(map(accuracy, answer, said)) / 2)
    assert "official" in result.protocol


def test_test_set_without_answers_has_no_metrics(given, tmp_path):
    lines = [{"image": "0000.png", "question": "?", "question_id": 7}]
    task = Vqa(data=write(tmp_path / "x.jsonl", lines), submission=str(tmp_path / "r.json"))
    result = task(given)
    assert result.metrics == {} and [each["question_id"] for each in json.loads((tmp_path / "r.json").read_text())] == [
        7
    ]


def test_answers_outside_the_list_count_as_wrong_and_are_listed(given, tmp_path):
    lines = [{"image": "0000.png", "question": "?", "answer": a} for a in ("purple", "red", "red", "red")]
    result = Vqa(data=write(tmp_path / "x.jsonl", lines), resamples=20)(given)
    assert result.details["not_in_list"] == {"questions": 1, "answers": ["purple"]}
    assert result.metrics["answerable"].value == 0.75 and result.n["questions"] == 4


def test_incomplete_submission_is_refused(given, tmp_path):
    good = {"image": "0000.png", "question": "?", "answer": "red", "question_id": 1}
    data = write(tmp_path / "x.jsonl", [good, good | {"image": "gone.png", "question_id": 2}])
    result = Vqa(data=data, resamples=20)(given)
    assert result.n["questions"] == 1 and "gone.png" in result.bad[0]["reason"]
    with pytest.raises(UserError, match="^1 samples have no prediction, e.g. .*gone.png"):
        Vqa(data=data, submission=str(tmp_path / "r.json"))(given)
    for lines in ([good, good], [{k: v for k, v in good.items() if k != "question_id"}]):
        with pytest.raises(UserError, match="question_id in every line"):
            Vqa(data=write(tmp_path / "x.jsonl", lines), submission=str(tmp_path / "r.json"))(given)
        with pytest.raises(UserError, match="question_id in every line"):  # also before the evaluation
            Vqa(data=write(tmp_path / "x.jsonl", lines), submission=str(tmp_path / "r.json")).validate(given.data)
    with pytest.raises(UserError, match="choose another submission"):
        Vqa(data=write(tmp_path / "x.jsonl", [good]), submission="/proc/r.json")(given)
    with pytest.raises(UserError, match="choose another submission"):
        Vqa(data=write(tmp_path / "x.jsonl", [good]), submission="/proc/nowhere/r.json").validate(given.data)


def test_mistakes_are_user_errors(given, asked, world, tmp_path):
    with pytest.raises(UserError, match="nothing to evaluate"):
        Vqa().validate(given.data)
    with pytest.raises(UserError, match="no line of split 'dev'"):
        Vqa(split="dev").validate(given.data)
    blind = replace(given, model=SPEC.build())
    with pytest.raises(UserError, match="cannot answer; it needs a decoder"):
        Vqa(split="test")(blind)
    with pytest.raises(UserError, match="cannot classify; it needs a classifier"):
        Vqa(split="test", mode="classify")(blind)
    few = tmp_path / "few.txt"
    few.write_text("red\nblue\n")
    with pytest.raises(UserError, match="2 answers for a classifier of 9"):
        Vqa(split="test", mode="classify", answers=str(few))(given)
    assert "a list of 2;" in Vqa(split="test", answers=str(few), resamples=2)(given).protocol
    untold = replace(given, data=replace(given.data, train=()))
    with pytest.raises(UserError, match="made by vlp data answers"):
        Vqa(data=write(tmp_path / "x.jsonl", [{"image": "0000.png", "text": "?"}]), images=str(world / "pictures"))(
            untold
        )


def test_prior_is_the_most_frequent_answer_of_the_longest_known_beginning(tmp_path):
    lines = [
        {"text": "what is red?", "answers": "car"},
        {"text": "what is red?", "answers": "bus"},
        {"text": "what is red?", "answers": "bus"},
        {"text": "what is it?", "answers": {"car": 2.5}},
        {"text": "how many?", "answers": "3"},
        {"text": "how many?", "answers": ["3", "4", "3"]},
        {"bad": 1},
    ]
    prior = QuestionPrior([Annotated(write(tmp_path / "x.jsonl", lines), answers="answers").open()])
    assert prior.answers[0] == "car" and set(prior.answers) == {"car", "bus", "3", "4"}
    for question, answer in {
        "What is red?": "bus",
        "what is blue?": "car",
        "how many dogs?": "3",
        "why?": "car",
    }.items():
        assert prior(question) == answer
