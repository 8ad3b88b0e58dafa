"""Measures of the training: the accuracies of ITM and MLM that the log shows, and their sums over a divided batch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.objectives.fusing import CACHED, PER_LOSS, bundle, drawn_by_row, networks, pairs, shortened
from vlp.data.text import train_tokenizer
from vlp.data.world.scenes import WORD_CLASSES, World
from vlp.distributed import all_reduce_sum
from vlp.errors import UserError
from vlp.forward import StepContext
from vlp.objectives import itm
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.mlm import MaskedText, mark_words
from vlp.testing import divide, part_of
from vlp.train import Pretrainer, single_graph
from vlp.types import Vocabulary

ITM, MLM = ImageTextMatching(keys="student", candidates="global"), MaskedText(word_classes={"low": ("a", "b")})
SPELLED = {"a": (5,), "b": (6,), "c": ()}
VOCABULARY = Vocabulary(99, 4, torch.arange(99) < 5, torch.zeros(99, dtype=torch.bool), SPELLED.__getitem__)


def means(f, objective) -> dict[str, tuple[float, float]]:
    """Return the mean and the count of each measure."""
    sums, counts = f.measured([objective]).unbind(1)
    return {name: (s / n if n else None, n) for name, s, n in zip(objective.measures, sums.tolist(), counts.tolist())}


def test_accuracies_of_matching_are_those_of_its_logits_by_kind_of_pair():
    objective = replace(ITM, candidates="local", hard_share=0.5)
    f = bundle(pairs(), {"itm": objective})
    rows, found = len(f.batch), {}

    def logits(self, f, candidates, texts, images):
        found["logits"] = torch.randn(3 * rows, 2, dtype=torch.float64)
        return found["logits"]

    def draw_hard(similarity, share):
        found["is_hard"] = torch.rand(len(similarity)) < share
        return found["is_hard"]

    with patch.object(ImageTextMatching, "logits", logits), patch.object(itm, "draw_hard", draw_hard):
        objective(f)
    says_pair = (found["logits"][:, 1] > found["logits"][:, 0]).tolist()
    hits = {"positive": says_pair[:rows], "random": [], "hard": []}
    for said, hard in zip(says_pair[rows:], found["is_hard"].tolist()):
        hits["hard" if hard else "random"].append(not said)
    assert all(map(len, hits.values()))
    for kind, each in hits.items():
        assert means(f, objective)[f"accuracy_{kind}"] == (sum(each) / len(each), len(each))


def test_only_pairs_are_measured_where_all_rows_show_one_image():
    batch = replace(pairs(), image_id=torch.full((8,), 7))
    f = bundle(batch, {"itm": ITM})
    ITM(f)
    assert {name: n for name, (_, n) in means(f, ITM).items()} == {
        "accuracy_positive": 8,
        "accuracy_random": 0,
        "accuracy_hard": 0,
    }


def words_in(ids, continues, words):
    """Mark the tokens of words, token by token."""
    found = np.zeros(ids.shape, bool)
    for row, text in enumerate(ids.tolist()):
        begin = 0
        for end in range(1, len(text) + 1):
            if end == len(text) or not continues[text[end]]:
                found[row, begin:end] = tuple(text[begin:end]) in words
                begin = end
    return found


def test_marked_tokens_are_those_of_whole_words():
    rng = np.random.default_rng(0)
    continues, ids = np.arange(9) >= 4, rng.integers(9, size=(300, 7))
    words = [(1,), (2, 5), (3, 4, 6), (0, 8)]
    expected = words_in(ids, continues, words)
    assert np.array_equal(mark_words(ids, continues, words), expected) and 0 < expected.sum() < expected.size
    assert not mark_words(ids[:, :2], continues, [(3, 4, 6)]).any()


def test_tokenizer_spells_the_words_of_a_world_as_in_its_captions():
    captions = [World().scene(0, n).captions[0] for n in range(60)]
    tokenizer = train_tokenizer(captions, 70)
    vocabulary = tokenizer.vocabulary()
    spelled = {word: vocabulary.pieces(word) for words in WORD_CLASSES.values() for word in words}
    assert any(len(pieces) > 1 for pieces in spelled.values()) and all(spelled.values())
    ids, _, _ = tokenizer(captions, 80)
    for words in WORD_CLASSES.values():
        found = mark_words(ids.numpy(), vocabulary.continues.numpy(), [spelled[word] for word in words])
        expected = sum(len(spelled[word]) * caption.split().count(word) for caption in captions for word in words)
        assert found.sum() == expected > 0
    assert vocabulary.pieces("\N{SNOWMAN}") == ()


def test_accuracies_of_words_are_those_of_the_predictions():
    f = bundle(pairs(), {"mlm": MLM})
    f.context = replace(f.context, vocabulary=VOCABULARY)
    torch.manual_seed(2)
    MLM(f)
    masked = f.masked(MLM.masking)
    guesses = f.model.masked_text(f, masked.input_ids, masked.positions).argmax(1)
    hits = [int(guess == label) for guess, label in zip(guesses.tolist(), masked.labels.tolist())]
    low = [hit for hit, label in zip(hits, masked.labels.tolist()) if label in (5, 6)]
    assert means(f, MLM) == {
        "accuracy": (sum(hits) / len(hits), len(hits)),
        "accuracy_low": (sum(low) / len(low) if low else None, len(low)),
    }


def test_word_that_cannot_be_spelled_is_named():
    objective = MaskedText(word_classes={"low": ("a", "c")})
    f = bundle(pairs(), {"mlm": objective})
    f.context = replace(f.context, vocabulary=VOCABULARY)
    with pytest.raises(UserError, match=r"word_classes.low: the tokenizer cannot spell 'c'"):
        objective(f)


def test_measure_that_is_not_declared_is_refused():
    f = bundle(pairs(), {"itm": ITM})
    with pytest.raises(ValueError, match="ImageTextMatching.measures does not name 'recall'"):
        f.measure(ITM, "recall", torch.ones(2), torch.ones(2).bool())


def sums_of_step(rank: int, world: int, graph=single_graph, parts: int = 1) -> list[float]:
    """Return the sums and counts of a step over all processes and micro-batches."""
    objectives = {"itm": ITM, "mlm": MaskedText()}
    batches = [shortened(part_of(pairs(), rows)) for rows in divide(8, parts, world, rank)]
    model, momentum = networks()
    with drawn_by_row():
        _, _, bundles = Pretrainer(model, objectives, graph)(batches, momentum, StepContext())
    return all_reduce_sum(sum(f.measured(objectives.values()) for f in bundles).flatten().tolist())


def test_measures_of_a_divided_batch_are_those_of_the_whole(pair):
    expected = sums_of_step(0, 1)
    assert expected[1] == 8 and expected[3] == 0 and expected[5] == 16 and expected[7] > 0
    for found in (
        *pair(sums_of_step, 2),
        *pair(partial(sums_of_step, graph=CACHED, parts=2), 2),
        sums_of_step(0, 1, PER_LOSS),
        sums_of_step(0, 1, CACHED, 2),
    ):
        assert found == expected


def test_an_objective_with_word_classes_is_a_key_of_queues():
    one, other = (MaskedText(word_classes={"colour": words}) for words in (("red",), ("green",)))
    assert len({one: 0, other: 1}) == 2
