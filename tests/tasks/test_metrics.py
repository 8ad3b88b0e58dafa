"""Ranks against loops over pairs, intervals against closed forms."""

import numpy as np
import pytest
import torch

from vlp.tasks.metrics import Interval, bootstrap, percentiles, ranks, resampled_spearman, spearman, topk


def slow_ranks(queries, keys, query_ids, key_ids) -> list[int]:
    """Rank by definition: a negative that ties with the best positive counts as ahead of it."""
    found = []
    for q, own in zip(queries, query_ids):
        scores = [float(q @ k) for k in keys]
        best = max(s for s, i in zip(scores, key_ids) if i == own)
        found.append(sum(1 for s, i in zip(scores, key_ids) if i != own and s >= best))
    return found


def whole_numbers(n: int, seed: int) -> torch.Tensor:
    """Small whole numbers, whose products are exact and often tie."""
    return torch.randint(-2, 3, (n, 4), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_a_loop_over_pairs_with_ties_and_several_captions(seed):
    images, image_ids = whole_numbers(17, seed), torch.randperm(17, generator=torch.Generator().manual_seed(seed))
    captions = torch.tensor([1 + i % 4 for i in range(17)])
    texts, text_ids = whole_numbers(int(captions.sum()), seed + 50), image_ids.repeat_interleave(captions)
    for a in ((images, texts, image_ids, text_ids), (texts, images, text_ids, image_ids)):
        assert ranks(*a).tolist() == slow_ranks(*a)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_ranks_do_not_depend_on_the_chunk(chunk):
    x, y, ids = torch.randn(20, 5), torch.randn(20, 5), torch.arange(20)
    assert torch.equal(ranks(x, y, ids, ids, chunk), ranks(x, y, ids, ids))


def test_equal_embeddings_rank_last_and_perfect_ones_first():
    ids = torch.arange(10)
    assert ranks(torch.ones(10, 3), torch.ones(10, 3), ids, ids).tolist() == [9] * 10
    assert ranks(torch.eye(10), torch.eye(10), ids, ids).tolist() == [0] * 10


def test_other_positives_do_not_count_as_ahead():
    # the second caption of the query scores more than its first, and a negative lies between them
    query, keys = torch.tensor([[1.0]]), torch.tensor([[0.2], [0.9], [0.5]])
    assert ranks(query, keys, torch.tensor([7]), torch.tensor([7, 7, 8])).tolist() == [0]


def test_query_without_a_positive_is_an_error():
    with pytest.raises(ValueError, match="query 2 has no positive"):
        ranks(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 5]), torch.arange(3), chunk=2)


def test_topk_is_sorted_and_has_at_most_as_many_as_the_keys():
    values, keys = topk(torch.tensor([[1.0]]), torch.tensor([[0.1], [0.9], [0.5]]), 5)
    assert keys.tolist() == [[1, 2, 0]] and values.tolist() == [[pytest.approx(x) for x in (0.9, 0.5, 0.1)]]


def test_interval_contains_the_value_and_depends_only_on_the_seed():
    values = np.random.default_rng(0).random(200)
    groups = np.arange(200)
    one, again, other = bootstrap(values, groups, 0), bootstrap(values, groups, 0), bootstrap(values, groups, 1)
    assert one == again != other
    assert one.value == pytest.approx(values.mean()) and one.low < one.value < one.high


def test_interval_of_independent_values_equals_the_normal_interval():
    values = (np.arange(1000) < 300).astype(float)
    interval = bootstrap(values, np.arange(1000), 0, 4000)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert interval.high - interval.value == pytest.approx(half, rel=0.15)
    assert interval.value - interval.low == pytest.approx(half, rel=0.15)


def test_captions_of_an_image_are_resampled_together():
    """Five captions with equal values are one observation, so the interval is that of the images."""
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


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("distinct", [2, 5, 10**9])
def test_spearman_equals_scipy_with_and_without_ties(seed, distinct):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    x, noise = rng.integers(distinct, size=200) / distinct, rng.integers(distinct, size=200) / distinct
    for y in (noise, x**3 + noise, -x, np.exp(x)):
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_spearman_of_small_cases():
    assert spearman(np.array([1, 2, 3]), np.array([10, 20, 90])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3]), np.array([3, 2, 1])) == pytest.approx(-1)
    # ranks 1.5 1.5 3 and 1 2 3: covariance 1.5, variances 1.5 and 2
    assert spearman(np.array([0, 0, 1]), np.array([1, 2, 3])) == pytest.approx(1.5 / np.sqrt(1.5 * 2))


def test_spearman_of_a_constant_is_zero_and_of_invalid_values_an_error():
    assert spearman(np.ones(4), np.arange(4)) == 0.0
    with pytest.raises(ValueError, match="pair 2 is not finite"):
        spearman(np.array([1, 2, np.nan]), np.arange(3))
    for x, y in ((np.ones(1), np.ones(1)), (np.ones(3), np.ones(2)), (np.ones((2, 2)), np.ones((2, 2)))):
        with pytest.raises(ValueError, match="two or more pairs"):
            spearman(x, y)


def test_resampled_correlations_equal_those_of_the_drawn_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.integers(9, size=60), rng.integers(9, size=60)
    same = np.random.default_rng(3)
    slow = [spearman(x[drawn], y[drawn]) for drawn in (same.integers(60, size=60) for _ in range(20))]
    assert resampled_spearman(x, y, 3, 20) == pytest.approx(slow, abs=1e-12)
    assert len(resampled_spearman(x, y, 3, 0)) == 0


def test_interval_of_spearman_is_near_the_known_one():
    """The standard error for independent normal pairs is 1 / sqrt(n - 1)."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 400))
    interval = percentiles(spearman(x, y), resampled_spearman(x, y, 0, 1000), percent=False)
    assert interval.low < interval.value < interval.high
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 / np.sqrt(399), rel=0.15)


def test_fractions_are_shown_as_percentages_and_other_numbers_as_decimals():
    assert Interval(0.1234, 0.1, 1).texts() == ("12.3%", "10.0%", "100.0%") and str(Interval(0.5, 0, 1)) == "50.0%"
    assert Interval(-2.34567, -3, -2, percent=False).texts(2) == ("-2.3457", "-3.0000", "-2.0000")
