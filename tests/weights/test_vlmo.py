"""Exact round trip of VLMo's official files, image weights of BEiT, and other resolutions."""

from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from scipy.interpolate import RectBivariateSpline

from vlp.encoders.mome import Mome
from vlp.encoders.ragged import RaggedBatch
from vlp.encoders.relative_position import TableGrid, image_index, spread
from vlp.errors import UserError
from vlp.models.vlmo import Vlmo
from vlp.weights.vlmo import VlmoCheckpoint, export_vlmo, load_vlmo

D, LAYERS, HEADS, WORDS, GRID, FORK = 16, 3, 2, 40, 2, 2
ENCODER = Mome(D, LAYERS, HEADS, vl_from=FORK, image_size=32, vocab_size=WORDS, drop_path=0.0, text_dropout=0.0)
SPEC = Vlmo(ENCODER)
NOTHING = {"itc": False, "itc_vl": False, "itm": False, "mlm": False}


def both(name, *shape):
    return {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}


def official(task="pretrain", relative=True, text_only=False):
    """Return a checkpoint as the official training script saves it."""
    torch.manual_seed(0)
    state = {"transformer.cls_token": torch.randn(1, 1, D), **both("transformer.patch_embed.proj", D, 3, 16, 16)}
    state |= both("transformer.norm", D)
    for n in range(LAYERS):
        block = f"transformer.blocks.{n}"
        state |= both(f"{block}.norm1", D) | both(f"{block}.attn.proj", D, D)
        state |= {f"{block}.attn.{b}": torch.randn(D) for b in ("q_bias", "v_bias")}
        state[f"{block}.attn.qkv.weight"] = torch.randn(3 * D, D)
        if relative:
            state |= {f"{block}.gamma_{k}": torch.randn(D) for k in (1, 2)}
        for expert in ("text", "imag", "vl")[: 3 if n >= FORK and not text_only else 2]:
            state |= both(f"{block}.norm2_{expert}", D)
            state |= both(f"{block}.mlp_{expert}.fc1", 4 * D, D) | both(f"{block}.mlp_{expert}.fc2", D, 4 * D)
    length = 20
    state |= {
        "text_embeddings.word_embeddings.weight": torch.randn(WORDS, D),
        "text_embeddings.position_embeddings.weight": torch.randn(length, D),
        "text_embeddings.token_type_embeddings.weight": torch.randn(2, D),
        "text_embeddings.position_ids": torch.arange(length)[None],
        **both("text_embeddings.LayerNorm", D),
        "token_type_embeddings.weight": torch.randn(3 if task == "nlvr2" else 2, D),
    }
    if relative:
        state["relative_position_bias_table"] = torch.randn((2 * GRID - 1) ** 2 + 3 + 2 + 392, LAYERS * HEADS)
    else:
        state["transformer.pos_embed"] = torch.randn(1, 1 + GRID**2, D)
    if task in ("pretrain", "retrieval"):
        names = ("itc_image_proj", "itc_text_proj") + (("itc_vl_image_proj", "itc_vl_text_proj") * (task == "pretrain"))
        state |= {f"{name}.fc.weight": torch.randn(D, D) for name in names}
        state |= {"logit_scale": torch.tensor(2.6)} | (
            {"logit_vl_scale": torch.tensor(2.5)} if task == "pretrain" else {}
        )
    if task == "pretrain":
        state |= both("itm_score.fc", 2, D)
    if task in ("pretrain", "vqa", "nlvr2"):
        state |= both("pooler.dense", D, D)
    if task == "pretrain" or text_only:
        state |= both("mlm_score.transform.dense", D, D) | both("mlm_score.transform.LayerNorm", D)
        state |= {"mlm_score.bias": torch.randn(WORDS), "mlm_score.decoder.weight": torch.randn(WORDS, D)}
    if task in ("vqa", "nlvr2"):
        width, name = (D, "vqa_classifier") if task == "vqa" else (2 * D, "nlvr2_classifier")
        state |= both(f"{name}.0", 2 * D, width) | both(f"{name}.1", 2 * D) | both(f"{name}.3", 7, 2 * D)
    return state


FILES = {
    "base": ({}, SPEC),
    "base_plus": (
        {"relative": False},
        replace(SPEC, encoder=replace(ENCODER, positions="absolute", layer_scale=None, max_text_length=20)),
    ),
    "texts": (
        {"task": "texts", "text_only": True},
        replace(SPEC, **NOTHING | {"mlm": True}, encoder=replace(ENCODER, experts=("image", "text"))),
    ),
    "retrieval": ({"task": "retrieval"}, replace(SPEC, itc_vl=False, itm=False, mlm=False)),
    "vqa": ({"task": "vqa"}, replace(SPEC, **NOTHING, classes=7)),
    "nlvr2": (
        {"task": "nlvr2"},
        replace(SPEC, **NOTHING, classes=7, images=2, encoder=replace(ENCODER, image_kinds=2)),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_round_trip_of_an_official_file_is_exact(name, tmp_path):
    layout, spec = FILES[name]
    state = official(**layout)
    save_file(state, tmp_path / "vlmo.safetensors")
    model = replace(spec, weights=str(tmp_path / "vlmo.safetensors")).build()
    assert not model.report.new and not model.report.resized
    own = model.state_dict()
    # in the official layout, but not used by this model
    assert all(".experts." in key or key == "encoder.positions.cross" for key in model.report.unexpected)
    checkpoint = load_vlmo(state)
    assert own.keys() <= checkpoint.student.keys()
    assert all(torch.equal(own[key], checkpoint.student[key]) for key in own)
    back = export_vlmo(checkpoint)
    assert back.keys() == state.keys()
    assert all(back[key].shape == state[key].shape and torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["base", "base_plus"])
def test_export_of_a_trained_model_has_every_parameter_of_the_official_file(name):
    """The official code has absolute positions next to relative ones, and a strict load misses them otherwise."""
    layout, spec = FILES[name]
    exported, reference = export_vlmo(VlmoCheckpoint(spec.build().state_dict())), official(**layout)
    assert reference.keys() - {"text_embeddings.position_ids"} <= exported.keys()
    if name == "base":
        assert exported["text_embeddings.position_embeddings.weight"].shape == (196, D)
        assert exported["text_embeddings.position_ids"].tolist() == [list(range(196))]


def test_exported_model_loads_again():
    model = SPEC.build()
    own = model.state_dict()
    again = load_vlmo(export_vlmo(VlmoCheckpoint(own))).student
    assert again.keys() == own.keys() and all(torch.equal(again[key], own[key]) for key in own)
    with pytest.raises(ValueError, match="VLMo has no place for mim.mask_token"):
        export_vlmo(VlmoCheckpoint({**own, "mim.mask_token": torch.zeros(D)}))


def test_model_that_could_not_be_loaded_again_is_not_exported():
    """The parts of the table are recognised by its number of rows only."""
    own = SPEC.build().state_dict()
    without_cross = {key: value for key, value in own.items() if key != "encoder.positions.cross"}
    with pytest.raises(ValueError, match="this model lacks some"):
        export_vlmo(VlmoCheckpoint(without_cross))
    for part, rows in (("text", 128), ("image", 3 + 3 * 5)):
        other = own | {f"encoder.positions.{part}": torch.zeros(rows, own["encoder.positions.text"].shape[1])}
        with pytest.raises(ValueError, match="square images and 196 tokens"):
            export_vlmo(VlmoCheckpoint(other))


def test_second_image_kind_starts_as_a_copy_of_the_first(tmp_path):
    save_file(official(), tmp_path / "vlmo.safetensors")
    encoder = replace(ENCODER, image_kinds=2)
    spec = replace(SPEC, **NOTHING, classes=2, images=2, encoder=encoder, weights=str(tmp_path / "vlmo.safetensors"))
    kinds = spec.build().encoder.image.kind.weight
    assert torch.equal(kinds[0], kinds[1]) and torch.equal(kinds[0], official()["token_type_embeddings.weight"][1])


# --- BEiT ---------------------------------------------------------------------------------------------------------


def beit(shared):
    """Return a BEiT file: timm's model has the official names, with a table per layer as in fine-tuned files."""
    torch.manual_seed(0)
    model = timm.create_model(
        "beit_base_patch16_224", img_size=32, embed_dim=D, depth=LAYERS, num_heads=HEADS, num_classes=0, init_values=0.3
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        for block in model.blocks[1:] if shared else ():
            block.attn.relative_position_bias_table.copy_(model.blocks[0].attn.relative_position_bias_table)
    state = {k: v for k, v in model.state_dict().items() if "relative_position_index" not in k and "k_bias" not in k}
    if shared:
        tables = [k for k in state if k.endswith("relative_position_bias_table")]
        state["rel_pos_bias.relative_position_bias_table"] = state[tables[0]]
        state = {k: v for k, v in state.items() if k not in tables} | {"mask_token": torch.randn(1, 1, D)}
    return model.eval(), state


@pytest.mark.parametrize("shared", [True, False])
def test_beit_weights_reproduce_the_states_of_beit(shared, tmp_path):
    theirs, state = beit(shared)
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "beit.safetensors")
    images = replace(
        SPEC, **NOTHING, encoder=replace(ENCODER, experts=("image",)), weights=str(tmp_path / "beit.safetensors")
    )
    encoder, image = images.build().eval().encoder, torch.randn(2, 3, 32, 32)
    inputs = encoder.image(image)
    states = encoder.run_layers(
        inputs.flatten(0, 1), RaggedBatch.of_images(2, 5, torch.device("cpu")), 0, LAYERS, joint=False
    )
    wanted = theirs.patch_embed(image)
    wanted = torch.cat([theirs.cls_token.expand(2, -1, -1), wanted], 1)
    for block in theirs.blocks:
        wanted = block(wanted)
    torch.testing.assert_close(states.unflatten(0, (2, 5)), wanted, rtol=1e-4, atol=1e-4)


# --- other resolutions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(14, 24), (14, 30), (6, 9), (24, 14)])
def test_tables_are_resized_by_cubic_splines_between_distances_that_grow_geometrically(old, new):
    torch.manual_seed(0)
    table = torch.randn((2 * old - 1) ** 2 + 3, 2, dtype=torch.float64)
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if sum(q**k for k in range(old - 1)) > new - 1 else (q, high)
    far = [sum(low**k for k in range(n)) for n in range(1, old)]
    places, asked = [-x for x in far[::-1]] + [0] + far, list(range(1 - new, new))
    found = TableGrid((new, new)).resize(table)
    assert torch.equal(found[-3:], table[-3:])
    for column in range(2):
        values = table[:-3, column].view(2 * old - 1, -1).numpy()
        expected = RectBivariateSpline(places, places, values)(asked, asked)
        torch.testing.assert_close(
            found[:-3, column].view(2 * new - 1, -1), torch.from_numpy(expected), rtol=0, atol=1e-7
        )


def test_each_side_is_resized_independently():
    values = torch.randn(3 * 5, 4)
    table = torch.cat([values, torch.randn(3, 4)])
    found = TableGrid((2, 5), source=(2, 3)).resize(table)
    across = torch.einsum("xw,hwc->hxc", spread(3, 5).float(), values.view(3, 5, 4))
    torch.testing.assert_close(found[:-3].view(3, 9, 4), across)
    assert torch.equal(spread(4, 4), torch.eye(7, dtype=torch.float64))
    other = torch.randn(20, 4)  # fits no square grid
    assert TableGrid((3, 3)).resize(other) is other


@pytest.mark.parametrize("name", ["base", "base_plus"])
def test_weights_load_at_a_larger_image_size(name, tmp_path):
    layout, spec = FILES[name]
    save_file(official(**layout), tmp_path / "vlmo.safetensors")
    larger = replace(spec.encoder, image_size=(48, 64))
    model = replace(spec, encoder=larger, weights=str(tmp_path / "vlmo.safetensors")).build()
    assert model.report.resized == (f"encoder.{'positions.image' if name == 'base' else 'image.positions'}",)
    assert model.encode_image(torch.randn(1, 3, 48, 64)).inputs.shape == (1, 13, D)


def test_images_need_not_be_square():
    index = image_index((2, 3))
    assert index.shape == (7, 7) and sorted(index.unique().tolist()) == list(range(3 * 5 + 3))
    for a in range(6):
        for b in range(6):
            down, right = a // 3 - b // 3, a % 3 - b % 3
            assert index[1 + a, 1 + b] == (down + 1) * 5 + right + 2


# --- unreadable files ---------------------------------------------------------------------------------------------


def without(state, part):
    return {key: value for key, value in state.items() if part not in key}


REFUSED = {
    "no expert": (lambda s: without(s, "blocks.1.mlp_text"), "lacks the text expert of encoder.layers.1"),
    "no vl expert": (lambda s: without(without(s, "mlp_vl"), "norm2_vl"), "lacks the vl expert .* set model.vl_start"),
    "BEiT-3": (lambda s: {"beit3.encoder.layers.0.self_attn.k_proj.A.weight": torch.zeros(1)}, "is of BEiT-3"),
    "another model": (lambda s: {"visual.proj": torch.zeros(1)}, "is not a checkpoint of VLMo or BEiT"),
    "more": (lambda s: s | {"vae.decoder": torch.zeros(1)}, "has vae.decoder, which is unknown in VLMo"),
    "no patches": (lambda s: without(s, "patch_embed"), "the weights lack encoder.image.patches"),
    "no square": (lambda s: s | {"relative_position_bias_table": torch.zeros(500, 6)}, "no square image"),
    "another width": (lambda s: s | {"text_embeddings.LayerNorm.bias": torch.zeros(8)}, "choose a model of the same size"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unreadable_file_is_a_user_error(case, tmp_path):
    change, message = REFUSED[case]
    save_file(change(official()), tmp_path / "vlmo.safetensors")
    with pytest.raises(UserError, match=message):
        replace(SPEC, weights=str(tmp_path / "vlmo.safetensors")).build()
