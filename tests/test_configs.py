"""Every experiment in configs/ loads, survives JSON, builds, and takes a step."""

import ast
import importlib.util
import json
import re
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, draw_pairs
from vlp.commands.configs import read_entries
from vlp.config import Experiment, load_config
from vlp.data.preparing.inspect import stats
from vlp.data.preparing.pack import Packing, pack
from vlp.data.reading.annotated import Annotated
from vlp.data.reading.sentences import Sentences
from vlp.data.reading.shards import Source
from vlp.data.stream import TrainDataset
from vlp.data.text import train_tokenizer
from vlp.encoders.dall_e import DallE
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.forward import StepContext
from vlp.models.albef import Albef
from vlp.models.vlmo import Vlmo
from vlp.objectives.moco import Moco
from vlp.objectives.requirements import has_images
from vlp.optim.ema import EMA
from vlp.optim.groups import parameter_groups, starts_with
from vlp.optim.schedule import set_lr
from vlp.planning.trace import trace_step
from vlp.specs.json import dump, from_plain
from vlp.sweeps.ablation import Ablation
from vlp.sweeps.stages import Stages
from vlp.train import Pretrainer
from vlp.training.validation import validate
from vlp.types import Answers, Batch, Vocabulary

CONFIGS = ROOT / "configs"
FILES = sorted(CONFIGS.rglob("*.py"))
NAMES = {  # file:function -> file and function
    f"{path.relative_to(CONFIGS).as_posix()}:{name}": (path, name)
    for path in FILES
    for name in (entry.config.rpartition(".py")[2].lstrip(":") or "config" for entry in read_entries(path))
}
SECTIONS = ("Paper", "Data", "As published", "Differs", "Measured", "Cost", "Command")


def experiments_of(name: str, spec: Experiment | Stages | Ablation) -> dict[str, Experiment]:
    """Return every experiment in what a function of a config returns, by a name for the test."""
    if isinstance(spec, Experiment):
        return {name: spec}
    if isinstance(spec, Stages):
        return {f"{name} {run.name}": run for run in spec.runs()}
    variants = (experiments_of(f"{name} {variant}", each) for variant, each in spec.variants.items())
    return dict(chain.from_iterable(variant.items() for variant in variants))


EXPERIMENTS = {}
for label, (path, name) in NAMES.items():
    EXPERIMENTS |= experiments_of(label, load_config(f"{path}:{name}", Experiment, Stages, Ablation))
TINY = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


def packages_of(experiment: Experiment) -> set[str]:
    """Return the pip packages of the weights and the tokenizer that the experiment starts from."""

    def texts(value) -> list[str]:
        if isinstance(value, dict):
            return [t for v in value.values() for t in texts(v)]
        if isinstance(value, list):
            return [t for v in value for t in texts(v)]
        return [value] if isinstance(value, str) else []

    return {t[4:].split("/")[0] for t in texts(json.loads(dump(experiment))) if t.startswith("pip:")}


def with_local_files(experiment: Experiment) -> Experiment:
    """Replace what is not on this machine: weights of the text tower by BERT's architecture, a file of classes by names."""
    train = tuple(
        replace(s, classes=tuple(map(str, range(experiment.model.classes))))
        if isinstance(s, Annotated) and isinstance(s.classes, str) and not Path(s.classes).exists()
        else s
        for s in experiment.data.train
    )
    experiment = replace(experiment, data=replace(experiment.data, train=train))
    text = experiment.model.text
    if not isinstance(text, BertText) or not text.weights or text.weights.startswith("pip:"):
        return experiment
    text = replace(text, weights=None, config={"model_type": "bert", **(text.config or {})})
    return replace(experiment, model=replace(experiment.model, text=text))


@pytest.fixture(params=EXPERIMENTS.values(), ids=EXPERIMENTS)
def experiment(request, monkeypatch) -> Experiment:
    monkeypatch.chdir(ROOT)
    for package in packages_of(request.param):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extra demo)")
    return request.param


def test_every_file_has_a_default_experiment():
    assert len(FILES) >= 20
    assert [path for path, name in NAMES.values() if name == "config"] == FILES


@pytest.mark.parametrize("label", NAMES)
def test_docstrings_are_lab_notebooks(label):
    path, name = NAMES[label]
    tree = ast.parse(path.read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    found = set()
    for document in (ast.get_docstring(tree), ast.get_docstring(function)):
        title, _, rest = document.partition("\n\n")
        assert title.endswith((".", "?")), title
        sections = re.findall(r"^([A-Z][A-Za-z ]*):", rest, re.MULTILINE)
        assert [name for name in SECTIONS if name in sections] == sections, "unknown, repeated or misplaced section"
        found |= set(sections)
    assert {"Paper", "Data", "Cost", "Command"} <= found


def test_experiment_is_valid_and_survives_json(experiment):
    validate(experiment)
    for each in (experiment, with_local_files(experiment).resolved()):
        assert from_plain(json.loads(dump(each))) == each


SIBLINGS = {
    "tf_efficientnet_b7": "tf_efficientnet_b0",
    "vit_base_patch16_siglip_224": "test_vit",
    "resnet50": "test_resnet",
    "beit_base_patch16_224": "vit_tiny_patch16_224",
}


def small(experiment: Experiment) -> Experiment:
    """Replace the towers by small ones, and shrink the images."""
    model = experiment.model
    if isinstance(model, Vlmo):
        encoder = replace(model.encoder, width=32, heads=2, hidden_size=None, layers=4, vl_from=2, image_size=64)
        encoder = replace(encoder, patch_size=8, vocab_size=128)
        return replace(experiment, model=replace(model, encoder=encoder, embed_size=None))
    if model.text is not None:
        model = replace(model, text=replace(model.text, config={**model.text.config, **TINY}))
    if isinstance(model, Albef):
        model = replace(model, fusion=replace(model.fusion, heads=2, hidden_size=64))
    if model.decoder is not None:
        model = replace(model, decoder=replace(model.decoder, heads=2, hidden_size=64))
    if isinstance(model.image, TimmImage):  # the others are small
        size, name = 64, SIBLINGS.get(model.image.name, model.image.name)
        if model.mim is not None:
            size = 128  # blocks of masked patches need room
            model = replace(model, mim=replace(model.mim, size=8) if isinstance(model.mim, DallE) else model.mim)
        model = replace(model, image=replace(model.image, name=name, image_size=size))
    return replace(experiment, model=model)


def batch_of(experiment: Experiment, model, rows: int) -> Batch:
    """Return random images and texts, with as many views as the experiment has."""
    data = experiment.data
    images = texts = 0
    if model.preprocess and has_images(data):
        images = max(len(s.image) if isinstance(s, Annotated) else 1 for s in data.train) + len(data.views)
    if model.text is not None:
        columns = min(len(s.columns) or 1 if isinstance(s, Sentences) and not s.join else 1 for s in data.train)
        texts = columns + len(data.text_views)

    def view(number: int) -> Batch:
        image = ids = mask = None
        if number < images:
            pixels = torch.randint(0, 256, (rows, 3, *model.preprocess.size), dtype=torch.uint8)
            image = model.preprocess.normalise(pixels)
        if number < texts:
            ids = torch.randint(5, 90, (rows, min(8, data.max_length)))
            mask = torch.ones_like(ids).bool()
        return Batch(torch.arange(rows), image, ids, mask)

    first, *others = map(view, range(max(images, texts)))
    classes = experiment.model.classes
    labels = None if classes is None else torch.arange(rows) % classes
    answers = None
    if any(isinstance(source, Annotated) and source.answers for source in data.train):
        ids = torch.randint(5, 90, (rows, 4))
        answers = Answers(ids, torch.ones_like(ids).bool(), torch.ones(rows), torch.arange(rows))
    return replace(first, dataset_row=torch.arange(rows), labels=labels, answers=answers, views=tuple(others))


def vocabulary_of(model) -> Vocabulary | None:
    if model.text is None:
        return None
    special = torch.arange(model.text.vocab_size) < 5
    return Vocabulary(len(special), 4, special, torch.zeros_like(special))


def test_experiment_builds_without_weights_and_takes_a_step(experiment):
    experiment = with_local_files(experiment).resolved()
    if experiment.model.towers is not None:
        pytest.skip("open_clip's towers have no small sibling; tests/encoders/test_open_clip.py builds some")
    torch.manual_seed(0)
    model = small(experiment).build_model(load_weights=False)
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
    queues = {
        objective: objective.init_queue(model, 20, torch.device("cpu"), torch.Generator().manual_seed(0))
        for objective in experiment.objectives.values()
    }
    queues = {objective: queue for objective, queue in queues.items() if queue is not None}
    context = StepContext(queues, vocabulary_of(model))

    def losses_of_a_batch() -> tuple:
        groups = [objective.groups for objective in experiment.objectives.values() if isinstance(objective, Moco)]
        rows = max([8, *(2 * number for number in groups)])
        with torch.autocast("cpu", torch.bfloat16, enabled=experiment.train.precision == "bf16"):
            return pretrainer([batch_of(experiment, model, rows)], momentum, context)

    if queues:  # an empty queue would give a loss without gradient
        with torch.no_grad():
            _, _, (f,) = losses_of_a_batch()
            for objective, queue in queues.items():
                queue.push(**objective.enqueue(f))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and p.numel() < 1e5}
    losses, total, _ = losses_of_a_batch()
    assert losses.keys() == experiment.objectives.keys() and total.isfinite()
    total.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    optimizer.step()
    assert sum(not torch.equal(before[n], model.get_parameter(n)) for n in before) > len(before) / 2


def kind_of(experiment: Experiment) -> tuple:
    """Return what the passes of an experiment depend on, without sizes."""
    train = experiment.train
    settings = train.precision, train.backward, train.grad_cache, train.activation_checkpointing
    objectives = sorted(type(objective).__name__ for objective in experiment.objectives.values())
    return type(experiment.model), type(experiment.optim), experiment.model.towers is None, *objectives, *settings


KINDS = {kind_of(experiment): (label, experiment) for label, experiment in reversed(EXPERIMENTS.items())}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("label, experiment", KINDS.values(), ids=[label for label, _ in KINDS.values()])
def test_a_step_of_each_kind_of_experiment_is_traced(label, experiment, processes, monkeypatch):
    monkeypatch.chdir(ROOT)
    if any(importlib.util.find_spec(package) is None for package in packages_of(experiment)):
        pytest.skip("its weights are not installed (extra demo)")
    experiment = with_local_files(experiment).resolved()
    if experiment.model.towers is None:
        experiment = small(experiment)
    data = replace(experiment.data, batch_size=8 * experiment.train.accumulation)
    traced = trace_step(replace(experiment, data=data), processes, tokens=8, samples=20)
    assert min(traced.weights, traced.activations, traced.peak, traced.moments) > 0
    assert min(traced.operations.values()) > 0
    assert traced.operations.keys() & {"backward", "losses and other"}  # where the passes are differentiated


def sources_of(config: str) -> tuple[Source, ...]:
    return load_config(str(CONFIGS / config)).data.train


@pytest.mark.parametrize(
    "config",
    ["albef/pretrain.py", "albef/pretrain.py:recommended_14m", "albef/nlvr2.py:assignment", "vlmo/pretrain.py:large"],
)
def test_presets_weight_their_sources_by_captions(config):
    weights = {source.shards: source.weight for source in sources_of(config)}
    assert all(weights.values())
    images = {"shards/coco": 113_000, "shards/visual-genome": 108_000}
    # COCO has five captions an image, Visual Genome 7 in ALBEF's data and 50 in VLMo's
    assert all(weights[name] > 4.9 * count for name, count in images.items())
    few = weights["shards/coco"] + weights["shards/visual-genome"]
    if config == "albef/pretrain.py":
        assert few / sum(weights.values()) == pytest.approx(0.26, abs=0.005)


def draw_captions(shards: list[Path], weights: list[float | None], draws: int, tmp_path: Path) -> Counter:
    sources = [Source(str(folder), weight) for folder, weight in zip(shards, weights)]
    tokenizer = train_tokenizer([f"caption {n}" for n in range(100)], vocab_size=200)
    data = TrainDataset(sources, (), None, tokenizer, 16, 1_000_000, seed=0)
    batch = data.__getitems__(range(draws)).batch
    return Counter(tuple(row[mask].tolist()) for row, mask in zip(batch.input_ids, batch.attention_mask))


def test_weights_by_captions_draw_every_caption_equally_often(tmp_path):
    """3 images have 5 captions each, as in COCO, and 25 images have one, as in CC3M."""
    pairs, shards = draw_pairs(tmp_path / "images", 28), [tmp_path / "coco", tmp_path / "cc3m"]
    captions = iter(f"caption {n}" for n in range(40))
    coco = [replace(pair, captions=tuple(next(captions) for _ in range(5))) for pair in pairs[:3]]
    cc3m = [replace(pair, captions=(next(captions),)) for pair in pairs[3:]]
    for folder, part in zip(shards, (coco, cc3m)):
        pack(part, folder, Packing())
    weights = [stats(str(folder), grid=None)["captions"] for folder in shards]
    assert weights == [15, 25]
    drawn = draw_captions(shards, weights, 8192, tmp_path)
    mean, deviation = 8192 / 40, (8192 / 40 * 39 / 40) ** 0.5
    assert len(drawn) == 40
    assert all(abs(count - mean) < 4.5 * deviation for count in drawn.values())
    by_image = draw_captions(shards, [None, None], 8192, tmp_path)
    assert min(by_image.values()) < 0.5 * mean < 1.3 * mean < max(by_image.values())
