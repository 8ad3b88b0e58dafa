from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from vlp.config import Data
from vlp.data.reading.sentences import Sentences
from vlp.data.reading.shards import Source
from vlp.data.text import train_tokenizer
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.models.single import Single
from vlp.tasks.base import EvalModel
from vlp.tasks.text_accuracy import TextAccuracy

SIZES = {"model_type": "bert", "vocab_size": 80, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = ["red", "blue", "square", "thing", "left", "right"]


@pytest.fixture
def eval_model() -> EvalModel:
    torch.manual_seed(0)
    model = Single(text=BertText(config=SIZES | {"intermediate_size": 16}, dropout=0.1), classes=3).build()
    model.text.get_input_embeddings().weight.data.mul_(50)
    tokenizer = train_tokenizer(WORDS, vocab_size=80)
    return EvalModel(model, tokenizer, Data(train=(Source("x"),), max_length=16, workers=0), torch.device("cpu"))


@pytest.fixture
def source(tmp_path) -> Sentences:
    generator = torch.Generator().manual_seed(1)
    lines = ["label\ttext"]
    for n in range(60):
        words = [WORDS[i] for i in torch.randint(len(WORDS), (2 + n % 4,), generator=generator)]
        lines.append(f"{'xyz'[n % 3]}\t{' '.join(words)}")
    lines[8] = "q\tno class"
    lines[30] = "x\t"
    (tmp_path / "x.tsv").write_text("\n".join(lines) + "\n")
    return Sentences(str(tmp_path / "x.tsv"), ("text",), label="label", classes=("x", "y", "z"))


def test_accuracy_equals_that_of_one_text_at_a_time_without_bad_lines(eval_model, source):
    task = TextAccuracy(source, batch_size=7, resamples=50)
    task.validate(eval_model.data)
    result, model, right = task(eval_model), eval_model.model, []
    assert model.training
    model.eval()
    for line in Path(source.path).read_text().splitlines()[1:]:
        label, text = line.split("\t")
        if label in "xyz" and text:
            ids, mask, _ = eval_model.tokenizer([text], 16)
            right.append(int(model.classifier(model.text(ids, mask)[:, 0]).argmax()) == "xyz".index(label))
    assert len(right) == 58 and 0 < sum(right) < 58
    interval = result.metrics["accuracy"]
    assert interval.value == pytest.approx(sum(right) / 58) and interval.low < interval.value < interval.high
    assert result.n == {"texts": 58} and [b["key"] for b in result.bad] == ["9", "31"]  # lines of the file


def evaluate(rank: int, eval_model: EvalModel, source: Sentences) -> dict:
    return asdict(replace(TextAccuracy(source, batch_size=7, resamples=20)(eval_model), seconds=0.0))


def test_two_processes_give_the_result_of_one(eval_model, source, two_processes):
    one = evaluate(0, eval_model, source)
    assert two_processes(evaluate, eval_model, source) == [one, one]


def test_mistakes_are_user_errors(eval_model, source, tmp_path):
    (tmp_path / "plain.txt").write_text("red\n")
    with pytest.raises(UserError, match="no labels"):
        TextAccuracy(Sentences(str(tmp_path / "plain.txt"))).validate(eval_model.data)
    eval_model.model.classifier = None
    with pytest.raises(UserError, match="a classifier"):
        TextAccuracy(source)(eval_model)
