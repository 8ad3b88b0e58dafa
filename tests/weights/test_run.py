"""A new run starts from the towers of an old one."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from tests.encoders.test_text import BERT, captions
from vlp.config import Data, Experiment
from vlp.data.reading.shards import Source
from vlp.encoders.decoder import Decoder
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.models.albef import Albef
from vlp.models.dual import Dual
from vlp.models.single import Single
from vlp.specs.json import dump
from vlp.training import checkpoint

IMAGE = TimmImage("test_vit", image_size=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))


def run_of(folder, spec, steps=(2,), average=False):
    """Write a run folder with a checkpoint of different random weights for each step, and return the models."""
    folder.mkdir()
    experiment = Experiment("x", spec, {}, Data(train=(Source("x"),))).resolved()
    (folder / "experiment.json").write_text(dump(experiment))
    models = []
    for step in steps:
        torch.manual_seed(step)
        models.append(spec.build())
        files = {"model": models[-1].state_dict()}
        if average:
            files["average"] = {k: 2 * v if v.is_floating_point() else v for k, v in files["model"].items()}
        checkpoint.save(folder / "checkpoints", step, files, {"step": step})
    return models


def assert_equal(tower, state, prefix):
    own = tower.state_dict()
    expected = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    assert own.keys() == expected.keys() and own
    assert all(torch.equal(own[k], v) for k, v in expected.items())


@pytest.mark.parametrize("spec", [Single(text=BertText(config=BERT), head="mlp", embed_size=8),
                                  Dual(image=IMAGE, text=BertText(config=BERT), projection="both", embed_size=8)])  # fmt: skip
def test_text_tower_is_the_newest_of_the_run_with_its_architecture(tmp_path, spec):
    run, (_, newest) = str(tmp_path / "run"), run_of(tmp_path / "run", spec, steps=(2, 10))
    start = BertText(weights=run, pool="mean", dropout=0.0)
    tower = start.build()
    assert_equal(tower, newest.state_dict(), "text.")
    assert (tower.pool, tower.width) == ("mean", 32) and not tower.report.new and not tower.report.unexpected
    assert {m.p for m in tower.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    ids, mask = captions()
    cls = replace(start, pool="cls").build().eval()
    torch.testing.assert_close(cls(ids, mask), newest.eval().text(ids, mask))


def test_image_tower_of_a_run_keeps_its_normalisation_and_can_be_resized(tmp_path):
    run, (model,) = str(tmp_path / "run"), run_of(tmp_path / "run", Single(image=IMAGE))
    spec = TimmImage("test_vit", weights=run)
    tower = spec.build()
    assert_equal(tower, model.state_dict(), "image.")
    assert tower.preprocess == model.preprocess
    larger = replace(spec, image_size=64, mean=(0.0, 0.0, 0.0)).build()
    assert larger.preprocess.size == (64, 64) and larger.preprocess.mean == (0.0, 0.0, 0.0)
    assert larger.report.resized == ("pos_embed",)
    with pytest.raises(UserError, match="the weights lack"):
        replace(spec, name="test_resnet").build()


def test_averaged_weights_are_preferred(tmp_path):
    (model,) = run_of(tmp_path / "run", Single(text=BertText(config=BERT)), average=True)
    tower = BertText(weights=str(tmp_path / "run")).build()
    name = "model.encoder.layer.0.output.dense.weight"
    assert torch.equal(tower.get_parameter(name), 2 * model.text.get_parameter(name))


def test_damaged_checkpoint_is_skipped_with_a_warning(tmp_path):
    older, _ = run_of(tmp_path / "run", Single(text=BertText(config=BERT)), steps=(2, 10))
    file = tmp_path / "run" / "checkpoints" / "step-00000010" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        tower = BertText(weights=str(tmp_path / "run")).build()
    assert_equal(tower, older.state_dict(), "text.")


def test_resolved_spec_does_not_need_the_run(tmp_path):
    run_of(tmp_path / "run", Single(text=BertText(config=BERT)))
    run_of(tmp_path / "image", Single(image=IMAGE))
    text = BertText(weights=str(tmp_path / "run")).resolved()
    image = TimmImage("test_vit", weights=str(tmp_path / "image")).resolved()
    for name in ("run", "image"):
        (tmp_path / name).rename(tmp_path / f"{name} gone")
    assert BertText(**json.loads(json.dumps(asdict(text)))).build(load_weights=False).width == 32
    assert image.build(load_weights=False).preprocess.mean == IMAGE.mean
    for spec in (text, image):
        with pytest.raises(UserError, match="no such file"):
            spec.build()


def test_run_without_the_tower_or_a_checkpoint_is_a_user_error(tmp_path):
    run_of(tmp_path / "text", Single(text=BertText(config=BERT)), steps=())
    with pytest.raises(UserError, match="no image tower"):
        TimmImage("test_vit", weights=str(tmp_path / "text")).resolved()
    with pytest.raises(UserError, match="no checkpoint"):
        BertText(weights=str(tmp_path / "text")).build()
    run_of(tmp_path / "image", Single(image=IMAGE))
    with pytest.raises(UserError, match="no text tower"):
        BertText(weights=str(tmp_path / "image")).build()


def test_a_whole_dual_encoder_starts_from_a_run_heads_and_scalars_too(tmp_path):
    spec = Dual(image=IMAGE, text=BertText(config=BERT), projection="both", embed_size=8, temperature=0.5, bias=-3.0)
    run, (model,) = str(tmp_path / "run"), run_of(tmp_path / "run", spec)
    started = replace(spec, temperature=0.07, bias=0.0, weights=run).build()
    assert_equal(started, model.state_dict(), "")
    assert started.reports["model"].new == started.reports["model"].unexpected == ()
    larger = replace(spec, image=replace(IMAGE, image_size=64), weights=run).build()
    assert larger.reports["model"].resized == ("image.model.pos_embed",)
    with pytest.raises(UserError, match="choose a model of the same size"):
        replace(spec, embed_size=9, weights=run).build()
    assert not torch.equal(
        replace(spec, weights=run).build(load_weights=False).text_projection.weight, model.text_projection.weight
    )


def test_albef_starts_from_a_run_with_new_heads_and_a_decoder_copied_from_fusion(tmp_path):
    sizes = BERT | {"num_hidden_layers": 1}
    parts = {"image": IMAGE, "text": BertText(config=sizes), "fusion": Fusion(layers=2), "embed_size": 8}
    (old,) = run_of(tmp_path / "run", Albef(**parts))
    spec = Albef(**parts, weights=str(tmp_path / "run"), decoder=Decoder(layers=2), classes=3, mlm=False, itm=False)
    model = spec.build()
    own, state = model.state_dict(), old.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in state if name in own)
    same = 0
    for name, value in own.items():
        for to, of in (("layers", "fusion.layers"), ("embeddings", "text.model.embeddings"), ("head", "mlm")):
            begun = state.get(name.replace(f"decoder.{to}", of, 1))
            if name.startswith(f"decoder.{to}.") and begun.shape == value.shape:
                assert torch.equal(value, begun), name
                same += 1
    new = {name for name in own if name.startswith(("decoder", "classifier"))} - set(model.report.loaded)
    # fusion reads images, the decoder texts of another width: those keys and values start at random
    assert same > 50 and {name.split(".")[0] for name in new} == {"decoder", "classifier"}
    assert all(".cross_attention.key" in n or ".cross_attention.value" in n for n in new if n.startswith("decoder"))
    captions = replace(spec, decoder=Decoder(layers=2, source="image"), classes=None).build()
    assert not captions.report.new and captions.fusion is None
    assert torch.equal(
        captions.decoder.layers[1].cross_attention.key.weight, state["fusion.layers.1.cross_attention.key.weight"]
    )
