import torch
from torch.nn import functional as F

from vlp.tasks.text_only import TextOnly, words_of


def test_words_and_pairs_are_there_once():
    assert words_of("A dog, a Dog!") == ["a", "dog", "a dog", "dog a"]


def test_what_a_word_or_the_order_of_two_gives_away_is_told():
    texts = ["nobody runs", "nobody sleeps", "a man sleeps", "a man runs", "man a runs", "man a sleeps"]
    baseline = TextOnly(texts, [0, 0, 1, 1, 2, 2], 3)
    assert baseline(texts) == [0, 0, 1, 1, 2, 2]
    assert baseline(["nobody sings", "a man sings", "man a sings"]) == [0, 1, 2]


def test_equal_texts_of_both_classes_are_told_no_better_than_by_chance_and_unknown_words_by_those_that_have_no_other():
    texts = ["red left of blue", "blue left of red"] * 10
    labels = [0] * 10 + [1] * 10  # each text is as often true as false
    said = TextOnly(texts, labels, 2)(texts)
    assert sum(a == b for a, b in zip(said, labels)) == 10
    assert TextOnly(["x", "x", "y", "z", "w"], [0, 0, 1, 1, 0], 2)(["", "v", "x"]) == [1, 1, 0]


def test_it_is_the_minimum_of_the_penalised_loss():
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(f"w{n}" for n in torch.randint(8, (5,), generator=generator).tolist()) for _ in range(60)]
    labels = torch.randint(3, (60,), generator=generator)
    baseline = TextOnly(texts, labels.tolist(), 3, l2=0.01, steps=500)
    bags = torch.zeros(60, len(baseline.place))
    for row, text in enumerate(texts):
        bags[row, [baseline.place[w] for w in words_of(text) if w in baseline.place]] = 1.0
    weight, bias = baseline.weight.detach().requires_grad_(), baseline.bias.detach().requires_grad_()
    loss = F.cross_entropy(bags @ weight + bias, labels) + 0.005 * weight.square().sum()
    assert all(g.abs().max() < 1e-3 for g in torch.autograd.grad(loss, [weight, bias]))
