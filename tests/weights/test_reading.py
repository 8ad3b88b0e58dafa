import argparse
import gzip
import json
import pickle
import zipfile

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.files import resolve
from vlp.weights.reading import Grid, from_efficientnet_pytorch, load, read_weights


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_resolve_finds_files_in_installed_packages(tmp_path):
    import timm as package

    assert resolve("pip:timm/models").samefile(f"{package.__path__[0]}/models")
    assert resolve(str(tmp_path)) == tmp_path
    for path, message in {
        "pip:no_such_package/x.pth": "pip install no-such-package",
        "pip:timm/no/such/file": "timm holds no no/such/file",
        "pip:os.path/x": "not installed",
        f"{tmp_path}/none.pth": "no such file",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            resolve(path)
        one_line(error)


def test_weights_are_read_from_both_kinds_of_file_and_unwrapped(tmp_path):
    state = {"a.weight": torch.randn(3, 2), "b": torch.arange(4)}
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        read = read_weights(tmp_path / name)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)


class Canary:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed(tmp_path, zipped):
    canary = tmp_path / "canary"
    torch.save({"a": Canary(canary)}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": Canary(canary)}))
    for name in ("w.pth", "plain.pth"):
        with pytest.raises(UserError) as error:
            read_weights(tmp_path / name)
        assert name == "plain.pth" or "convert it once" in one_line(error)
    assert not canary.exists()


@pytest.mark.parametrize("fraction", [0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "old.pth"])
def test_truncated_files_are_named(tmp_path, name, fraction):
    state = {"a": torch.randn(50, 50)}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(UserError, match=f"{name} is damaged") as error:
        read_weights(tmp_path / name)
    one_line(error)


def test_file_without_a_state_dict_is_refused(tmp_path):
    for content in (torch.randn(3), {"a": 1}, {}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(UserError, match="not a dictionary of tensors"):
            read_weights(tmp_path / "w.pth")


def modules():
    module = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2), "headroom": nn.Linear(1, 1)})
    return module, {key: torch.randn_like(value) for key, value in module.state_dict().items()}


def test_every_key_is_reported():
    module, state = modules()
    kept = module["head"].weight.clone()
    del state["head.weight"], state["head.bias"]
    state["pooler.weight"] = torch.zeros(1)
    report = load(module, state, new=["head"], ignored=["pooler"])
    assert report.loaded == ("body.weight", "body.bias", "headroom.weight", "headroom.bias")
    assert (report.new, report.unexpected) == (("head.weight", "head.bias"), ("pooler.weight",))
    assert torch.equal(module["body"].weight, state["body.weight"]) and torch.equal(module["head"].weight, kept)
    assert str(report) == "4 loaded, 0 resized, 2 new (head.weight, head.bias), 1 unexpected (pooler.weight)"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("headroom.bias"), "lack headroom.bias"),  # not a prefix of whole dotted parts
        (lambda state: state.update({"neck.weight": torch.zeros(1)}), "have neck.weight"),
        (lambda state: state.update({"body.weight": torch.zeros(3, 4)}), r"body.weight is \(3, 4\).*\(3, 3\)"),
        (lambda state: state.update({"body.weight": torch.zeros(9)}), r"body.weight is \(9,\)"),
    ],
)
def test_undeclared_names_and_wrong_shapes_are_errors_without_side_effects(change, message):
    module, state = modules()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    change(state)
    with pytest.raises(UserError, match=message) as error:
        load(module, state, new=["head"], ignored=["head"])
    one_line(error)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


class Positions(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.pos = nn.Parameter(torch.zeros(*shape))


@pytest.mark.parametrize("batched", [True, False])
def test_position_embeddings_resize_between_rectangles_and_keep_their_prefix(batched):
    source = torch.randn(2 + 6 * 3, 8)
    module = Positions(1, 2 + 4 * 5, 8) if batched else Positions(2 + 4 * 5, 8)
    state = {"pos": source[None] if batched else source}
    report = load(module, state, grids={"pos": Grid((4, 5), prefix=2, source=(6, 3))})
    assert report.resized == ("pos",) == report.loaded
    resized = module.pos.reshape(-1, 8)
    assert torch.equal(resized[:2], source[:2])
    expected = resample_abs_pos_embed(source[None], [4, 5], [6, 3], num_prefix_tokens=2)[0]
    torch.testing.assert_close(resized.detach(), expected)


def test_resized_positions_keep_a_gradient_along_one_axis():
    """Positions that depend only on the row still do on another grid, and grow in the same direction."""
    rows = torch.arange(6.0)[:, None].expand(6, 6).reshape(1, 36, 1)
    module = Positions(1, 3 * 8, 1)
    load(module, {"pos": rows}, grids={"pos": Grid((3, 8), prefix=0)})
    grid = module.pos.detach().reshape(3, 8)
    torch.testing.assert_close(grid, grid[:, :1].expand(3, 8))
    assert (grid[1:, 0] > grid[:-1, 0]).all() and grid[1, 0] == pytest.approx(2.5)


def test_positions_that_do_not_fit_the_grid_are_an_error():
    with pytest.raises(UserError, match="pos is"):
        load(Positions(1, 9, 4), {"pos": torch.zeros(1, 7, 4)}, grids={"pos": Grid((3, 3), prefix=0)})
    with pytest.raises(UserError, match="pos is"):
        load(Positions(1, 9, 4), {"pos": torch.zeros(1, 16, 5)}, grids={"pos": Grid((3, 3), prefix=0)})


def test_efficientnet_pytorch_layout_covers_timms_names_with_squeeze_and_excitation():
    """Both libraries list the tensors of B0 in the order of execution, so the order is the reference for names."""
    model = timm.create_model("tf_efficientnet_b0")
    own, foreign = model.state_dict(), {}
    counts = [len(stage) for stage in model.blocks]
    flat = [(s, b) for s, count in enumerate(counts) for b in range(count)]
    for number, (stage, block) in enumerate(flat):
        prefix = f"blocks.{stage}.{block}."
        layers = list(dict.fromkeys(key[len(prefix) :].rpartition(".")[0] for key in own if key.startswith(prefix)))
        theirs = ["_depthwise_conv", "_bn1", "_se_reduce", "_se_expand", "_project_conv", "_bn2"]
        if len(layers) == 8:
            theirs = ["_expand_conv", "_bn0", *theirs]
        for key in own:
            if key.startswith(prefix):
                layer, _, leaf = key[len(prefix) :].rpartition(".")
                foreign[f"_blocks.{number}.{theirs[layers.index(layer)]}.{leaf}"] = own[key]
    outer = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    for key, value in own.items():
        layer, _, leaf = key.rpartition(".")
        if layer in outer:
            foreign[f"{outer[layer]}.{leaf}"] = value
    converted = from_efficientnet_pytorch(foreign, counts)
    assert converted.keys() == own.keys()
    assert all(converted[key] is own[key] for key in own)


# --- files as people have them -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    return timm.create_model("resnet10t", num_classes=10).state_dict()


def tower_of(path):
    return TimmImage("resnet10t", weights=str(path), image_size=64).build()


@pytest.mark.parametrize(
    "prefix, others",
    [
        ("_orig_mod.", False),
        ("module._orig_mod.", False),
        ("model.", False),
        ("module.backbone.", False),
        ("module.backbone.", True),
        ("module.encoder_q.", True),
    ],
)
def test_wrappers_around_a_tower_are_removed(tmp_path, resnet, prefix, others):
    """Names of the same script outside the wrapper are reported, and no other tensor is taken for one of the tower."""
    state = {prefix + key: value for key, value in resnet.items()}
    if others:
        state |= {f"module.encoder_k.{key}": torch.zeros_like(value) for key, value in resnet.items()}
        state["module.queue"] = torch.zeros(3)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.pth")
    tower = tower_of(tmp_path / "w.pth")
    own = tower.model.state_dict()
    assert len(own) > 80 and all(torch.equal(value, resnet[key]) for key, value in own.items())
    assert any("encoder_k" in key for key in tower.report.unexpected) == others
    assert tower.report.new == ()


def test_wrapper_with_only_some_of_the_names_is_refused(tmp_path, resnet):
    state = {f"encoder_q.{key}": value for key, value in resnet.items() if key != "layer4.0.bn1.weight"}
    torch.save(state | {"queue": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="the weights lack"):
        tower_of(tmp_path / "w.pth")


def test_wrappers_inside_a_model_are_removed(tmp_path, resnet):
    state = {key.replace("layer1.", "layer1._orig_mod.", 1): value for key, value in resnet.items()}
    torch.save(state, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").keys() == resnet.keys()


def test_batch_norm_without_counters_is_loaded(tmp_path, resnet):
    """Files older than torch 0.4.1 have none, and torch itself loads them."""
    torch.save({key: value for key, value in resnet.items() if "num_batches" not in key}, tmp_path / "w.pth")
    report = tower_of(tmp_path / "w.pth").report
    assert report.new and all(name.endswith("num_batches_tracked") for name in report.new)
    state = {key: value for key, value in resnet.items() if "running_mean" not in key}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="the weights lack conv1.1.running_mean"):
        tower_of(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n", "git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (b"\n <HTML><body>404</body></HTML>", "is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
        (b"", "it is empty"),
        (gzip.compress(b"weights"), "is a gzip archive"),
    ],
)
def test_files_that_are_not_weights_are_called_what_they_are(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_weights(tmp_path / name)
    assert name in one_line(error) and "weights_only=False" not in str(error.value)


def test_zip_of_something_else_and_json_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("model/weights.safetensors", b"x")
    (tmp_path / "index.bin").write_text(json.dumps({"weight_map": {}}))
    for name, message in {"w.pth": "a zip archive of model/weights.safetensors", "index.bin": "is JSON text"}.items():
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path / name)


@pytest.mark.parametrize(
    "extra",
    [argparse.Namespace(lr=0.1), np.int64(3), np.float32(0.5), np.bool_(True), np.arange(3.0), np.zeros((2, 2))],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_settings_and_numbers_next_to_the_tensors_are_read_safely(tmp_path, extra, zipped):
    content = {"state_dict": {"a": torch.ones(2)}, "args": extra}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_weights(tmp_path / "w.pth")["a"], torch.ones(2))


def test_numbers_of_numpy_1_are_read(tmp_path):
    """Files of numpy 1 call numpy._core numpy.core."""
    content = {"state_dict": {"a": torch.ones(2)}, "epoch": np.int64(3), "losses": np.arange(3.0)}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    saved = (tmp_path / "w.pth").read_bytes()
    assert b"numpy._core" in saved or b"numpy.core" in saved
    for core in (b"numpy.core", b"numpy._core"):
        (tmp_path / "w.pth").write_bytes(saved.replace(b"numpy._core", core).replace(b"numpy.core", core))
        assert torch.equal(read_weights(tmp_path / "w.pth")["a"], torch.ones(2))


def test_settings_do_not_open_the_door_to_code(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(x=Canary(canary))}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="convert it once"):
        read_weights(tmp_path / "w.pth")
    assert not canary.exists()


def test_recipe_of_the_message_works(tmp_path, monkeypatch):
    torch.save({"state_dict": {"a": torch.ones(2)}, "args": pytest.Config}, tmp_path / "w.pth")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="convert it once") as error:
        read_weights("w.pth")
    recipe = str(error.value).partition("once: ")[2].partition(", with the key")[0]
    eval(recipe, {"torch": torch, "FILE": "w.pth"})
    assert torch.equal(read_weights("x.pth")["a"], torch.ones(2))


# --- folders of transformers -------------------------------------------------------------------------------------


@pytest.fixture
def bert(tmp_path):
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=64, max_position_embeddings=32)
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    config.save_pretrained(tmp_path)
    return model, tmp_path


def test_head_of_simcse_is_left_out_and_reported(bert):
    """Its checkpoints have the pooler of the training script under mlp, and lm_head with masked language modelling."""
    model, folder = bert
    state = {f"bert.{key}": value for key, value in model.state_dict().items()}
    heads = {
        f"{head}.{leaf}": torch.zeros(32)
        for head in ("mlp.dense", "lm_head.transform.dense")
        for leaf in ("weight", "bias")
    }
    torch.save(state | heads, folder / "pytorch_model.bin")
    tower = BertText(weights=str(folder)).build()
    assert tower.report.new == () and heads.keys() <= set(tower.report.unexpected)
    assert torch.equal(tower.model.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("safe", [True, False])
def test_weights_in_several_files_are_read_through_their_index(bert, safe):
    model, folder = bert
    state, name = model.state_dict(), "model.safetensors" if safe else "pytorch_model.bin"
    stem, _, suffix = name.rpartition(".")
    files = [f"{stem}-0000{n + 1}-of-00002.{suffix}" for n in range(2)]
    for n, file in enumerate(files):
        part = {key: value.clone() for key, value in list(state.items())[n::2]}
        save_file(part, folder / file) if safe else torch.save(part, folder / file)
    listed = {key: files[n % 2] for n, key in enumerate(state)}
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    own = BertText(weights=str(folder)).build().model.state_dict()
    assert all(torch.equal(own[key], state[key]) for key in own)
    (folder / files[1]).unlink()
    with pytest.raises(UserError, match=f"lacks {files[1]}, which {name}.index.json lists"):
        BertText(weights=str(folder)).build()
    (folder / f"{name}.index.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        BertText(weights=str(folder)).build()
    (folder / f"{name}.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(UserError, match="is damaged: it lists no files"):
        BertText(weights=str(folder)).build()


def test_file_of_several_that_has_only_encoder_layers_keeps_their_names(bert):
    model, folder = bert
    listed = {}
    for file, inside in (("a.bin", True), ("b.bin", False)):
        part = {key: value for key, value in model.state_dict().items() if key.startswith("encoder.") == inside}
        torch.save(part, folder / file)
        listed |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))
    own = BertText(weights=str(folder)).build().model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in model.state_dict().items() if key in own)


@pytest.mark.parametrize("name", ["bert-base-uncased", "princeton-nlp/unsup-simcse-bert-base-uncased"])
def test_name_on_a_hub_says_what_to_download(name):
    with pytest.raises(UserError, match=f"no such file or folder: {name}.*hf download {name} --local-dir") as error:
        BertText(weights=name).build()
    one_line(error)
