"""Nearest neighbours and linear probe, against loops, scikit-learn, and models with known answers."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.tasks.fakes import NAMES, BlindModel, ColourModel, eval_model
from tests.tasks.test_zero_shot import picture
from vlp.encoders.image import TimmImage
from vlp.errors import UserError
from vlp.models.single import Single
from vlp.tasks.base import evaluating
from vlp.tasks.details import confusions
from vlp.tasks.features import encode_labelled, select_features
from vlp.tasks.probe import Knn, LinearProbe, cross_validate, fit_logistic, knn_scores
from vlp.testing import ProcessPool


@pytest.fixture
def labelled(tmp_path) -> Path:
    return write(tmp_path)


def write(folder: Path) -> Path:
    """Thirty images of one colour each for training, ten for testing."""
    rows = []
    for n in range(40):
        picture(folder / "images" / f"{n}.png", NAMES[n % 5])
        split = "train" if n < 30 else "val"
        rows.append({"image": f"images/{n}.png", "label": n % 5, "name": NAMES[n % 5], "split": split})
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def blobs(n: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clouds whose dimensions have very different scales, and one constant dimension."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 6, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % classes
    x = centres[labels] + torch.randn(n, 6, generator=generator)
    x = torch.cat([x * torch.logspace(-3, 3, 6), torch.full((n, 1), 5.0)], 1)
    return x.double(), labels


def test_votes_equal_a_loop_over_neighbours():
    generator = torch.Generator().manual_seed(0)
    known, asked = torch.randn(50, 8, generator=generator), torch.randn(300, 8, generator=generator)
    labels = torch.randint(4, (50,), generator=generator)
    found = knn_scores(known, labels, asked, 4, 7, 0.1)
    for row, q in zip(found, asked):
        cosines = sorted(
            ((float(F.cosine_similarity(q, x, dim=0)), int(c)) for x, c in zip(known, labels)), reverse=True
        )
        votes = np.zeros(4)
        for cosine, c in cosines[:7]:
            votes[c] += np.exp(cosine / 0.1)
        assert (row / row.sum()).numpy() == pytest.approx(votes / votes.sum(), rel=1e-4, abs=1e-7)


def test_nearest_neighbour_decides_at_a_small_temperature():
    known, labels = torch.randn(50, 8), torch.arange(50) % 5
    scores = knn_scores(known, labels, known * 3, 5, 50, 1e-3)
    assert scores.isfinite().all() and torch.equal(scores.argmax(1), labels)


@pytest.mark.parametrize("task", [Knn, LinearProbe])
@pytest.mark.parametrize("features", ["pooled", "embed"])
def test_perfect_model_has_accuracy_one(labelled, task, features):
    result = task(data=str(labelled), features=features, batch_size=7)(eval_model(ColourModel()))
    # six neighbours of the correct class, and 24 others that are all equally far
    assert result.metrics["top1"].value == result.metrics["top1"].low == 1.0
    assert result.n == {"images": 10, "train images": 30, "classes": 5} and "top5" not in result.metrics
    assert features in result.protocol and "train -> val" in result.protocol


def test_k_is_at_most_the_number_of_train_images(labelled):
    assert "k=30 " in Knn(data=str(labelled))(eval_model(ColourModel())).protocol
    assert "k=3 " in Knn(data=str(labelled), k=3)(eval_model(ColourModel())).protocol


@pytest.mark.parametrize("task", [Knn, LinearProbe])
def test_blind_model_has_accuracy_zero(labelled, task):
    """All classes tie, and ties count against."""
    assert task(data=str(labelled))(eval_model(BlindModel())).metrics["top1"].value == 0


@pytest.mark.parametrize("task", [Knn, LinearProbe])
def test_wrong_labels_count_as_errors_and_broken_images_are_skipped(labelled, task):
    rows = [json.loads(line) for line in (labelled / "labels.jsonl").read_text().splitlines()]
    for n in (31, 36):
        rows[n] |= {"label": 0, "name": NAMES[0]}
    (labelled / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for n in (3, 35, 39):
        (labelled / "images" / f"{n}.png").write_bytes(b"no picture")
    result = task(data=str(labelled))(eval_model(ColourModel()))
    assert result.metrics["top1"].value == pytest.approx(6 / 8)
    assert result.metrics["top1"].low < 6 / 8 < result.metrics["top1"].high
    assert result.n == {"images": 8, "train images": 29, "classes": 5}
    assert [Path(b["image"]).name for b in result.bad] == ["3.png", "35.png", "39.png"]


@pytest.mark.parametrize("l2", [1.0, 1e-2])
def test_classifier_equals_scikit_learn(l2):
    """C of scikit-learn multiplies the sum of cross-entropies: C = 1 / (n l2). It neither standardises nor penalises the bias."""
    linear = pytest.importorskip("sklearn.linear_model")
    x, labels = blobs(150, 3, 0)
    weight, bias = fit_logistic(x, labels, 3, [10.0, l2], 500)[1]
    scaled = ((x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-12)).numpy()
    reference = linear.LogisticRegression(C=1 / (len(x) * l2), tol=1e-10, max_iter=5000).fit(scaled, labels.numpy())
    found = (x @ weight + bias).softmax(1).numpy()
    assert found == pytest.approx(reference.predict_proba(scaled), abs=2e-4)


def test_gradient_of_the_fitted_objective_vanishes():
    x, labels = blobs(90, 3, 1)
    (weight, bias), l2 = fit_logistic(x, labels, 3, [0.1], 500)[0], 0.1
    mean, std = x.mean(0), x.std(0, correction=0)
    std[-1] = 1  # the constant dimension
    w, b = (weight * std[:, None]).requires_grad_(), (bias + mean @ weight).requires_grad_()
    (F.cross_entropy((x - mean) / std @ w + b, labels) + l2 / 2 * w.square().sum()).backward()
    assert w.grad.abs().max() < 2e-5 and b.grad.abs().max() < 2e-5


def test_probe_does_not_depend_on_scale_and_offset_of_features():
    x, labels = blobs(90, 3, 1)
    plain, moved = (fit_logistic(y, labels, 3, [0.1], 300)[0] for y in (x, 1000 * x + 7))
    assert (x @ plain[0] + plain[1]).numpy() == pytest.approx(((1000 * x + 7) @ moved[0] + moved[1]).numpy(), abs=1e-3)


def test_rounding_errors_of_a_constant_feature_are_ignored():
    x, labels = blobs(90, 3, 1)
    noise = 0.3 + 1e-8 * labels.double() + 1e-8 * torch.randn(90, generator=torch.Generator().manual_seed(0))
    noisy = torch.cat([x, noise[:, None]], 1)
    (weight, bias), (plain, free) = (fit_logistic(y, labels, 3, [0.1], 300)[0] for y in (noisy, x))
    assert weight[-1].abs().max() == 0
    assert (noisy @ weight + bias).numpy() == pytest.approx((x @ plain + free).numpy(), abs=1e-6)


def test_cross_validation_equals_a_loop_and_holds_out_the_tested_fold():
    x, labels = blobs(60, 3, 2)
    found = cross_validate(x, labels, 3, [1.0, 0.01], 60, 200, 0)  # every fold is one image
    right = np.zeros(2)
    for n in range(60):
        others = torch.arange(60) != n
        for i, (weight, bias) in enumerate(fit_logistic(x[others], labels[others], 3, [1.0, 0.01], 200)):
            right[i] += int((x[n] @ weight + bias).argmax() == labels[n])
    assert found == pytest.approx(right / 60)
    # random labels cannot be predicted, although each classifier fits its own images
    noise = torch.randn(60, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (weight, bias) = fit_logistic(noise, labels, 3, [0.01], 200)[0]
    assert float(((noise @ weight + bias).argmax(1) == labels).double().mean()) == 1.0
    assert cross_validate(noise, labels, 3, [0.01], 5, 200, 0)[0] < 0.6


def test_strength_is_chosen_on_the_train_split_only(labelled):
    task = LinearProbe(data=str(labelled), l2=(1e-3, 1e-2))
    chosen = task(eval_model(ColourModel())).details
    assert (
        chosen["cross_validation"] == {"0.01": 1.0, "0.001": 1.0} and chosen["l2"] == 0.01
    )  # the strongest wins a tie
    rows = [json.loads(line) for line in (labelled / "labels.jsonl").read_text().splitlines()]
    names = {row["label"]: row["name"] for row in rows}
    for row in rows[30:]:
        row["label"] = (row["label"] + 1) % 5
        row["name"] = names[row["label"]]
    (labelled / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = task(eval_model(ColourModel()))
    assert result.details["l2"] == chosen["l2"] and result.details["cross_validation"] == chosen["cross_validation"]
    assert result.metrics["top1"].value == 0


def evaluate(rank: int, folder: str) -> list[dict]:
    """Evaluate a random tower in one of several processes."""
    torch.manual_seed(0)
    spec = Single(image=TimmImage("test_vit", image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3), head="mlp", embed_size=7)
    model = replace(eval_model(spec.build()), tokenizer=None)
    tasks = (Knn(folder, batch_size=3), LinearProbe(folder, batch_size=40, features="embed"))
    return [asdict(replace(task(model), seconds=0.0)) for task in tasks]


def test_two_processes_give_the_result_of_one(labelled, fork_server):
    (labelled / "images" / "4.png").write_bytes(b"no picture")
    (labelled / "images" / "33.png").write_bytes(b"no picture")
    pair = ProcessPool()
    try:
        first, second = pair(evaluate, str(labelled))
    finally:
        pair.close()
    one = evaluate(0, str(labelled))
    assert first == second == one
    assert one[0]["n"]["images"] == 9 and len(one[0]["bad"]) == 2


def test_features_are_those_of_the_tower_or_of_the_head(labelled):
    torch.manual_seed(0)
    spec = Single(image=TimmImage("test_vit", image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3), head="mlp", embed_size=7)
    model = spec.build()
    images = [(labelled / "images" / f"{n}.png", n) for n in range(3)]
    with evaluating(model):
        pooled, embed = (
            encode_labelled(eval_model(model), images, lambda x: select_features(model.encode_image(x), features), 2)  # noqa: B023
            for features in ("pooled", "embed")
        )
    assert pooled.features.shape == (3, model.image.width) and embed.features.shape == (3, 7)
    head = model.head.eval()
    assert F.normalize(head(pooled.features), dim=1).detach().numpy() == pytest.approx(embed.features.numpy(), abs=1e-5)
    assert embed.labels.tolist() == [0, 1, 2]


def test_mistakes_are_user_errors(labelled, tmp_path):
    class TextModel(ColourModel):
        preprocess = None

    with pytest.raises(UserError, match="needs an image tower"):
        Knn(data=str(labelled))(eval_model(TextModel()))
    data = eval_model(ColourModel()).data
    for task, message in (
        (Knn(), "give data=FOLDER"),
        (Knn(data=str(tmp_path / "nowhere")), "no folder"),
        (Knn(data=str(labelled), split="test"), "no image of split 'test'"),
        (Knn(data=str(labelled), temperature=0.0), "temperature=0.0"),
        (LinearProbe(data=str(labelled), l2=()), "strengths above 0"),
        (LinearProbe(data=str(labelled), l2=(0.0, 1.0)), "strengths above 0"),
        (LinearProbe(data=str(labelled), folds=1), "two or more folds"),
    ):
        with pytest.raises(UserError, match=message):
            task.validate(data)
    Knn(data=str(labelled)).validate(data)


class NotFinite(ColourModel):
    def encode_image(self, image):
        encoded = super().encode_image(image)
        encoded.tokens[encoded.embed[:, 2] == 1] = torch.nan
        return encoded


def test_features_that_are_not_finite_name_the_image(labelled):
    with pytest.raises(UserError, match="features of .*/2.png are not finite"):
        Knn(data=str(labelled))(eval_model(NotFinite()))
    for path in (labelled / "images").glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the 30 images"):
        Knn(data=str(labelled))(eval_model(ColourModel()))


def test_most_frequent_confusions_come_first():
    labels, guesses = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([1, 1, 0, 1, 2, 2])
    assert confusions(labels, guesses, ["cat", "dog", "fox"]) == [
        {"true": "cat", "guessed": "dog", "count": 2, "of": 3},
        {"true": "dog", "guessed": "fox", "count": 1, "of": 2},
    ]
    assert confusions(labels, labels, ["cat", "dog", "fox"]) == []
