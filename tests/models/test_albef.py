import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from vlp.data.preprocess import Preprocess
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage, TimmTower
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.models.albef import Albef
from vlp.models.albef import AlbefModel as Model
from vlp.types import Batch
from vlp.weights import reading
from vlp.weights.albef import AlbefCheckpoint, export_albef, load_albef

PARITY = Path(__file__).resolve().parents[2].parent / "shared" / "parity"
SIZES = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
SIZES |= {"model_type": "bert", "max_position_embeddings": 40}
SPEC = Albef(
    image=TimmImage("test_vit", image_size=32),
    text=BertText(config=SIZES | {"num_hidden_layers": 2}, dropout=0.0, length_groups=2),
    fusion=Fusion(layers=2),
    embed_size=24,
)


def inputs(batch=4):
    torch.manual_seed(1)
    mask = torch.arange(9) < torch.tensor([7, 4, 2, 4])[:batch, None]  # and two columns that no text reaches
    return torch.randn(batch, 3, 32, 32), torch.randint(5, 99, mask.shape).masked_fill(~mask, 0), mask


# --- equal to the published implementation -------------------------------------------------------------------------


def published(name):
    """Return a model with the student's weights of a parity folder, its teacher, inputs and outputs."""
    folder = PARITY / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: the numbers of the published code are not part of the repository")
    meta = json.loads((folder / "meta.json").read_text())["inputs"]
    vit, bert, config = meta["vit"], meta["bert"], meta["config"]
    kept = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
    sizes = {key: bert[key] for key in kept} | {"model_type": "bert", "num_hidden_layers": bert["fusion_layer"]}
    text = BertText(config=sizes, dropout=0.0, length_groups=3)
    checkpoint = load_albef(folder / "weights.safetensors")
    layers = bert["num_hidden_layers"] - bert["fusion_layer"]
    mlm = "mlm.bias" in checkpoint.student
    spec = Albef(TimmImage("unused"), text, Fusion(layers), mlm=mlm, embed_size=config["embed_dim"])
    size = config["image_res"]

    def build(state):
        model = VisionTransformer(img_size=size, patch_size=16, num_classes=0, **vit)
        image = TimmTower(model, Preprocess((size, size), (0.5,) * 3, (0.5,) * 3, "bicubic"))
        built = Model(spec, image, text.build())
        assert reading.load(built, state).new == ()
        return built

    files = [load_file(folder / f"{file}.safetensors") for file in ("inputs", "outputs")]
    return build(checkpoint.student), build(checkpoint.teacher), checkpoint, meta, *files


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("pack", [True, False])
def test_pretraining_losses_and_gradients_equal_the_published_code(pack):
    model, teacher, checkpoint, meta, given, expected = published("albef_pretrain")
    model.fusion.pack = teacher.fusion.pack = pack
    decay, alpha = meta["config"]["momentum"], meta["alpha"]
    for average, weight in zip(teacher.parameters(), model.parameters()):
        average.data.lerp_(weight.data, 1 - decay)
    mask = given["attention_mask"].bool()
    batch = Batch(torch.arange(8), given["image"], given["input_ids"], mask)
    with torch.no_grad():
        f_m = Forward(teacher, batch)
        close(f_m.image.tokens, expected["image_embeds_m"])
        close(f_m.image.embed, expected["image_feat_m"])
        close(f_m.text.embed, expected["text_feat_m"])
    f = Forward(model, batch, f_m)
    close(f.image.tokens, expected["image_embeds"])
    close(f.image.embed, expected["image_feat"])
    close(f.text.embed, expected["text_feat"])

    def similarity(queries, own, column):
        return queries @ torch.cat([own, checkpoint.queue[f"column.{column}"]]).T * model.scale

    itc = 0.0
    for name, of, other in (("i2t", "image", "text"), ("t2i", "text", "image")):
        keys = getattr(f_m, other).embed
        logits = similarity(getattr(f, of).embed, keys, other)
        close(logits, expected[f"sim_{name}"])
        with torch.no_grad():
            targets = alpha * similarity(getattr(f_m, of).embed, keys, other).softmax(1)
            targets[:, :8] += (1 - alpha) * torch.eye(8)
        itc = itc + F.cross_entropy(logits, targets) / 2
    close(itc, expected["loss_ita"])

    # ours: positives and another text in the order of the images, then other images for the texts; theirs: the last two
    # the other way round
    texts = torch.cat([torch.arange(8), expected["neg_text_for_image"], torch.arange(8)])
    logits = model.match(f.projected, f.text, texts, expected["neg_image_for_text"])
    close(logits[torch.cat([torch.arange(8), torch.arange(16, 24), torch.arange(8, 16)])], expected["itm_logits"])
    itm = F.cross_entropy(logits, expected["itm_labels"])
    close(itm, expected["loss_itm"])

    labels = expected["mlm_labels"].flatten()
    positions = (labels != -100).nonzero()[:, 0]
    logits = model.masked_text(f, expected["masked_ids"], positions)
    close(logits, expected["mlm_logits"].flatten(0, 1)[positions])
    with torch.no_grad():
        soft = teacher.masked_text(f_m, expected["masked_ids"], positions)
    close(soft, expected["mlm_logits_m"].flatten(0, 1)[positions])
    mlm = (1 - alpha) * F.cross_entropy(logits, labels[positions]) + alpha * F.cross_entropy(logits, soft.softmax(1))
    close(mlm, expected["loss_mlm"])

    (itc + itm + mlm).backward()
    found = export_albef(AlbefCheckpoint({name: p.grad for name, p in model.named_parameters()}))
    for name, gradient in load_file(PARITY / "albef_pretrain" / "grads.safetensors").items():
        if re.search(r"(self|crossattention\.self)\.key\.bias$", name):
            continue  # the true gradient is zero, so both are noise
        norm = gradient.norm()
        assert (found[name] - gradient).norm() <= 1e-4 * norm + 1e-7, (name, float(norm))


def test_match_scores_equal_the_published_reranking():
    model, _, _, _, given, expected = published("albef_retrieval")
    with torch.no_grad():
        seen = model.encode_image(given["image"])
        read = model.encode_text(given["input_ids"], given["attention_mask"].bool())
        image = model.project(seen)
        for name in ("score_i2t", "score_t2i"):
            scores = expected[name] if name == "score_i2t" else expected[name].T
            for row, wanted in enumerate(scores):  # an image with all its texts: keys and values are read in place
                texts = (wanted > -100).nonzero()[:, 0]
                if len(texts):
                    close(model.match(image[row : row + 1], read, texts)[:, 1], wanted[texts], 1e-4)
            images, texts = (scores > -100).nonzero().T
            close(model.match(image, read, texts, images)[:, 1], scores[images, texts], 1e-4)


# --- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("itc", [True, False])
@pytest.mark.parametrize("itm", [True, False])
@pytest.mark.parametrize("mlm", [True, False])
def test_every_parameter_has_a_gradient_from_the_objectives(itc, itm, mlm):
    if not (itc or itm or mlm):
        return
    model = replace(SPEC, itc=itc, itm=itm, mlm=mlm).build()
    assert (model.fusion is None) == (not itm and not mlm)
    image, ids, mask = inputs()
    f = Forward(model, Batch(torch.arange(4), image, ids, mask))
    loss = torch.zeros(())
    if itc:
        loss = loss + F.cross_entropy(f.image.embed @ f.text.embed.T * model.scale, torch.arange(4))
    if itm:
        loss = loss + F.cross_entropy(model.match(f.projected, f.text), torch.tensor([0, 1, 1, 0]))
    if mlm:
        loss = loss + F.cross_entropy(model.masked_text(f, ids, torch.tensor([1, 10])), torch.tensor([7, 8]))
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert set(model.scalars()) == ({"temperature"} if itc else set())
    model.clamp_scalars()


def test_masked_text_equals_the_head_on_all_fused_tokens():
    model = SPEC.build().eval()
    image, ids, mask = inputs()
    f = Forward(model, Batch(torch.arange(4), image, ids, mask))
    masked = ids.masked_fill(torch.arange(9) == 1, 3)
    everywhere = model.fuse(f.projected, model.encode_text(masked, mask))
    positions = torch.tensor([1, 10, 12, 0, 0])  # the last two as a filler is
    expected = model.mlm(everywhere.flatten(0, 1)[positions], model.text.get_input_embeddings())
    torch.testing.assert_close(model.masked_text(f, masked, positions), expected, rtol=1e-4, atol=1e-5)


def test_no_masked_token_gives_no_logits_and_zero_gradients():
    model = SPEC.build()
    image, ids, mask = inputs()
    f = Forward(model, Batch(torch.arange(4), image, ids, mask))
    logits = model.masked_text(f, ids, torch.zeros(0, dtype=torch.long))
    assert logits.shape == (0, 99)
    logits.sum().backward()
    assert model.fusion.layers[0].contract.weight.grad.abs().max() == 0


def test_encoded_text_keeps_its_length_when_the_tower_drops_padding():
    model = SPEC.build().eval()
    _, ids, mask = inputs()
    text = model.encode_text(ids, mask)
    assert text.tokens.shape == (4, 9, 48) and torch.equal(text.mask, mask)
    torch.testing.assert_close(text.embed, F.normalize(model.text_projection(text.tokens[:, 0]), dim=-1))


def test_temperature_divides_and_is_bounded():
    model = SPEC.build()
    assert model.scale.item() == pytest.approx(1 / 0.07) and model.temperature.shape == (1,)
    for learned, effective in ((0.6, 0.5), (-0.001, 0.001)):
        with torch.no_grad():
            model.temperature.fill_(learned)
        assert model.scale.item() == pytest.approx(1 / effective, rel=1e-5)
        model.clamp_scalars()
        assert model.temperature.item() == pytest.approx(effective)
    model.scale.sum().backward()
    assert model.temperature.grad.item() != 0


def test_layer_ids_follow_the_computation():
    model = SPEC.build()  # test_vit has 6 blocks
    ids = model.layer_ids()
    assert set(ids) == {name for name, _ in model.named_parameters()}
    assert ids["text.model.encoder.layer.1.output.dense.weight"] == ids["image.model.blocks.5.norm1.weight"] == 6
    assert [ids[f"fusion.layers.{n}.expand.weight"] for n in range(2)] == [7, 8]
    assert {ids[n] for n in ("temperature", "itm.weight", "mlm.bias", "image_projection.weight")} == {9}


def test_positions_and_temperature_have_no_weight_decay():
    assert SPEC.build().no_weight_decay() == {
        *("temperature", "image.model.cls_token", "image.model.pos_embed"),
        *("text.model.embeddings.position_embeddings.weight", "text.model.embeddings.token_type_embeddings.weight"),
    }


def test_activation_checkpointing_keeps_gradients_and_covers_every_part():
    model = SPEC.build()
    image, ids, mask = inputs()
    calls = []
    model.image.model.blocks[0].norm1.register_forward_hook(lambda *_: calls.append("image"))
    model.text.model.encoder.layer[0].attention.register_forward_hook(lambda *_: calls.append("text"))
    model.fusion.layers[1].expand.register_forward_hook(lambda *_: calls.append("fusion"))
    gradients = []
    for how in ("none", "full"):
        model.set_activation_checkpointing(how)
        model.zero_grad()
        calls.clear()
        model.match(model.project(model.encode_image(image)), model.encode_text(ids, mask)).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert sorted(set(calls)) == ["fusion", "image", "text"] and calls.count("fusion") == 2
    torch.testing.assert_close(gradients[1], gradients[0])


def test_resolved_spec_survives_json_and_rebuilds_the_model():
    read = json.loads(json.dumps(asdict(SPEC.resolved())))
    parts = {"image": TimmImage(**read["image"]), "text": BertText(**read["text"]), "fusion": Fusion(**read["fusion"])}
    model, again = SPEC.build().eval(), Albef(**(read | parts)).build(load_weights=False).eval()
    again.load_state_dict(model.state_dict())
    image, ids, mask = inputs()
    with torch.no_grad():
        both = [m.match(m.project(m.encode_image(image)), m.encode_text(ids, mask)) for m in (model, again)]
    torch.testing.assert_close(*both)


def test_bert_is_split_between_text_tower_and_fusion(tmp_path):
    whole = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES | {"num_hidden_layers": 5}))
    whole.save_pretrained(tmp_path)
    text = BertText(weights=str(tmp_path), config={"num_hidden_layers": 3})
    model = replace(SPEC, text=text, fusion=Fusion(2, str(tmp_path), first_layer=3)).build()
    state = whole.state_dict()
    for number in range(5):
        old = state[f"bert.encoder.layer.{number}.attention.self.key.weight"]
        layers = model.text.model.encoder.layer
        ours = layers[number].attention.self.key if number < 3 else model.fusion.layers[number - 3].self_attention.key
        assert torch.equal(ours.weight, old)
    assert torch.equal(model.mlm.dense.weight, state["cls.predictions.transform.dense.weight"])
    assert len(model.text.model.encoder.layer) == 3
    left_out = model.reports["text"].unexpected
    assert {re.search(r"layer\.(\d)", n)[1] for n in left_out if "layer." in n} == {"3", "4"}
    assert all("cross_" in name for name in model.reports["fusion"].new) and model.reports["fusion"].loaded


@pytest.mark.parametrize(
    "spec, message",
    [
        (replace(SPEC, temperature=0.0), "above 0"),
        (replace(SPEC, text=replace(SPEC.text, pool="mean")), "text.pool to cls"),
        (replace(SPEC, fusion=Fusion(layers=0)), "layers is 0; set it to at least 1"),
        (replace(SPEC, fusion=Fusion(heads=5)), "divide the width"),
    ],
)
def test_incompatible_settings_are_refused_in_one_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        spec.build()
    assert "\n" not in str(error.value)
