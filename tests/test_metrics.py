"""Ranks against loops over pairs; intervals against what is known of them."""

import numpy as np
import pytest
import torch

from vlp.metrics import bootstrap, ranks, top


def slow_ranks(queries, keys, query_ids, key_ids) -> list[int]:
    """A negative that scores as much as the best positive, or more, counts as ahead."""
    found = []
    for q, own in zip(queries, query_ids):
        scores = [float(q @ k) for k in keys]
        best = max(s for s, i in zip(scores, key_ids) if i == own)
        found.append(sum(1 for s, i in zip(scores, key_ids) if i != own and s >= best))
    return found


def whole_numbers(n: int, seed: int) -> torch.Tensor:
    """Small whole numbers, whose products are exact and tie often."""
    return torch.randint(-2, 3, (n, 4), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("seed", range(5))
def test_ranks_are_those_of_a_loop_over_pairs_with_ties_and_several_captions(seed):
    images, image_ids = whole_numbers(17, seed), torch.randperm(17, generator=torch.Generator().manual_seed(seed))
    captions = torch.tensor([1 + i % 4 for i in range(17)])
    texts, text_ids = whole_numbers(int(captions.sum()), seed + 50), image_ids.repeat_interleave(captions)
    for a in ((images, texts, image_ids, text_ids), (texts, images, text_ids, image_ids)):
        assert ranks(*a).tolist() == slow_ranks(*a)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_ranks_do_not_depend_on_the_chunk(chunk):
    x, y, ids = torch.randn(20, 5), torch.randn(20, 5), torch.arange(20)
    assert torch.equal(ranks(x, y, ids, ids, chunk), ranks(x, y, ids, ids))


def test_equal_embeddings_earn_nothing_and_perfect_ones_everything():
    ids = torch.arange(10)
    assert ranks(torch.ones(10, 3), torch.ones(10, 3), ids, ids).tolist() == [9] * 10
    assert ranks(torch.eye(10), torch.eye(10), ids, ids).tolist() == [0] * 10


def test_other_positives_are_not_ahead():
    # the query's second caption scores more than its first, a third's negative lies between
    query, keys = torch.tensor([[1.0]]), torch.tensor([[0.2], [0.9], [0.5]])
    assert ranks(query, keys, torch.tensor([7]), torch.tensor([7, 7, 8])).tolist() == [0]


def test_query_without_a_positive_is_named():
    with pytest.raises(ValueError, match="query 2 has no positive"):
        ranks(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 5]), torch.arange(3), chunk=2)


def test_top_is_in_order_and_no_longer_than_the_keys():
    assert top(torch.tensor([[1.0]]), torch.tensor([[0.1], [0.9], [0.5]]), 5).tolist() == [[1, 2, 0]]


def test_interval_holds_the_value_and_depends_on_the_seed_alone():
    values = np.random.default_rng(0).random(200)
    groups = np.arange(200)
    one, again, other = bootstrap(values, groups, 0), bootstrap(values, groups, 0), bootstrap(values, groups, 1)
    assert one == again != other
    assert one.value == pytest.approx(values.mean()) and one.low < one.value < one.high


def test_interval_of_independent_values_is_the_normal_one():
    values = (np.arange(1000) < 300).astype(float)
    interval = bootstrap(values, np.arange(1000), 0, 4000)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert interval.high - interval.value == pytest.approx(half, rel=0.15)
    assert interval.value - interval.low == pytest.approx(half, rel=0.15)


def test_captions_of_a_picture_are_drawn_together():
    """Five captions that always agree are one observation: the interval is that of the pictures, not of the captions."""
    pictures = (np.arange(200) % 2).astype(float)
    values, groups = np.repeat(pictures, 5), np.repeat(np.arange(200), 5)
    together, single = bootstrap(values, groups, 0, 2000), bootstrap(pictures, np.arange(200), 0, 2000)
    apart = bootstrap(values, np.arange(1000), 0, 2000)
    assert together.high - together.low == pytest.approx(single.high - single.low, rel=0.1)
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_coverage_is_near_95_percent():
    rng, hits = np.random.default_rng(0), 0
    for n in range(100):
        values = (rng.random(150) < 0.4).astype(float)
        interval = bootstrap(values, np.arange(150), n, 200)
        hits += interval.low <= 0.4 <= interval.high
    assert 88 <= hits <= 100


def test_constant_values_and_no_resamples_have_no_width():
    assert bootstrap(np.ones(5), np.arange(5), 0).low == 1.0
    interval = bootstrap(np.array([0.0, 1.0]), np.arange(2), 0, 0)
    assert (interval.low, interval.value, interval.high) == (0.5, 0.5, 0.5)
