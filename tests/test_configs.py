"""Every experiment in configs/ loads, survives JSON, builds, and takes a step."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from vlp.config import Experiment, load_config
from vlp.forward import StepContext
from vlp.objectives.needs import has_pictures
from vlp.optim.ema import EMA
from vlp.optim.groups import parameter_groups, starts_with
from vlp.optim.schedule import set_lr
from vlp.specs.json import dump, from_plain
from vlp.sweeps.ablation import load_ablation
from vlp.sweeps.stages import Stages
from vlp.train import Pretrainer
from vlp.training.validation import validate
from vlp.types import Answers, Batch, Vocabulary

FILES = sorted((ROOT / "configs").rglob("*.py"))
ABLATIONS = [path for path in FILES if "vlp.sweeps.ablation" in path.read_text()]
STAGES = [path for path in FILES if "vlp.sweeps.stages" in path.read_text() and path not in ABLATIONS]
CONFIGS = [path for path in FILES if path not in ABLATIONS + STAGES]


def parts(path: Path, name: str, what: Experiment | Stages) -> dict[str, Experiment]:
    """Every experiment in a variant of an ablation, or in a file of stages."""
    name = f"{path.relative_to(ROOT / 'configs')}: {name}"
    if isinstance(what, Experiment):
        return {name: what}
    return {f"{name} {run.name}": run for run in what.runs()}


EXPERIMENTS = {str(path.relative_to(ROOT / "configs")): path for path in CONFIGS}
for path in ABLATIONS:
    for variant, what in load_ablation(str(path), []).variants.items():
        EXPERIMENTS |= parts(path, variant, what)
for path in STAGES:
    EXPERIMENTS |= parts(path, "stage", load_config(str(path), Stages))
TINY = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


def packages_of(experiment: Experiment) -> set[str]:
    """Those that hold the weights and the tokenizer that it starts from."""

    def texts(value) -> list[str]:
        if isinstance(value, dict):
            return [t for v in value.values() for t in texts(v)]
        if isinstance(value, list):
            return [t for v in value for t in texts(v)]
        return [value] if isinstance(value, str) else []

    return {t[4:].split("/")[0] for t in texts(json.loads(dump(experiment))) if t.startswith("pip:")}


def at_hand(experiment: Experiment) -> Experiment:
    """The same, with BERT's architecture where the text tower starts from a folder that is not here, such as a run's, and
    names for classes whose file is not."""
    train = tuple(
        replace(s, classes=tuple(map(str, range(experiment.model.classes))))
        if isinstance(getattr(s, "classes", ()), str) and s.classes and not Path(s.classes).exists()
        else s
        for s in experiment.data.train
    )
    experiment = replace(experiment, data=replace(experiment.data, train=train))
    text = getattr(experiment.model, "text", None)
    if getattr(text, "weights", None) is None or text.weights.startswith("pip:") or Path(text.weights).exists():
        return experiment
    text = replace(text, weights=None, config={"model_type": "bert", **(text.config or {})})
    return replace(experiment, model=replace(experiment.model, text=text))


@pytest.fixture(params=EXPERIMENTS.values(), ids=EXPERIMENTS)
def experiment(request, monkeypatch) -> Experiment:
    monkeypatch.chdir(ROOT)
    experiment = load_config(str(request.param)) if isinstance(request.param, Path) else request.param
    for package in packages_of(experiment):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extra demo)")
    return experiment


def test_there_are_configs():
    assert len(CONFIGS) >= 3


def test_their_docstrings_are_lab_notebooks():
    for path in FILES:
        text = path.read_text()
        assert text.startswith('"""') and "Command" in text.split('"""')[1] and "Paper:" in text.split('"""')[1], path
        assert str(path.relative_to(ROOT)) in text or "make demo" in text, path


def test_it_is_valid_and_survives_json_as_it_is_and_resolved(experiment):
    validate(experiment)
    for each in (experiment, at_hand(experiment).resolved()):
        assert from_plain(json.loads(dump(each))) == each


SIBLINGS = {
    "tf_efficientnet_b7": "tf_efficientnet_b0",
    "vit_base_patch16_siglip_224": "test_vit",
    "resnet50": "test_resnet",
    "beit_base_patch16_224": "vit_tiny_patch16_224",
}


def small(experiment: Experiment) -> Experiment:
    """The same with a small sibling of the image tower, small pictures, and a text tower of a few neurons."""
    model = experiment.model
    if encoder := getattr(model, "encoder", None):
        encoder = replace(encoder, width=32, heads=2, hidden_size=None, layers=4, vl_from=2, image_size=64)
        encoder = replace(encoder, patch_size=8, vocab_size=128)
        return replace(experiment, model=replace(model, encoder=encoder, embed_size=None))
    if model.text is not None:
        model = replace(model, text=replace(model.text, config={**model.text.config, **TINY}))
    if hasattr(model, "fusion"):
        model = replace(model, fusion=replace(model.fusion, heads=2, hidden_size=64))
    if getattr(model, "decoder", None):
        model = replace(model, decoder=replace(model.decoder, heads=2, hidden_size=64))
    if model.image is not None:
        size, name = 64, SIBLINGS.get(model.image.name, model.image.name)
        if mim := getattr(model, "mim", None):
            size = 128  # blocks of masked patches need room
            model = replace(model, mim=replace(mim, size=8) if hasattr(mim, "size") else mim)
        model = replace(model, image=replace(model.image, name=name, image_size=size))
    return replace(experiment, model=model)


def batch_of(experiment: Experiment, model, rows: int) -> Batch:
    """Random pictures and texts, with as many further views as the experiment has."""
    data = experiment.data
    pictures = texts = 0
    if model.preprocess and has_pictures(data):
        pictures = max(len(getattr(s, "image", [None])) for s in data.train) + len(data.views)
    if model.text is not None:
        columns = min(max(1, len(getattr(s, "columns", ()))) if not getattr(s, "join", None) else 1 for s in data.train)
        texts = columns + len(data.text_views)

    def view(number: int) -> Batch:
        image = ids = mask = None
        if number < pictures:
            pixels = torch.randint(0, 256, (rows, 3, *model.preprocess.size), dtype=torch.uint8)
            image = model.preprocess.normalise(pixels)
        if number < texts:
            ids = torch.randint(5, 90, (rows, min(8, data.max_length)))
            mask = torch.ones_like(ids).bool()
        return Batch(torch.arange(rows), image, ids, mask)

    first, *others = map(view, range(max(pictures, texts)))
    classes = getattr(experiment.model, "classes", None)
    labels = None if classes is None else torch.arange(rows) % classes
    answers = None
    if any(getattr(source, "answers", None) for source in data.train):
        ids = torch.randint(5, 90, (rows, 4))
        answers = Answers(ids, torch.ones_like(ids).bool(), torch.ones(rows), torch.arange(rows))
    return replace(first, dataset_row=torch.arange(rows), labels=labels, answers=answers, views=tuple(others))


def vocabulary_of(model) -> Vocabulary | None:
    if model.text is None:
        return None
    special = torch.arange(model.text.vocab_size) < 5
    return Vocabulary(len(special), 4, special, torch.zeros_like(special))


def test_it_builds_without_its_weights_and_takes_a_step(experiment):
    experiment = at_hand(experiment).resolved()
    if getattr(experiment.model, "towers", None) is not None:
        pytest.skip("open_clip's towers have no small sibling; tests/encoders/test_open_clip.py builds some")
    torch.manual_seed(0)
    model = small(experiment).model.build(load_weights=False)
    assert model.text is None or experiment.data.max_length <= model.text.max_length
    for prefix in experiment.train.frozen:
        frozen = [p for name, p in model.named_parameters() if starts_with(name, prefix)]
        assert frozen, prefix
        for parameter in frozen:
            parameter.requires_grad_(False)
    groups = parameter_groups(
        model, experiment.optim.weight_decay, experiment.train.layer_decay, experiment.train.lr_scales
    )
    optimizer = experiment.optim.build(groups)
    set_lr(optimizer, experiment.schedule, experiment.optim.lr, 0, 100)
    momentum = experiment.momentum and EMA(model, experiment.momentum.decay, experiment.momentum.mode).network
    if experiment.train.activation_checkpointing != "none":
        model.set_activation_checkpointing(experiment.train.activation_checkpointing)
    pretrainer = Pretrainer(model.train(), experiment.objectives)
    memories = {
        objective: objective.init_queue(model, 20, torch.device("cpu"), torch.Generator().manual_seed(0))
        for objective in experiment.objectives.values()
        if hasattr(objective, "init_queue")
    }
    context = StepContext(memories, vocabulary_of(model))

    def losses_of_a_batch() -> tuple:
        rows = max([8, *(2 * getattr(objective, "groups", 1) for objective in experiment.objectives.values())])
        with torch.autocast("cpu", torch.bfloat16, enabled=experiment.train.precision == "bf16"):
            return pretrainer(batch_of(experiment, model, rows), momentum, context)

    if memories:  # a queue may start empty, and then there is nothing to learn
        with torch.no_grad():
            _, _, f = losses_of_a_batch()
            for objective, memory in memories.items():
                memory.push(**objective.enqueue(f))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and p.numel() < 1e5}
    losses, total, _ = losses_of_a_batch()
    assert losses.keys() == experiment.objectives.keys() and total.isfinite()
    total.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    optimizer.step()
    assert sum(not torch.equal(before[n], model.get_parameter(n)) for n in before) > len(before) / 2
