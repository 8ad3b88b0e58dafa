import torch
from torch.nn import functional as F

from vlp.tasks.text_only import TextOnly, words_of


def test_words_and_pairs_are_distinct():
    assert words_of("A dog, a Dog!") == ["a", "dog", "a dog", "dog a"]


def test_class_is_predicted_from_a_word_or_from_the_order_of_two():
    texts = ["nobody runs", "nobody sleeps", "a man sleeps", "a man runs", "man a runs", "man a sleeps"]
    baseline = TextOnly(texts, [0, 0, 1, 1, 2, 2], 3)
    assert baseline(texts) == [0, 0, 1, 1, 2, 2]
    assert baseline(["nobody sings", "a man sings", "man a sings"]) == [0, 1, 2]


def test_texts_with_both_classes_are_predicted_by_chance_and_unknown_words_by_the_prior():
    texts = ["red left of blue", "blue left of red"] * 10
    labels = [0] * 10 + [1] * 10  # each text has both classes equally often
    said = TextOnly(texts, labels, 2)(texts)
    assert sum(a == b for a, b in zip(said, labels)) == 10
    assert TextOnly(["x", "x", "y", "z", "w"], [0, 0, 1, 1, 0], 2)(["", "v", "x"]) == [1, 1, 0]


def test_gradient_of_the_penalised_loss_vanishes():
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(f"w{n}" for n in torch.randint(8, (5,), generator=generator).tolist()) for _ in range(60)]
    labels = torch.randint(3, (60,), generator=generator)
    baseline = TextOnly(texts, labels.tolist(), 3, l2=0.01, steps=500)
    bags = torch.zeros(60, len(baseline.number))
    for row, text in enumerate(texts):
        bags[row, [baseline.number[w] for w in words_of(text) if w in baseline.number]] = 1.0
    weight, bias = baseline.weight.detach().requires_grad_(), baseline.bias.detach().requires_grad_()
    loss = F.cross_entropy(bags @ weight + bias, labels) + 0.005 * weight.square().sum()
    assert all(g.abs().max() < 1e-3 for g in torch.autograd.grad(loss, [weight, bias]))
