import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

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
