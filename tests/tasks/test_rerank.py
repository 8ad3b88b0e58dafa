"""Re-ranking: scores equal the published ones and those of each pair, for any number of processes."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from tests.models.test_albef import SPEC, close, published
from tests.tasks.fakes import ColourModel, eval_model
from vlp.data.other_images import OtherImages
from vlp.data.stream import EvalDataset, evaluation_batches
from vlp.data.text import load_tokenizer
from vlp.encoders.fusion import ImageTokens
from vlp.errors import UserError
from vlp.tasks.embeddings import encode_pairs
from vlp.tasks.rerank import Rerank, Shortlist, encode_distinct, match, rerank
from vlp.tasks.retrieval import Retrieval


def test_scores_and_candidates_equal_the_published_ones():
    model, _, _, meta, given, expected = published("albef_retrieval")
    model.eval()
    encode = SimpleNamespace(
        model=model,
        tokenizer=lambda texts, _: (given["input_ids"], given["attention_mask"].bool(), 0),
        data=SimpleNamespace(max_length=30),
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        images = model.encode_image(given["image"])
        texts = encode_distinct(encode, ["a caption"] * 20, 7)
        shortlist = Shortlist(images.embed, texts.embeds, meta["k"])
        for picture in range(6):
            asked = shortlist.captions_of(picture)
            shortlist.fill(picture, match(model, images[picture : picture + 1], texts, asked, 4))
    for (_, keys), scores, name in (
        (shortlist.i2t, shortlist.i2t_itm, "score_i2t"),
        (shortlist.t2i, shortlist.t2i_itm, "score_t2i"),
    ):
        found = torch.full_like(expected[name], -100.0).scatter_(1, keys, scores)
        assert torch.equal(found == -100, expected[name] == -100)
        close(found, expected[name], 1e-4)


@pytest.fixture
def albef(world):
    """A small ALBEF with random weights, on 50 images of coloured squares with two captions each."""
    torch.manual_seed(0)
    text = replace(SPEC.text, config=SPEC.text.config | {"vocab_size": 200})
    given = eval_model(replace(SPEC, text=text).build().eval(), str(world / "shards"))
    return replace(given, tokenizer=load_tokenizer(str(world / "tokenizer")), data=replace(given.data, max_length=16))


def of_all_pairs(given, k: int, plus_cosine: bool, pairs=None) -> dict[str, float]:
    """Compute recall at 1 in both directions by definition: score all pairs, with a copy of the image for each caption."""
    pairs, model = pairs or encode_pairs(given, given.data.val, 64), given.model
    dataset = EvalDataset(given.data.val, given.data.resize, given.preprocess, given.data.max_pixels)
    pixels = torch.stack([image for samples, _ in evaluation_batches(dataset, 64, 0) for image, _ in samples])
    cosines = pairs.images @ pairs.texts.T
    with torch.no_grad():
        text = model.encode_text(*given.tokenizer(pairs.captions, 16)[:2])
        images = model.encode_image(given.preprocess.normalise(pixels)).tokens
        rounds = (ImageTokens(image.expand(len(pairs.captions), -1, -1)) for image in images)
        itm = torch.stack([model.match(image, text)[:, 1] for image in rounds])
    positive = pairs.image_ids[:, None] == pairs.text_ids
    found = {}
    for way, cosine, score, true in (("i2t", cosines, itm, positive), ("t2i", cosines.T, itm.T, positive.T)):
        score = score + cosine if plus_cosine else score
        kept = torch.zeros_like(true).scatter_(1, cosine.topk(k).indices, True)
        found[way] = true.gather(1, score.masked_fill(~kept, -torch.inf).argmax(1, keepdim=True)).float().mean().item()
    return found


@pytest.mark.parametrize("score", ["itm", "itm+itc"])
def test_recall_equals_that_of_scoring_all_pairs(albef, score):
    metrics = Rerank(k=9, ks=(1, 5), score=score, batch_size=16, text_batch=7, resamples=0)(albef).metrics
    for way, recall in of_all_pairs(albef, 9, score == "itm+itc").items():
        assert metrics[f"{way}_r@1"].value == pytest.approx(recall)


def test_blind_reranking_matches_the_candidates_with_other_images(albef):
    """The reference exchanges the pixels before it scores all pairs."""
    blind = Rerank(k=9, ks=(1, 5), batch_size=16, resamples=0)(albef).blind
    dataset = EvalDataset(albef.data.val, albef.data.resize, albef.preprocess, albef.data.max_pixels)
    exchanged = OtherImages(dataset, albef.seed)
    cosines = encode_pairs(albef, albef.data.val, 64)
    with patch("tests.tasks.test_rerank.EvalDataset", lambda *_: exchanged):
        expected = of_all_pairs(albef, 9, False, cosines)
    assert blind.keys() == {f"{way}_{name}" for way in ("i2t", "t2i", "mean") for name in ("r@1", "r@5")} | {
        "mean_recall"
    }
    assert {way: blind[f"{way}_r@1"].value for way in expected} == pytest.approx(expected)


def test_metrics_without_reranking_equal_retrieval(albef):
    plain = Retrieval(resamples=0)(albef).metrics
    for k in (1, 10):  # re-ranking k candidates cannot change recall at k and beyond
        metrics = Rerank(k=k, resamples=0)(albef).metrics
        for name, value in plain.items():
            assert metrics[f"itc_{name}"].value == pytest.approx(value.value)
        for at in (1, 5, 10):
            if at >= k:
                assert metrics[f"mean_r@{at}"].value == pytest.approx(plain[f"mean_r@{at}"].value)


def test_images_are_projected_once_and_texts_encoded_once(albef, monkeypatch):
    model, projected, encoded = albef.model, [], []
    monkeypatch.setattr(
        model, "project", lambda image, f=model.project: projected.append(len(image.tokens)) or f(image)
    )
    monkeypatch.setattr(
        model,
        "encode_text",
        lambda ids, mask, f=model.encode_text: encoded.extend(map(tuple, ids.tolist())) or f(ids, mask),
    )
    result = Rerank(k=20, text_batch=8, resamples=0, blind=False)(albef)
    assert sum(projected) == result.n["images"] == 50
    pairs = encode_pairs(albef, albef.data.val, 64)
    assert len(set(pairs.captions)) < len(pairs.captions) == 100
    assert result.n["pairs"] < 50 * 20 + 100 * 20
    del encoded[:]
    Rerank(k=20, text_batch=8, resamples=0, blind=False)(albef)
    assert len(encoded) == len(set(pairs.captions))


@pytest.mark.parametrize(
    ("scores", "rank"),
    [
        ([[3.0, 2.0, 1.0]], 1),  # one negative ahead
        ([[1.0, 2.0, 2.0]], 1),  # a tie counts as ahead
        ([[1.0, 3.0, 2.0]], 0),
    ],
)
def test_rank_is_that_of_the_best_positive_and_ties_count_against(scores, rank):
    positive = torch.tensor([[False, True, False]])
    assert rerank(torch.tensor(scores), positive, torch.tensor([2])).tolist() == [rank]
    for by_tie in (positive, positive & False):  # whether or not the sort kept it among the candidates
        assert rerank(torch.tensor(scores), by_tie, torch.tensor([7])).tolist() == [7]


def two_of(rank: int, given, expected: tuple[dict, dict]) -> bool:
    torch.manual_seed(0)
    result = Rerank(k=9, batch_size=7, text_batch=8, resamples=10)(given)
    return (result.metrics, result.blind) == expected and result.n["images"] == 50


def test_two_processes_give_the_result_of_one(albef, two_processes):
    result = Rerank(k=9, batch_size=7, text_batch=8, resamples=10)(albef)
    assert two_processes(two_of, albef, (result.metrics, result.blind)) == [True, True]


def test_model_without_a_matching_head_is_refused(world):
    with pytest.raises(UserError, match="model.itm"):
        Rerank(data=str(world / "shards"))(eval_model(ColourModel()))


def test_scores_that_are_not_finite_are_refused(albef):
    with torch.no_grad():
        albef.model.itm.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        Rerank(k=3)(albef)
