from collections import Counter

import numpy as np
import pytest

from vlp.data.reading.sentences import Sentences
from vlp.data.stream import TrainDataset
from vlp.data.text import train_tokenizer
from vlp.data.text_views import Repetition, Same

TOKENIZER = train_tokenizer(["red square", "redder squares", "a blue thing here"], vocab_size=60)
VOCABULARY = TOKENIZER.vocabulary()
CLS, SEP = TOKENIZER.cls_id, TOKENIZER.sep_id
WORDS = [i for i in range(VOCABULARY.size) if not VOCABULARY.special[i] and not VOCABULARY.continues[i]]
PIECES = VOCABULARY.continues.nonzero()[:, 0].tolist()


def draw(view, row, seed):
    return view(row, np.random.default_rng(seed), VOCABULARY)


def repeated(row: list[int], longer: list[int]) -> list[int]:
    """Places of ``row``, whose tokens all differ, that ``longer`` has twice in a row; it has nothing else."""
    counts = Counter(longer)
    assert [t for n, t in enumerate(longer) if n == 0 or t != longer[n - 1]] == row and max(counts.values()) <= 2
    return [n for n, t in enumerate(row) if counts[t] == 2]


@pytest.mark.parametrize("length", [1, 2, 3, 6, 10, 20])
@pytest.mark.parametrize("rate", [0.0, 0.32, 1.0])
def test_number_of_repeated_tokens_is_the_papers(length, rate):
    row = [CLS, *(WORDS + PIECES)[:length], SEP]
    assert len(set(row)) == length + 2
    found = [repeated(row, draw(Repetition(rate), row, seed)) for seed in range(2000)]
    most = min(length, max(2, int(rate * length)))
    lengths = Counter(map(len, found))
    assert set(lengths) == set(range(most + 1))
    assert all(abs(n / 2000 - 1 / (most + 1)) < 0.06 for n in lengths.values())
    places = Counter(place for each in found for place in each)
    assert set(places) == set(range(1, length + 1))  # neither [CLS] nor [SEP]
    mean = sum(places.values()) / length
    assert all(abs(n - mean) < 5 * mean**0.5 for n in places.values())


def test_repeated_word_keeps_all_its_pieces():
    row = [CLS, WORDS[0], PIECES[0], PIECES[1], WORDS[1], WORDS[2], PIECES[2], SEP]
    units = [row[1:4], row[4:5], row[5:7]]
    expected = {(): row}
    for a in (1, 2):
        for b in (1, 2):
            for c in (1, 2):
                if a + b + c < 6:  # at most max(2, int(0.32 * 3))
                    made = [CLS, *units[0] * a, *units[1] * b, *units[2] * c, SEP]
                    expected[a, b, c] = made
    found = {tuple(draw(Repetition(unit="word"), row, seed)) for seed in range(300)}
    assert found == {tuple(each) for each in expected.values()}


def test_text_of_special_tokens_is_not_repeated():
    for view in (Repetition(), Repetition(unit="word"), Same()):
        assert draw(view, [CLS, SEP], 0) == [CLS, SEP]
        assert draw(view, [CLS], 0) == [CLS]


def test_views_of_a_sample_are_the_same_for_a_seed_and_others_in_the_next_epoch(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("".join(f"red square a blue thing here squares {'redder ' * n}\n" for n in range(1, 9)))

    def data(seed=0, limit=40):
        views = (Same(), Repetition())
        return TrainDataset((Sentences(str(path)),), (), None, TOKENIZER, limit, 1, seed, views)

    def by_key(dataset, positions):
        loaded = dataset.__getitems__(list(positions))
        same, twice = loaded.batch.views
        assert (same.input_ids == loaded.batch.input_ids).all()
        rows = [ids[mask].tolist() for ids, mask in zip(twice.input_ids, twice.attention_mask)]
        return dict(zip(loaded.batch.keys, rows)), loaded

    epochs = [by_key(data(), range(8 * n, 8 * n + 8))[0] for n in range(4)]
    assert [by_key(data(), range(8 * n, 8 * n + 8))[0] for n in range(4)] == epochs
    assert len({key for epoch in epochs for key in epoch}) == 8
    different = [len({tuple(epoch[key]) for epoch in epochs}) for key in epochs[0]]
    assert min(different) >= 2
    assert by_key(data(seed=1), range(8))[0] != epochs[0]
    rows, loaded = by_key(data(limit=9), range(8))
    assert all(len(row) <= 9 and row[-1] == SEP for row in rows.values()) and loaded.truncated_captions > 0
