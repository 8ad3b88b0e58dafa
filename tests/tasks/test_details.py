"""Retrieval examples and confusions for the report."""

import torch

from vlp.tasks.details import RetrievalRanking


def ranking(i2t_rank, t2i_rank) -> RetrievalRanking:
    """Three images, samples 10, 20 and 30, with two captions each. Every query retrieves 0, 1, 2."""
    return RetrievalRanking(
        [10, 20, 30],
        ["a0", "a1", "b0", "b1", "c0", "c1"],
        torch.tensor([0, 0, 1, 1, 2, 2]),
        torch.tensor(i2t_rank),
        torch.tensor(t2i_rank),
        lambda queries: torch.arange(3).expand(len(queries), 3),
        lambda queries: torch.arange(3).expand(len(queries), 3),
    )


def test_hardest_queries_have_the_lowest_ranks_and_one_caption_per_image():
    examples = ranking([0, 7, 2], [5, 0, 9, 8, 1, 3]).examples(2, seed=0)
    assert examples["hardest_text_to_image"] == [
        {"query": "b0", "answer": 20, "found": [10, 20, 30], "rank": 10},
        {"query": "a0", "answer": 10, "found": [10, 20, 30], "rank": 6},
    ]
    assert examples["hardest_image_to_text"] == [
        {"query": 20, "answers": ["b0", "b1"], "found": ["a0", "a1", "b0"], "rank": 8},
        {"query": 30, "answers": ["c0", "c1"], "found": ["a0", "a1", "b0"], "rank": 3},
    ]


def test_random_examples_depend_only_on_the_seed():
    drawn = [[e["query"] for e in ranking([0] * 3, [0] * 6).examples(4, seed)["text_to_image"]] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 4
