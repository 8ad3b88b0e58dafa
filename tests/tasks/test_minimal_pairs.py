"""Minimal pairs: a bag-of-words model scores exactly chance, and a model that reads the order scores one."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import COLOURS
from tests.tasks.fakes import ColourModel, eval_model
from vlp.data.other_images import OtherImages
from vlp.data.preparing.formats import Pair
from vlp.data.preparing.pack import Packing, pack
from vlp.errors import UserError
from vlp.tasks.minimal_pairs import MinimalPairs
from vlp.types import Encoded

NAMES = list(COLOURS)
NAMES_OF = [[NAMES[n // 2 % 5], NAMES[(n // 2 + 1 + n // 6) % 5]][:: -1 if n % 2 else 1] for n in range(10)]


class Words:
    """Tokenizer whose ids are the numbers of a caption's two colours, in order."""

    def __call__(self, texts: list[str], max_length: int):
        ids = torch.tensor([[NAMES.index(word) for word in text.split() if word in NAMES] for text in texts])
        return ids, torch.ones_like(ids, dtype=torch.bool), 0


class Sides(ColourModel):
    """Encode the colours of the left and the right half as two one-hot vectors, or, with ``bag``, as their sum."""

    def __init__(self, bag: bool):
        super().__init__()
        self.bag = bag

    def _of(self, pairs: torch.Tensor) -> Encoded:
        """Encode (B, 2) numbers of colours."""
        embed = torch.eye(len(NAMES))[pairs] / 2**0.5
        embed = embed.sum(1) if self.bag else embed.flatten(1)
        return Encoded(embed[:, None], torch.ones(len(embed), 1, dtype=torch.bool), embed)

    def encode_image(self, image: torch.Tensor) -> Encoded:
        means = torch.stack([half.flatten(2).mean(2) * 255 for half in image.chunk(2, dim=3)], dim=1)
        values = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
        return self._of((means[:, :, None] - values).norm(dim=3).argmin(2))

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Encoded:
        return self._of(input_ids)


class OppositeMatching(Sides):
    """Has a matching head that contradicts its embeddings. The head decides."""

    can_match = True

    def __init__(self):
        super().__init__(bag=False)

    def project(self, image: Encoded) -> torch.Tensor:
        return image.embed

    def match(self, image: torch.Tensor, text: Encoded) -> torch.Tensor:
        score = (text.embed * image.repeat(len(text.embed) // len(image), 1)).sum(1)
        return torch.stack([score, -score], dim=1)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A world of 10 scenes: two halves of two colours, and the same with the halves exchanged."""
    folder = tmp_path_factory.mktemp("scenes")
    pairs = []
    for n in range(10):
        names = NAMES_OF[n]
        halves = [np.full((8, 4, 3), COLOURS[name], dtype=np.uint8) for name in names]
        Image.fromarray(np.concatenate(halves, axis=1)).save(folder / f"{n}.png")
        texts = [f"{a} left of {b}" for a, b in (names, names[::-1])]
        extra = {"number": n, "contrast": ("order", "shape")[n // 2 % 2], "minimal_pair": texts[1]}
        extra["things"] = [{}] * (2 + n // 2 % 2)
        pairs.append(Pair(str(folder / f"{n}.png"), (texts[0],), str(n), "scenes", extra))
    pack(pairs, folder / "val", Packing(shard_samples=4))
    return folder


def evaluated(model, scenes, **fields):
    given = eval_model(model)
    given.tokenizer = Words()
    return MinimalPairs(data=str(scenes), **fields)(given)


@pytest.mark.parametrize(
    ("model", "share"), [(Sides(bag=True), 0.5), (Sides(bag=False), 1.0), (OppositeMatching(), 0.0)]
)
def test_accuracy_of_models_with_known_answers(scenes, model, share):
    for batch_size in (3, 64):
        result = evaluated(model, scenes, batch_size=batch_size)
        assert {name: i.value for name, i in result.metrics.items()} == dict.fromkeys(
            ("accuracy", "accuracy_order", "accuracy_shape", "accuracy_2_things", "accuracy_3_things"), share
        )
    assert result.n == {"scenes": 10} and ("cosine" in result.protocol) == (model.__class__ is Sides)


def test_embeddings_can_be_asked_where_the_matching_head_contradicts_them(scenes):
    assert evaluated(OppositeMatching(), scenes, score="itc").metrics["accuracy"].value == 1.0
    assert evaluated(OppositeMatching(), scenes, score="itm").metrics["accuracy"].value == 0.0
    with pytest.raises(UserError, match="set score=itc"):
        evaluated(Sides(bag=False), scenes, score="itm")


def test_default_world_is_that_of_the_runs_val(scenes):
    given = eval_model(Sides(bag=False), str(scenes / "val"))
    given.tokenizer = Words()
    MinimalPairs().validate(given.data)
    assert MinimalPairs()(given).metrics["accuracy"].value == 1.0


def test_scores_that_are_not_finite_are_refused(scenes):
    class Broken(Sides):
        def encode_text(self, *given):
            encoded = super().encode_text(*given)
            return Encoded(encoded.tokens, encoded.mask, encoded.embed * torch.nan)

    with pytest.raises(UserError, match="not finite"):
        evaluated(Broken(bag=False), scenes)


def test_shards_without_scenes_are_refused(world):
    given = eval_model(Sides(bag=False), str(world / "shards" / "val"))
    with pytest.raises(UserError, match="vlp data world"):
        MinimalPairs(data=str(world), split="shards").validate(given.data)
    with pytest.raises(UserError, match="give data=FOLDER"):
        MinimalPairs().validate(eval_model(Sides(bag=False)).data)


def test_blind_accuracy_is_that_of_a_model_that_sees_other_images(scenes):
    """The reference exchanges the images on disk and evaluates as usual."""
    given = eval_model(Sides(bag=False), str(scenes / "val"))
    order = OtherImages(range(10), given.seed).following
    hits = []
    for n in range(10):
        names, shown = (NAMES_OF[each] for each in (n, order[n]))
        own, swapped = (sum(a == b for a, b in zip(shown, text)) for text in (names, names[::-1]))
        hits.append((own > swapped) + (own == swapped) / 2)
    for batch_size in (3, 64):
        result = evaluated(Sides(bag=False), scenes, batch_size=batch_size)
        assert result.blind["accuracy"].value == pytest.approx(np.mean(hits)) and result.metrics["accuracy"].value == 1
        assert result.blind.keys() == result.metrics.keys()
    assert np.mean(hits) < 0.9
    assert evaluated(Sides(bag=True), scenes).blind["accuracy"].value == 0.5
    assert evaluated(Sides(bag=False), scenes, blind=False).blind == {}
