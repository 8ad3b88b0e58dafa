"""Captions are scored by pycocoevalcap, and are those that beam search writes for each image."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.conftest import draw_pairs
from tests.models.test_albef import SPEC
from tests.tasks.fakes import eval_model
from vlp.data.preparing.pack import Packing, pack
from vlp.data.text import load_tokenizer
from vlp.encoders.decoder import Decoder
from vlp.encoders.generate import beam_search
from vlp.errors import UserError
from vlp.tasks.captioning import CaptionQuality, cider, words

pytest.importorskip("pycocoevalcap", reason="pip install pycocoevalcap (extra captioning)")


@pytest.fixture
def given(world):
    torch.manual_seed(0)
    text = replace(SPEC.text, config=SPEC.text.config | {"vocab_size": 200})
    spec = replace(SPEC, text=text, itc=False, itm=False, mlm=False, decoder=Decoder(layers=2, source="image"))
    found = eval_model(spec.build().eval(), str(world / "shards"))
    return replace(found, tokenizer=load_tokenizer(str(world / "tokenizer")), data=replace(found.data, max_length=16))


def test_own_caption_scores_higher_than_another_and_unrelated_words_score_zero():
    true = [("a red square", "red thing"), ("a blue square", "blue thing"), ("two green dogs", "dogs")]
    own, other = cider(["a red square", "a blue square", "two green dogs"], true), cider(["a blue square"] * 3, true)
    assert (own[[0, 2]] > other[[0, 2]]).all() and own[1] == other[1]
    assert cider(["nothing alike"] * 3, true).max() == 0
    assert words("A dog's ball, (red)!") == "a dog's ball red"


def test_every_image_is_captioned_and_submitted(given, tmp_path):
    path = tmp_path / "captions.json"
    task = CaptionQuality(beams=2, max_length=6, min_length=2, batch_size=16, submission=str(path), resamples=10)
    task.validate(given.data)
    result = task(given)
    submitted = json.loads(path.read_text())
    assert result.n == {"images": 50} and [each["image_id"] for each in submitted] == [f"{n:04d}" for n in range(50)]
    truth = [example["true"] for example in result.details["examples"]]
    scores = cider([each["caption"] for each in submitted], truth)
    assert result.metrics["cider"].value == pytest.approx(scores.mean()) and not result.metrics["cider"].percent


def test_submission_has_coco_ids_and_must_be_complete(given, tmp_path):
    pairs = draw_pairs(tmp_path / "pictures", 3)
    pairs = [
        replace(pair, extra={name: 40 + n}) for n, (pair, name) in enumerate(zip(pairs, ("cocoid", "image_id", "x")))
    ]
    pack(pairs, tmp_path / "shards", Packing())
    path = tmp_path / "captions.json"
    task = CaptionQuality(
        data=str(tmp_path / "shards"), beams=1, max_length=4, min_length=0, submission=str(path), resamples=2
    )
    task(given)
    assert [each["image_id"] for each in json.loads(path.read_text())] == [40, 41, "0002"]
    path.unlink()
    larger = tmp_path / "pictures" / "larger.png"
    Image.new("RGB", (99, 99)).save(larger)
    pack([*pairs, replace(pairs[0], image=str(larger), key="larger")], tmp_path / "more", Packing())
    with pytest.raises(UserError, match="^1 samples have no prediction, e.g. "):
        limited = replace(given, data=replace(given.data, max_pixels=5000))
        replace(task, data=str(tmp_path / "more"))(limited)
    assert not path.exists()
    with pytest.raises(UserError, match="choose another submission"):
        replace(task, submission="/proc/nowhere/x.json").validate(given.data)


def test_captions_do_not_depend_on_the_batch(given):
    torch.manual_seed(1)
    images = [torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8) for _ in range(3)]
    task, model = CaptionQuality(beams=2, max_length=6, min_length=2), given.model
    with torch.no_grad():
        together = task.write_captions(given, images)
        for image, caption in zip(images, together):
            described = model.describe(model.encode_image(given.preprocess.normalise(image[None])))
            tokenizer = given.tokenizer
            (ids,) = beam_search(model.decoder, described, tokenizer.cls_id, tokenizer.sep_id, 6, 2, 2, 1.0)
            assert tokenizer.text(ids) == caption


def test_mistakes_are_user_errors(given, monkeypatch):
    with pytest.raises(UserError, match="source='image'"):
        CaptionQuality()(replace(given, model=SPEC.build()))
    with pytest.raises(UserError, match="at most max_length"):
        CaptionQuality(min_length=30).validate(given.data)
    with pytest.raises(UserError, match="captioning has no data"):
        CaptionQuality().validate(replace(given.data, val=None))
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(UserError, match=r"vlp\[captioning\]"):
        CaptionQuality().validate(given.data)
