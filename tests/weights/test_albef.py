import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.loading.albef import build_albef
from vlp.loading.base import LoadOptions
from vlp.loading.load_model import load_model
from vlp.models.albef import Albef
from vlp.objectives.queues import Queue
from vlp.weights.albef import AlbefCheckpoint, export_albef, load_albef

PARITY = Path(__file__).resolve().parents[2].parent / "shared" / "parity"
D, HIDDEN, WORDS, POSITIONS, E, K, GRID = 64, 128, 50, 20, 24, 12, 2  # a ViT for 32 pixels in patches of 16
LAYER = {
    **{f"attention.{n}": (D, D) for n in ("self.query", "self.key", "self.value", "output.dense")},
    "attention.output.LayerNorm": (D,),
    "intermediate.dense": (HIDDEN, D),
    "output.dense": (D, HIDDEN),
    "output.LayerNorm": (D,),
}
CROSS = {f"cross{name}": shape for name, shape in LAYER.items() if name.startswith("attention")}
HEADS = {"itm_head": 2, "ta_head": 3, "vision_proj": E, "text_proj": E}


def both(name, shape):
    return {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}


def visual(name="visual_encoder"):
    state = {f"{name}.cls_token": torch.randn(1, 1, D), f"{name}.pos_embed": torch.randn(1, 1 + GRID**2, D)}
    state |= both(f"{name}.patch_embed.proj", (D, 3, 16, 16)) | both(f"{name}.norm", (D,))
    for n in range(6):
        block = {"norm1": (D,), "attn.qkv": (3 * D, D), "attn.proj": (D, D), "norm2": (D,)}
        block |= {"mlp.fc1": (192, D), "mlp.fc2": (D, 192)}
        for part, shape in block.items():
            state |= both(f"{name}.blocks.{n}.{part}", shape)
    return state


def bert(name, layers, fusion_layer, masked_lm):
    """Return the parameters of xbert by its names."""
    inner = f"{name}.bert" if masked_lm else name
    words = torch.randn(WORDS, D)
    state = {
        f"{inner}.embeddings.position_ids": torch.arange(POSITIONS)[None],
        f"{inner}.embeddings.word_embeddings.weight": words,
        f"{inner}.embeddings.position_embeddings.weight": torch.randn(POSITIONS, D),
        f"{inner}.embeddings.token_type_embeddings.weight": torch.randn(2, D),
        **both(f"{inner}.embeddings.LayerNorm", (D,)),
    }
    for n in range(layers):
        for part, shape in (LAYER | (CROSS if n >= fusion_layer else {})).items():
            state |= both(f"{inner}.encoder.layer.{n}.{part}", shape)
    if masked_lm:
        head = f"{name}.cls.predictions"
        state |= both(f"{head}.transform.dense", (D, D)) | both(f"{head}.transform.LayerNorm", (D,))
        bias = torch.randn(WORDS)
        state |= {f"{head}.bias": bias, f"{head}.decoder.bias": bias, f"{head}.decoder.weight": words}
    return state


def twins(state, fusion_layer):
    """Give both twins of a pair the same keys and values of images, as their file does."""
    for key, value in state.items():
        if found := re.match(r"(.*layer\.)(\d+)(\.crossattention\.self\.(?:key|value)\..*)", key):
            number = int(found[2])
            value.copy_(state[f"{found[1]}{number - (number - fusion_layer) % 2}{found[3]}"])
    return state


def queues(index):
    state = {f"{name}_queue": torch.nn.functional.normalize(torch.randn(E, K), dim=0) for name in ("image", "text")}
    state["queue_ptr"] = torch.tensor([8])
    return state | ({"idx_queue": torch.tensor([[5, 5, 2, 3, 9, 1, 0, 7] + [-100] * 4])} if index else {})


def heads(*names):
    return {key: value for name in names for key, value in both(name, (HEADS[name], D)).items()}


def classifier(name, classes):
    return both(f"{name}.0", (D, D)) | both(f"{name}.2", (classes, D))


def official(layout):
    """Return a checkpoint with two text and two fusion layers, in the layout of the official scripts or of LAVIS."""
    torch.manual_seed(0)
    student_only = layout.startswith("lavis") or layout in ("text assignment",)
    state = {}
    for twin in ("",) if student_only else ("", "_m"):
        state |= visual(f"visual_encoder{twin}")
        if layout.endswith("pretrain"):
            state |= bert(f"text_encoder{twin}", 4, 2, masked_lm=True)
        elif layout in ("nlvr2", "text assignment"):
            state |= twins(bert(f"text_encoder{twin}", 6, 2, masked_lm=False), 2)
        else:
            state |= bert(f"text_encoder{twin}", 4, 2, masked_lm=False)
        if layout in ("nlvr2", "entailment"):
            state |= classifier(f"cls_head{twin}", 2 if layout == "nlvr2" else 3)
        if layout == "vqa":
            state |= bert(f"text_decoder{twin}", 2, 0, masked_lm=True)
        if layout in ("pretrain", "retrieval", "lavis pretrain", "lavis retrieval", "text assignment"):
            projections = heads("vision_proj", "text_proj")
            state |= {key.replace("_proj.", f"_proj{twin}."): value for key, value in projections.items()}
    if layout == "text assignment":
        state |= heads("ta_head") | {"temp": torch.tensor(0.06)}
    if layout.split()[-1] in ("pretrain", "retrieval"):
        state |= heads("itm_head") | {"temp": torch.tensor(0.06)} | queues(index=layout.endswith("retrieval"))
    return state


def of_lavis(task):
    """Return a checkpoint as LAVIS saves it: without token types, and without frozen parameters under their first name.

    Its runner drops the names of frozen parameters that ``named_parameters()`` lists, which are the first ones of shared
    parameters. ``state_dict()`` has all names, so that the others stay.
    """
    state = official(task)
    first = {}
    for key, value in state.items():
        first.setdefault(value.data_ptr(), key)
    if task == "nlvr2":  # the twins' keys and values are one parameter there
        for n, name in product((2, 4), ("key.weight", "key.bias", "value.weight", "value.bias")):
            layer = "text_encoder_m.encoder.layer.{}.crossattention.self.{}".format
            first[state[layer(n + 1, name)].data_ptr()] = layer(n, name)
    frozen = {key for key in state if "_m." in key and first[state[key].data_ptr()] == key}
    frozen -= {key for key in frozen if key.endswith("position_ids")}  # buffers are saved
    return {key: value for key, value in state.items() if key not in frozen and "token_type_embeddings" not in key}


LAVIS = ("pretrain", "retrieval", "vqa", "nlvr2", "entailment")
LAYOUTS = (
    "pretrain",
    "retrieval",
    "vqa",
    "nlvr2",
    "text assignment",
    "entailment",
    "lavis pretrain",
    "lavis retrieval",
)
SIZES = {"hidden_size": D, "num_attention_heads": 4, "intermediate_size": HIDDEN, "vocab_size": WORDS}
SIZES |= {"model_type": "bert", "num_hidden_layers": 2, "max_position_embeddings": POSITIONS}
SPEC = Albef(TimmImage("test_vit", image_size=32), BertText(config=SIZES), Fusion(layers=2), embed_size=E)


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_exact(layout):
    state = official(layout)
    checkpoint = load_albef(state)
    same(export_albef(checkpoint), state)
    assert bool(checkpoint.momentum) == any("_m." in key for key in state)


@pytest.mark.parametrize("name", ["albef_pretrain", "albef_retrieval", "albef_vqa"])
def test_round_trip_of_files_of_the_published_code_is_exact(name):
    file = PARITY / name / "weights.safetensors"
    if not file.is_file():
        pytest.skip(f"{file} is not there: the numbers of the published code are not part of the repository")
    same(export_albef(load_albef(file)), load_file(file))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_fills_the_model_that_it_holds(layout):
    checkpoint = load_albef(official(layout))
    has = {
        name: any(key.startswith(f"{name}.") for key in checkpoint.student)
        for name in ("itm", "mlm", "text_projection")
    }
    pairs = layout in ("nlvr2", "text assignment")
    classes = {"nlvr2": 2, "entailment": 3}.get(layout)
    heads = {"itm": not pairs, "mlm": has["mlm"], "classes": classes, "assignment": layout == "text assignment"}
    model = replace(SPEC, itc=has["text_projection"], fusion=Fusion(layers=2, images=1 + pairs), **heads).build()
    before = None if pairs else model.itm.weight.clone()
    model.load(checkpoint.student)
    if not pairs:
        assert (model.itm.weight == before).all() == (not has["itm"])
    assert set(model.reports["model"].new) == (set() if has["itm"] or pairs else {"itm.weight", "itm.bias"})
    assert {name.split(".")[0] for name in model.reports["model"].unexpected} <= {"decoder"}
    for name, tensor in model.state_dict().items():
        if not name.startswith("itm.") or has["itm"]:
            assert torch.equal(tensor, checkpoint.student[name]), name
    if pairs:
        copies = {name for name in checkpoint.student if name not in model.state_dict()}
        assert {name.split(".")[-2] for name in copies} == {"key", "value"} and len(copies) == 8
        same(export_albef(AlbefCheckpoint(model.state_dict())), without_momentum(official(layout)))


def without_momentum(state):
    return {key: value for key, value in state.items() if not key.partition(".")[0].endswith("_m")}


def test_twins_start_from_pretrained_layers_repeated_as_published():
    """Layers 6, 7, ... of a pre-trained file become layers 6 and 7, 8 and 9, ... of NLVR2's."""
    checkpoint = load_albef(official("pretrain"))
    spec = replace(SPEC, itc=False, itm=False, mlm=False, classes=2, fusion=Fusion(layers=2, images=2))
    model = spec.build()
    model.load(checkpoint.student)
    exported = export_albef(AlbefCheckpoint(model.state_dict()))
    given = {key.replace("bert.", ""): value for key, value in official("pretrain").items()}
    layer = "text_encoder.encoder.layer"
    for number in range(6):
        source = number if number < 2 else 2 + (number - 2) // 2
        names = [key for key in exported if key.startswith(f"{layer}.{number}.")]
        assert len(names) == (16 if number < 2 else 26)
        for key in names:
            assert torch.equal(exported[key], given[key.replace(f"{layer}.{number}.", f"{layer}.{source}.")]), key


def test_twins_with_different_keys_are_refused():
    state = official("nlvr2")
    name = "text_encoder.encoder.layer.3.crossattention.self.key.weight"
    state[name] = state[name] + 1
    spec = replace(SPEC, itc=False, itm=False, mlm=False, classes=2, fusion=Fusion(layers=2, images=2))
    with pytest.raises(UserError, match="fusion.layers.1.cross_attention.key.weight differs from that of its twin"):
        spec.build().load(load_albef(state).student)


def test_official_names_are_translated():
    state = official("pretrain")
    found = load_albef(state)
    layer = "text_encoder.bert.encoder.layer"
    for ours, theirs in {
        "image.model.blocks.1.attn.qkv.weight": "visual_encoder.blocks.1.attn.qkv.weight",
        "text.model.encoder.layer.1.output.dense.bias": f"{layer}.1.output.dense.bias",
        "fusion.layers.0.self_norm.weight": f"{layer}.2.attention.output.LayerNorm.weight",
        "fusion.layers.1.cross_attention.key.weight": f"{layer}.3.crossattention.self.key.weight",
        "fusion.layers.1.contract.weight": f"{layer}.3.output.dense.weight",
        "mlm.norm.bias": "text_encoder.cls.predictions.transform.LayerNorm.bias",
        "image_projection.weight": "vision_proj.weight",
    }.items():
        assert torch.equal(found.student[ours], state[theirs])
        top, _, rest = theirs.partition(".")
        assert torch.equal(found.momentum[ours], state[f"{top}_m.{rest}"])
    assert found.student["temperature"].tolist() == pytest.approx([0.06])
    assert "temperature" not in found.momentum and torch.equal(found.teacher["itm.bias"], state["itm_head.bias"])


@pytest.mark.parametrize("layout", ["pretrain", "retrieval"])
def test_queue_goes_into_a_queue_and_comes_back(layout):
    state = official(layout)
    queue = Queue(K, {"image": E, "text": E}, torch.device("cpu"))
    queue.load(load_albef(state).queue)
    assert len(queue) == K and torch.equal(queue["image"], state["image_queue"].T)
    assert queue.image_id.tolist() == ([5, 5, 2, 3, 9, 1, 0, 7] + [-1] * 4 if layout == "retrieval" else [-1] * K)
    checkpoint = replace(load_albef(state), queue=queue.tensors())
    same(export_albef(checkpoint), state)
    queue.push(torch.tensor([4]), image=torch.ones(1, E), text=torch.ones(1, E))
    pushed = export_albef(replace(checkpoint, queue=queue.tensors()))
    assert pushed["queue_ptr"].tolist() == [9] and pushed["image_queue"][:, 8].tolist() == [1.0] * E
    growing = Queue(K, {"image": E, "text": E}, torch.device("cpu"))
    with pytest.raises(UserError, match="has 0 of 12 rows"):
        export_albef(replace(checkpoint, queue=growing.tensors()))


def test_trained_model_exports_to_official_names_and_loads_again():
    model = SPEC.build()
    exported = export_albef(AlbefCheckpoint(model.state_dict(), model.state_dict()))
    without_queues = {key for key in official("pretrain") if "queue" not in key}
    assert set(exported) == without_queues
    same(load_albef(exported).student, dict(model.state_dict()))


@pytest.mark.parametrize("wrapper", ["_orig_mod.module.", "model.", "module.backbone."])
def test_file_behind_wrappers_is_recognised(wrapper, tmp_path):
    state = official("retrieval")
    torch.save({wrapper + key: value for key, value in state.items()}, tmp_path / "ALBEF.pth")
    model = load_model(str(tmp_path / "ALBEF.pth"), options=LoadOptions(head_width=16)).eval_model.model
    assert torch.equal(model.itm.weight.cpu(), state["itm_head.weight"])


def test_file_builds_a_model_at_another_resolution(tmp_path):
    state = official("pretrain")
    path = tmp_path / "ALBEF.pth"
    torch.save(
        {"model": {f"module.{key}": value for key, value in state.items()}, "config": {"lr": 1e-4}, "epoch": 29}, path
    )
    model = replace(SPEC, image=TimmImage("test_vit", image_size=64), mlm=False, weights=str(path)).build()
    report = model.reports["model"]
    assert report.resized == ("image.model.pos_embed",) and report.new == ()
    assert {name.split(".")[0] for name in report.unexpected} == {"mlm"}
    assert model.image.model.pos_embed.shape == (1, 17, D)
    assert torch.equal(model.image.model.pos_embed[:, 0], state["visual_encoder.pos_embed"][:, 0])
    assert torch.equal(
        model.fusion.layers[0].expand.bias, state["text_encoder.bert.encoder.layer.2.intermediate.dense.bias"]
    )
    assert model.temperature.tolist() == pytest.approx([0.06])


class Surprise:
    def __reduce__(self):
        return print, ("executed",)


def spoilt(case):
    state = official("pretrain")
    if case == "bert":
        return {key: value for key, value in state.items() if key.startswith("text_encoder") and "cross" not in key}
    if case == "fuses from the first layer on":  # BLIP's
        return visual() | bert("text_encoder", 4, 0, masked_lm=False)
    if case == "another head":
        return state | {"prompt.weight": torch.zeros(1)}
    if case == "another part of a layer":
        return state | {"text_encoder.bert.encoder.layer.3.adapter.weight": torch.zeros(1)}
    return state | {"text_encoder.cls.predictions.decoder.weight": torch.zeros(WORDS, D)}


@pytest.mark.parametrize(
    "case, message",
    [
        ("bert", "not an ALBEF checkpoint"),
        ("fuses from the first layer on", "not an ALBEF checkpoint"),
        ("another head", "has prompt.weight"),
        ("another part of a layer", "adapter.weight"),
        ("untied", "another matrix than their embeddings"),
    ],
)
def test_another_layout_is_refused_in_one_line(case, message, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({key: value.clone() for key, value in spoilt(case).items()}, path)
    with pytest.raises(UserError, match=message) as error:
        load_albef(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("task", LAVIS)
def test_file_as_lavis_saves_it_has_token_types_of_zero_and_no_momentum_encoder(task):
    state = of_lavis(task)
    assert any("_m." in key for key in state) and not any("token_type" in key for key in state)
    checkpoint, reference = load_albef(state), load_albef(official(task))
    assert checkpoint.lavis and not reference.lavis and checkpoint.momentum == {}
    assert checkpoint.student.keys() == reference.student.keys()
    for key, value in checkpoint.student.items():
        zero = "token_type_embeddings" in key
        assert torch.equal(value, torch.zeros(2, D) if zero else reference.student[key]), key
    assert (checkpoint.queue is None) == (reference.queue is None)
    build_albef(checkpoint, head_width=16)


@pytest.mark.parametrize("task", LAVIS)
def test_texts_end_with_sep_for_files_of_lavis_unless_asked_otherwise(task, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    options = LoadOptions(tokenizer=str(tmp_path / "vocab.txt"), head_width=16, max_length=POSITIONS)
    for name, state, ends in (("lavis", of_lavis(task), True), ("own", official(task), False)):
        torch.save({"model": state, "config": {"run": {"task": "x"}}, "epoch": 4}, tmp_path / f"{name}.pth")
        for add_sep in (None, True, False):
            opened = load_model(str(tmp_path / f"{name}.pth"), options=replace(options, add_sep=add_sep))
            ids = opened.eval_model.tokenizer(["a red square"], 10)[0][0].tolist()
            assert ids == [2, 5, 6, 7] + ([3] if (ends if add_sep is None else add_sep) else [])


def test_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"model": official("retrieval"), "config": Surprise()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="convert it once"):
        load_albef(tmp_path / "x.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "spec, message",
    [
        (replace(SPEC, fusion=Fusion(layers=3)), "lack fusion.layers.2"),
        (replace(SPEC, fusion=Fusion(layers=1)), "have fusion.layers.1"),
        (replace(SPEC, embed_size=8), "choose a model of the same size"),
    ],
)
def test_model_of_other_sizes_is_refused_in_one_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        spec.build().load(load_albef(official("pretrain")).student)
    assert "\n" not in str(error.value)
