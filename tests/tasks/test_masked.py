import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.tasks.fakes import eval_model
from vlp.config import Data
from vlp.data.text import train_tokenizer
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.models.base import Model
from vlp.models.single import Single
from vlp.objectives.masking import TextMasking
from vlp.specs.fields import check_limits
from vlp.tasks.masked import MaskedPrediction

TEXTS = [
    f"a {colour} {shape} {place} number {n}"
    for n, (colour, shape, place) in enumerate(
        (c, s, p)
        for c in ("red", "green", "blue")
        for s in ("square", "circle")
        for p in ("left", "right", "at the top")
    )
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "texts.txt").write_text("\n".join([*TEXTS, "", "red"]) + "\n")
    lines = [{"image": f"{n}.png", "captions": TEXTS[2 * n : 2 * n + 2], "split": "val"} for n in range(3)]
    lines.append({"image": "9.png", "captions": ["another"], "split": "train"})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=80)


class KnownPredictions(Model):
    """Predict given tokens, with a given logit for them and zero for all others."""

    can_predict_tokens = True
    text = SimpleNamespace(max_length=512)

    def __init__(self, answers, size, logit):
        super().__init__()
        self.answers, self.size, self.logit = answers, size, logit
        self.seen = []

    def masked_text(self, f, input_ids, positions):
        self.seen.append((f.batch.image_id, input_ids, positions))
        told = torch.zeros(len(positions), self.size)
        rows, columns = positions // input_ids.shape[1], positions % input_ids.shape[1]
        return told.scatter(1, self.answers[f.batch.image_id[rows], columns][:, None], self.logit)


def evaluate(model, tokenizer, folder, **more):
    given = eval_model(model)
    given.tokenizer, given.data = tokenizer, replace(given.data, max_length=32)
    return MaskedPrediction(data=str(folder / "texts.txt"), resamples=50, **more)(given)


def truth(tokenizer):
    return tokenizer([*TEXTS, "red"], 32)[0]


def test_perfect_model_has_accuracy_one_and_uniform_model_has_perplexity_of_the_vocabulary_size(folder, tokenizer):
    size = tokenizer.vocab_size
    perfect = evaluate(KnownPredictions(truth(tokenizer), size, 50.0), tokenizer, folder)
    assert perfect.metrics["accuracy"].value == 1
    assert perfect.metrics["perplexity"].value == pytest.approx(1)
    uniform = evaluate(KnownPredictions(truth(tokenizer), size, 0.0), tokenizer, folder)
    assert uniform.metrics["perplexity"].value == pytest.approx(size)
    assert not uniform.metrics["perplexity"].percent
    wrong = evaluate(KnownPredictions((truth(tokenizer) + 1) % size, size, 2.0), tokenizer, folder)
    assert wrong.metrics["accuracy"].value == 0
    assert wrong.metrics["perplexity"].value == pytest.approx(math.exp(2) + size - 1)
    assert perfect.n == {"texts": 19, "masked tokens": perfect.n["masked tokens"], "truncated texts": 0}


def test_masks_do_not_depend_on_the_batch_size(folder, tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"model_type": "bert", "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 32}
    model = Single(text=BertText(config=sizes), mlm=True).build()
    results = [evaluate(model, tokenizer, folder, batch_size=size) for size in (1, 4, 100)]
    for other in results[1:]:
        assert other.n == results[0].n
        for name, interval in other.metrics.items():
            assert interval.value == pytest.approx(results[0].metrics[name].value, rel=1e-5)
    assert model.training  # restored
    model = KnownPredictions(truth(tokenizer), tokenizer.vocab_size, 1.0)
    evaluate(model, tokenizer, folder)
    evaluate(model, tokenizer, folder)
    assert all(torch.equal(a, b) for a, b in zip(*model.seen))
    evaluate(model, tokenizer, folder, masking=TextMasking(unit="word"))
    assert not torch.equal(model.seen[0][1], model.seen[2][1])


def test_captions_of_a_split_of_annotations_are_read(folder):
    path = str(folder / "captions.jsonl")
    assert MaskedPrediction(data=path, split="val")._read() == TEXTS[:6]
    assert len(MaskedPrediction(data=path)._read()) == 7


def test_mistakes_are_user_errors(folder, tokenizer):
    data = Data(train=())
    (folder / "empty.txt").write_text("\n \n")
    for task, complaint in (
        (MaskedPrediction(), "give data=FILE"),
        (MaskedPrediction(data="nowhere.txt"), "no such file"),
        (MaskedPrediction(data=str(folder / "empty.txt")), "has no text"),
        (
            MaskedPrediction(data=str(folder / "texts.txt"), masking=TextMasking(mask_share=0.8, random_share=0.5)),
            "it is a share",
        ),
    ):
        with pytest.raises(UserError, match=complaint):
            task.validate(data)
    with pytest.raises(UserError, match="masking.probability is 2.0; set it to at most 1"):
        check_limits(MaskedPrediction(masking=TextMasking(probability=2.0)))
    model = KnownPredictions(truth(tokenizer), tokenizer.vocab_size, 1.0)
    with pytest.raises(UserError, match="no token of"):
        evaluate(model, tokenizer, folder, masking=TextMasking(probability=0.0))
    model.can_predict_tokens = False
    with pytest.raises(UserError, match="model.mlm=true"):
        evaluate(model, tokenizer, folder)
