"""Sentence similarity with towers of known answers, and with the real files if they exist."""

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.conftest import SHARED
from vlp.config import Data
from vlp.errors import UserError
from vlp.losses.geometry import alignment, uniformity
from vlp.models.base import Model
from vlp.tasks.base import EvalModel
from vlp.tasks.sentence_similarity import SentenceSimilarity, read_pairs, uniformity_interval
from vlp.testing import ProcessPool
from vlp.types import Encoded


class Words:
    """Tokenizer with a token for each word: its number, or 0. Pads and truncates like any other tokenizer."""

    def __call__(self, texts: list[str], max_length: int):
        rows = [[int(word) if word.isdigit() else 0 for word in text.split()] for text in texts]
        cut = sum(len(row) > max_length for row in rows)
        rows = [row[:max_length] for row in rows]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return ids, torch.tensor([[i < len(row) for i in range(longest)] for row in rows]), cut


class Angle(Model):
    """Encode the first word of a sentence as an angle in degrees. The head maps all sentences to one direction."""

    preprocess = image = None
    text = SimpleNamespace(max_length=512)

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Encoded:
        angle = torch.deg2rad(input_ids[:, 0].float())
        pooled = 3 * torch.stack([angle.cos(), angle.sin()], 1)  # not unit norm
        return Encoded(pooled[:, None], attention_mask[:, :1], F.normalize(torch.ones_like(pooled), dim=1))


def eval_model(model: Model | None = None) -> EvalModel:
    data = Data(train=(), tokenizer="words", max_length=4)
    return EvalModel(model or Angle(), Words(), data, torch.device("cpu"), checkpoint="a fake")


def angles(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(seed).integers(0, 90, size=(2, n))


def write(path: Path, scores, a, b) -> None:
    path.write_text("".join(f"{s:.3f}\t{x} degrees\t{y} degrees\tgenre\n" for s, x, y in zip(scores, a, b)))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Human scores that agree with the cosines in ``right``, are opposite in ``wrong``, and are noisy in ``stsb``."""
    for name, seed, score in (
        ("right", 0, lambda a, b: 5 - abs(a - b) / 18),
        ("wrong", 1, lambda a, b: abs(a - b) / 18),
        ("stsb", 2, lambda a, b: np.clip(5 - abs(a - b) / 18 + np.random.default_rng(5).normal(size=len(a)), 0, 5)),
    ):
        a, b = angles(60, seed)
        write(tmp_path / f"{name}.tsv", score(a, b), a, b)
    return tmp_path


def task(folder: Path, *tasks: str, **fields) -> SentenceSimilarity:
    return SentenceSimilarity(str(folder), tasks, **{"geometry": ("stsb",), "resamples": 50, **fields})


def test_correlation_is_one_for_equal_and_minus_one_for_opposite_orders(folder):
    result = task(folder, "right", "wrong")(eval_model())
    values = {metric: i.value for metric, i in result.metrics.items()}
    assert values["right"] == pytest.approx(1, abs=1e-3) and values["wrong"] == pytest.approx(-1, abs=1e-3)
    assert values["mean"] == pytest.approx((values["right"] + values["wrong"]) / 2)
    assert result.n["pairs"] == 120 and not any(i.percent for i in result.metrics.values())
    assert "mean of right, wrong" in result.protocol and "uniformity of stsb" in result.protocol


def test_correlation_equals_scipy_over_all_pairs(folder):
    stats = pytest.importorskip("scipy.stats")
    pairs = read_pairs(folder / "stsb.tsv")
    scores, a, b = (np.array(column) for column in zip(*pairs))
    apart = [abs(int(x.split()[0]) - int(y.split()[0])) for x, y in zip(a, b)]
    found = task(folder, "stsb", resamples=500)(eval_model()).metrics["stsb"]
    assert found.value == pytest.approx(stats.spearmanr(np.cos(np.deg2rad(apart)), scores).statistic, abs=2e-3)
    half = 1.96 * (1 - found.value**2) / np.sqrt(len(pairs))  # of normal pairs
    assert 0.5 * half < found.high - found.value < 2 * half and found.low < found.value


def test_head_with_equal_embeddings_has_correlation_zero(folder):
    metrics = task(folder, "right", features="embed")(eval_model()).metrics
    assert metrics["right"].value == metrics["mean"].value == 0
    assert metrics["alignment"].value == pytest.approx(0, abs=1e-6)
    assert metrics["uniformity"].value == pytest.approx(0, abs=1e-6)


def test_alignment_is_of_pairs_above_4_and_uniformity_of_every_distinct_sentence(folder):
    pairs = read_pairs(folder / "stsb.tsv")

    def place(sentence: str) -> torch.Tensor:
        angle = torch.deg2rad(torch.tensor(float(sentence.split()[0])))
        return torch.stack([angle.cos(), angle.sin()])

    close = [(place(a), place(b)) for score, a, b in pairs if score > 4]
    sentences = {sentence for _, *both in pairs for sentence in both}
    assert 0 < len(close) < len(pairs) and len(sentences) < 2 * len(pairs)
    metrics = task(folder, "right")(eval_model()).metrics
    x, y = (torch.stack(side) for side in zip(*close))
    assert metrics["alignment"].value == pytest.approx(float(alignment(x, y)), rel=1e-5)
    assert metrics["alignment"].low < metrics["alignment"].value < metrics["alignment"].high
    assert metrics["uniformity"].value == pytest.approx(
        float(uniformity(torch.stack([*map(place, sentences)]))), rel=1e-5
    )
    assert set(task(folder, "right", geometry=())(eval_model()).metrics) == {"right", "mean"}


def test_interval_of_uniformity_equals_the_spread_over_samples():
    """Half of its width is 1.96 times the standard deviation over new samples."""
    generator = torch.Generator().manual_seed(0)

    def sample() -> torch.Tensor:
        return F.normalize(torch.randn(400, 3, generator=generator) + torch.tensor([1.0, 0, 0]), dim=1)

    spread = np.std([float(uniformity(sample())) for _ in range(100)])
    halves = [i.high - i.value for i in (uniformity_interval(sample(), 0) for _ in range(20))]
    assert np.mean(halves) == pytest.approx(1.96 * spread, rel=0.35)
    few = uniformity_interval(sample()[:10], 0)
    assert few.low == few.value == few.high


def test_result_does_not_depend_on_batches_and_truncated_sentences_are_counted(folder):
    text = (folder / "right.tsv").read_text().replace(" degrees\tgenre", " degrees counted from the right\tgenre")
    (folder / "long.tsv").write_text(text)
    results = [task(folder, "long", "right", batch_size=n)(eval_model()) for n in (1, 7, 500)]
    values = [{m: i.value for m, i in r.metrics.items()} for r in results]
    assert values[0] == pytest.approx(values[1]) and values[0] == pytest.approx(values[2])
    long = {b for _, _, b in read_pairs(folder / "long.tsv")}
    assert [r.n["truncated sentences"] for r in results] == [len(long)] * 3
    assert "at most 4 tokens" in results[0].protocol
    assert task(folder, "long", max_length=6)(eval_model()).n["truncated sentences"] == 0


def evaluate(rank: int, folder: str) -> dict:
    result = SentenceSimilarity(folder, ("stsb", "wrong"), geometry=("stsb",), batch_size=9)(eval_model())
    return asdict(replace(result, seconds=0.0))


def test_two_processes_give_the_result_of_one(folder, fork_server):
    pair = ProcessPool()
    try:
        first, second = pair(evaluate, str(folder))
    finally:
        pair.close()
    assert first == second == evaluate(0, str(folder))


@pytest.mark.parametrize(
    "text, message",
    [
        ("5.0\tone sentence\n", "line 1: expected score, sentence and sentence"),
        ("5.0\ta\tb\nfive\ta\tb\n", "line 2: expected score"),
        ("5.0\ta\tb\n\ta\tb\n", "line 2: expected score"),
        ("5.0\ta\t \n5.0\ta\tb\n", "line 1: the score is not finite, or a sentence is empty"),
        ("nan\ta\tb\n5.0\ta\tb\n", "line 1: the score is not finite"),
        ("5.0\ta\tb\n", "has 1 pairs"),
        ("", "has 0 pairs"),
    ],
)
def test_invalid_line_is_named(tmp_path, text, message):
    (tmp_path / "a.tsv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_pairs(tmp_path / "a.tsv")


def test_other_separators_are_part_of_the_sentence(tmp_path):
    (tmp_path / "a.tsv").write_bytes('5\ta\u2028b\x0cc\td\r\n1\t"e\tf\tgenre\n'.encode())
    assert read_pairs(tmp_path / "a.tsv") == [(5.0, "a\u2028b\x0cc", "d"), (1.0, '"e', "f")]


def test_mistakes_are_user_errors(folder):
    data = eval_model().data
    for wrong, message in (
        (SentenceSimilarity(), "give data=FOLDER with sts12, "),
        (task(folder), "sts has no data"),
        (task(folder, "sts12"), "no file .*sts12.tsv; the folder has right, stsb, wrong"),
        (task(folder, "right", geometry=("far",)), "far.tsv"),
    ):
        with pytest.raises(UserError, match=message):
            wrong.validate(data)
    write(folder / "far.tsv", [1, 2], [0, 1], [5, 6])
    with pytest.raises(UserError, match="no pair of far scores above 4"):
        task(folder, "right", geometry=("far",)).validate(data)
    fine = task(folder, "right")
    fine.validate(data)
    with pytest.raises(UserError, match="needs a text tower"):
        fine.validate(Data(train=()))
    with pytest.raises(UserError, match="needs a text tower"):
        fine(replace(eval_model(), tokenizer=None))
    with pytest.raises(UserError, match="max_length=0"):
        task(folder, "right", max_length=0)(eval_model())


def test_max_length_beyond_that_of_the_tower_is_refused(folder):
    class Short(Angle):
        text = type("Tower", (), {"max_length": 8})

    assert task(folder, "right", max_length=8)(eval_model(Short())).n["pairs"] == 60
    with pytest.raises(UserError, match="max_length=9 but the text tower takes 1 to 8"):
        task(folder, "right", max_length=9)(eval_model(Short()))


def test_features_that_are_not_finite_name_the_sentence(folder):
    class Broken(Angle):
        def encode_text(self, input_ids, attention_mask):
            encoded = super().encode_text(input_ids, attention_mask)
            encoded.tokens[input_ids[:, 0] == read] = torch.nan
            return encoded

    read = int(read_pairs(folder / "right.tsv")[0][1].split()[0])
    with pytest.raises(UserError, match=f"features of '{read} degrees' are not finite"):
        task(folder, "right")(eval_model(Broken()))


def test_real_files_are_read():
    folder = SHARED / "data" / "sts"
    if not folder.is_dir():
        pytest.skip("the shared sentence pairs are not here")
    real = SentenceSimilarity(str(folder))
    real.validate(Data(train=(), tokenizer="words"))
    sizes = {name: len(read_pairs(folder / f"{name}.tsv")) for name in real.tasks}
    assert sizes["stsb-test"] == 1379 and sizes["sick-test"] == 4927 and sizes["sts14"] == 3750
