import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.tasks.fakes import subject
from vlp.config import Data
from vlp.data.text import train_tokenizer
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.models.single import Single
from vlp.objectives.masking import TextMasking
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


class Teller(nn.Module):
    """Says what it was told to say at every place, as surely as that."""

    mlm = True

    def __init__(self, answers, size, sureness):
        super().__init__()
        self.answers, self.size, self.sureness = answers, size, sureness
        self.seen = []

    def masked_text(self, f, input_ids, positions):
        self.seen.append((f.batch.image_id, input_ids, positions))
        told = torch.zeros(len(positions), self.size)
        rows, columns = positions // input_ids.shape[1], positions % input_ids.shape[1]
        return told.scatter(1, self.answers[f.batch.image_id[rows], columns][:, None], self.sureness)


def ask(model, tokenizer, folder, **more):
    given = subject(model)
    given.tokenizer, given.data = tokenizer, replace(given.data, max_length=32)
    return MaskedPrediction(data=str(folder / "texts.txt"), resamples=50, **more)(given)


def truth(tokenizer):
    return tokenizer([*TEXTS, "red"], 32)[0]


def test_who_knows_the_texts_is_always_right_and_who_knows_nothing_is_at_the_size_of_the_vocabulary(folder, tokenizer):
    size = tokenizer.vocab_size
    knows = ask(Teller(truth(tokenizer), size, 50.0), tokenizer, folder)
    assert knows.metrics["accuracy"].value == 1
    assert knows.metrics["perplexity"].value == pytest.approx(1)
    guesses = ask(Teller(truth(tokenizer), size, 0.0), tokenizer, folder)
    assert guesses.metrics["perplexity"].value == pytest.approx(size)
    assert not guesses.metrics["perplexity"].percent
    wrong = ask(Teller((truth(tokenizer) + 1) % size, size, 2.0), tokenizer, folder)
    assert wrong.metrics["accuracy"].value == 0
    assert wrong.metrics["perplexity"].value == pytest.approx(math.exp(2) + size - 1)
    assert knows.n == {"texts": 19, "masked tokens": knows.n["masked tokens"], "cut texts": 0}


def test_masks_are_the_same_for_any_batch_size_and_follow_the_seed(folder, tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"model_type": "bert", "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 32}
    model = Single(text=BertText(config=sizes), mlm=True).build()
    results = [ask(model, tokenizer, folder, batch_size=size) for size in (1, 4, 100)]
    for other in results[1:]:
        assert other.n == results[0].n
        for name, interval in other.metrics.items():
            assert interval.value == pytest.approx(results[0].metrics[name].value, rel=1e-5)
    assert model.training  # as it was
    teller = Teller(truth(tokenizer), tokenizer.vocab_size, 1.0)
    ask(teller, tokenizer, folder)
    ask(teller, tokenizer, folder)
    assert all(torch.equal(a, b) for a, b in zip(*teller.seen))
    ask(teller, tokenizer, folder, masking=TextMasking(unit="word"))
    assert not torch.equal(teller.seen[0][1], teller.seen[2][1])


def test_annotations_give_the_captions_of_their_split(folder):
    path = str(folder / "captions.jsonl")
    assert MaskedPrediction(data=path, split="val")._read() == TEXTS[:6]
    assert len(MaskedPrediction(data=path)._read()) == 7


def test_what_cannot_be_evaluated_is_said(folder, tokenizer):
    data = Data(train=())
    (folder / "empty.txt").write_text("\n \n")
    for task, complaint in (
        (MaskedPrediction(), "give data=FILE"),
        (MaskedPrediction(data="nowhere.txt"), "no such file"),
        (MaskedPrediction(data=str(folder / "empty.txt")), "holds no text"),
        (MaskedPrediction(data=str(folder / "texts.txt"), masking=TextMasking(probability=2.0)), "it is a share"),
    ):
        with pytest.raises(UserError, match=complaint):
            task.validate(data)
    teller = Teller(truth(tokenizer), tokenizer.vocab_size, 1.0)
    with pytest.raises(UserError, match="no token of"):
        ask(teller, tokenizer, folder, masking=TextMasking(probability=0.0))
    teller.mlm = None
    with pytest.raises(UserError, match="model.mlm=true"):
        ask(teller, tokenizer, folder)
