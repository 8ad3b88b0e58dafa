"""Every experiment in configs/ loads, survives JSON, builds, and takes a step."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from tests.conftest import ROOT
from vlp.config import Experiment, dump, from_plain, load_config
from vlp.forward import Surroundings
from vlp.optim import parameter_groups, set_lr
from vlp.train import Pretrainer
from vlp.types import Batch
from vlp.validation import validate

CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def packages_of(experiment: Experiment) -> set[str]:
    """Those that hold the weights and the tokenizer that it starts from."""

    def texts(value) -> list[str]:
        if isinstance(value, dict):
            return [t for v in value.values() for t in texts(v)]
        if isinstance(value, list):
            return [t for v in value for t in texts(v)]
        return [value] if isinstance(value, str) else []

    return {t[4:].split("/")[0] for t in texts(json.loads(dump(experiment))) if t.startswith("pip:")}


@pytest.fixture(params=CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def experiment(request) -> Experiment:
    experiment = load_config(str(request.param))
    for package in packages_of(experiment):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extra demo)")
    return experiment


def test_there_are_configs():
    assert len(CONFIGS) >= 3


def test_their_docstrings_are_lab_notebooks():
    for path in CONFIGS:
        text = path.read_text()
        assert text.startswith('"""') and "Command" in text.split('"""')[1] and "Paper:" in text.split('"""')[1], path
        assert str(path.relative_to(ROOT)) in text or "make demo" in text, path


def test_it_is_valid_and_survives_json_as_it_is_and_resolved(experiment):
    validate(experiment)
    for each in (experiment, experiment.resolved()):
        assert from_plain(json.loads(dump(each))) == each


SIBLINGS = {"tf_efficientnet_b7": "tf_efficientnet_b0", "vit_base_patch16_siglip_224": "test_vit"}


def small(experiment: Experiment) -> Experiment:
    """The same with a small sibling of the image tower, small pictures, and a text tower of a few neurons."""
    model = experiment.model
    text = replace(model.text, config={**model.text.config, **TINY})
    image = replace(model.image, name=SIBLINGS.get(model.image.name, model.image.name), image_size=64)
    return replace(experiment, model=replace(model, text=text, image=image))


def test_it_builds_without_its_weights_and_takes_a_step(experiment):
    experiment = experiment.resolved()
    if experiment.model.towers is not None:
        pytest.skip("open_clip's towers have no small sibling; tests/encoders/test_open_clip.py builds some")
    torch.manual_seed(0)
    model = small(experiment).model.build(load_weights=False)
    assert experiment.data.max_length <= model.text.max_length
    for prefix in experiment.train.frozen:
        assert any(name.startswith(prefix) for name, _ in model.named_parameters()), prefix
    groups = parameter_groups(
        model, experiment.optim.weight_decay, experiment.train.layer_decay, experiment.train.lr_scales
    )
    optimizer = experiment.optim.build(groups)
    set_lr(optimizer, experiment.schedule, experiment.optim.lr, 0, 100)
    height, width = model.preprocess.size
    ids = torch.randint(5, 90, (4, min(8, experiment.data.max_length)))
    images = torch.randint(0, 256, (4, 3, height, width), dtype=torch.uint8)
    batch = Batch(model.preprocess.normalise(images), ids, torch.ones_like(ids).bool(), torch.arange(4))
    pretrainer = Pretrainer(model.train(), experiment.objectives)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.numel() < 1e5}
    losses, total, _ = pretrainer(batch, None, Surroundings())
    assert losses.keys() == experiment.objectives.keys() and total.isfinite()
    total.backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert sum(not torch.equal(before[n], model.get_parameter(n)) for n in before) > len(before) / 2
