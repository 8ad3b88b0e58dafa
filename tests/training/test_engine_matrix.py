"""Objective x engine: each objective trains on each engine as on one process, or is refused before anything is built."""

from __future__ import annotations

import importlib
import os
import pkgutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.fixtures.faults import AlternatingTowers
from tests.processes import launched_with
from tests.test_matrix import COLUMNS, ROWS, ROWS_OF_TABLE, WORDS, documented_table, experiment
from vlp import objectives
from vlp.config import Data, Experiment, Training
from vlp.data.augment import Resize
from vlp.data.stream import Loaded
from vlp.data.text_views import Same
from vlp.distributed import local_shard, rank, world_size
from vlp.forward import StepContext
from vlp.objectives.answer import AnswerGeneration, Captioning
from vlp.objectives.assignment import TextAssignment
from vlp.objectives.base import Objective
from vlp.objectives.cutoff import Cutoff
from vlp.objectives.pairwise import NPair, PairContrast, Tuplet
from vlp.optim.ema import EMA, MomentumConfig
from vlp.optim.groups import parameter_groups
from vlp.optim.optimizers import AdamW, Lamb, Lars, Sgd
from vlp.testing import LENGTH, ProcessPool, part_of, small_batches, small_model
from vlp.train import Pretrainer, Trainer
from vlp.training.checkpoint import Sharded
from vlp.training.launch import start_engine
from vlp.training.run import Run
from vlp.training.setup import configure_model, initial_state
from vlp.training.validation import validate
from vlp.types import Batch, Vocabulary

STEPS = 20
# All cells take nine minutes at twenty steps: ENGINE_STEPS=20 python -m pytest tests/training/test_engine_matrix.py
CELL_STEPS = int(os.environ.get("ENGINE_STEPS", 4))
ADAMW = AdamW()
# Objectives outside of the table, with the small models of `vlp.testing`.
MORE = {
    "answers": AnswerGeneration(),
    "captions": Captioning(),
    "text assignment": TextAssignment(),
    "Cutoff": Cutoff(),
    "contrast of pairs": PairContrast(),
    "tuplets": Tuplet(num_negatives=3),
    "N pairs": NPair(),
}
UNEVEN = {"alternating towers": AlternatingTowers()}
# The cell of the default tests: queues, a momentum encoder, an average, and two towers.
QUICK = ("ITC, momentum queues (ALBEF)", "two towers (ALIGN, CLIP)")
# Rows whose losses differ between one process and two, because they draw masks, negatives or noise, which depend on the
# process, or have a BatchNorm (BYOL's heads), which is per process. On two processes every engine computes the same.
DIFFERS = ("ITM", "MLM", "MIM", "instance", "ITC + ITM", "ITC by two heads", "BYOL", "text assignment")


def cells() -> list[tuple[str, str]]:
    """Return each row of the table with the first column that is not refused there, and ALBEF and VLMo where they fuse."""
    found = []
    for row, columns in documented_table().items():
        accepted = [column for column in COLUMNS if columns[column] == "yes"]
        fused = [
            column for column in accepted if ROWS_OF_TABLE[row].fuses and ("ALBEF" in column or "experts" in column)
        ]
        found += [(row, column) for column in fused or accepted[:1]]
    return found + [(name, "small model") for name in MORE]


def spec_of(row: str, column: str, optim=ADAMW, **train) -> Experiment:
    if row in MORE | UNEVEN:
        objective = (MORE | UNEVEN)[row]
        data = Data(train=(), views=(Resize(),), text_views=(Same(),), batch_size=ROWS, max_length=LENGTH)
        spec = Experiment("cell", small_model(objective), {"loss": objective}, data, momentum=MomentumConfig(0.9))
    else:
        spec = experiment(ROWS_OF_TABLE[row], COLUMNS[column])
        validate(spec)
    return replace(
        spec, optim=optim, train=Training(**{"steps": STEPS, "clip_norm": 1.0, "ema_decay": 0.9} | train)
    ).resolved()


def batch(spec: Experiment, model, step: int) -> Batch:
    """Return random rows, of which two show the same image. Lengths of texts differ in each half."""
    if "loss" in spec.objectives:
        given = small_batches(step + 1)[step].map(lambda x: x.float() if x.dtype == torch.float64 else x)
        images = [
            (x.image * 40 + 128).clamp(0, 255).byte() if model.preprocess else None for x in (given, *given.views)
        ]
        first, second = (replace(x, image=image) for x, image in zip((given, *given.views), images))
        return replace(first, views=(second,), keys=("",) * ROWS)
    generator = torch.Generator().manual_seed(step)

    def view() -> Batch:
        image = ids = mask = None
        if model.preprocess is not None:
            size = (ROWS, 3, *model.preprocess.size)
            image = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        if model.text is not None:
            ids = torch.randint(5, WORDS, (ROWS, 7), generator=generator)
            mask = torch.arange(7) < torch.tensor([7, 4, 3, 6, 7, 5, 2, 6])[:, None]
        return Batch(torch.tensor([0, 1, 2, 3, 4, 5, 6, 1]), image, ids, mask)

    labels = None if spec.model.classes is None else torch.arange(ROWS) % 3
    others = tuple(view() for _ in (*spec.data.views, *spec.data.text_views))
    return replace(view(), dataset_row=torch.arange(ROWS), labels=labels, views=others, keys=("",) * ROWS)


class Silent:
    """A run writer and an interrupt that do nothing."""

    asked = agreed = False

    def __getattr__(self, name):
        return lambda *_: None


def train_cell(
    process: int, processes: int, engine_name: str, row: str, column: str, changes: dict | None = None
) -> dict:
    """Take the steps of the training loop in this process; return losses, averages, and bytes held in it."""
    with launched_with(engine_name, process, processes):
        return _train_cell(spec_of(row, column, **changes or {}))


def freeze_unused(model, spec: Experiment) -> None:
    """Freeze the heads of a small model that its objective does not read, which DDP would wait for."""
    given = batch(spec, model, 0)
    images = [model.preprocess.normalise(x.image) if model.preprocess else None for x in (given, *given.views)]
    first, second = (replace(x, image=image) for x, image in zip((given, *given.views), images))
    momentum = EMA(model, 0.9).network
    Pretrainer(model, spec.objectives)([replace(first, views=(second,))], momentum, StepContext())[1].backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def _train_cell(spec: Experiment) -> dict:
    engine = start_engine(spec.train, spec.micro_batch_size)
    engine.check(spec)
    torch.manual_seed(0)
    model = spec.build_model(load_weights=False)
    if "loss" in spec.objectives:
        freeze_unused(model, spec)
    configure_model(model, spec.train)
    engine.place(model)
    state = initial_state(spec, model, 20, engine.accelerator.device)
    optimizer = spec.optim.build(parameter_groups(model, spec.optim.weight_decay))
    special = torch.arange(WORDS) < 5
    words = SimpleNamespace(vocabulary=lambda: Vocabulary(WORDS, 4, special, torch.zeros_like(special)))
    steps = spec.train.steps
    run = Run(spec, engine, model, words, range(20), optimizer, state, Silent(), steps, None)
    trainer = Trainer(run)
    size = ROWS // world_size()
    own = slice(rank() * size, (rank() + 1) * size)
    loader = (Loaded(part_of(batch(spec, model, step), own)) for step in range(steps * spec.train.accumulation))
    records = [trainer.step(loader, Silent()) for _ in range(steps)]
    averages = {
        name: average for name, average in (("average", state.average), ("momentum", state.momentum)) if average
    }
    optimizer = trainer.optimizer.optimizer
    held = {"weights": list(model.parameters())}
    held |= {name: list(average.network.parameters()) for name, average in averages.items()}
    steps_taken = optimizer.optimizer if engine.name == "deepspeed" else optimizer  # inside DeepSpeed's
    held["moments"] = [x for values in steps_taken.state.values() for x in values.values() if x.ndim]
    return {
        "losses": [record["loss"] for record in records],
        "averages": {
            f"{name}/{key}": (x.full_tensor() if isinstance(x, Sharded) else x).clone()
            for name, average in averages.items()
            for key, x in average.tensors().items()
        },
        "bytes": {name: sum(local_shard(x).nbytes for x in tensors) for name, tensors in held.items()},
        "sharded": sum(isinstance(x, Sharded) for x in model.state_dict().values()),
    }


@pytest.fixture(scope="module")
def pool():
    pool = ProcessPool(("tests.preload", __name__))
    yield pool
    pool.close()


def assert_engine_trains_as_ddp(pool, engine: str, ddp: dict, *cell) -> dict:
    found, other = pool(train_cell, 2, engine, *cell)
    # a BatchNorm over four rows amplifies rounding from step to step
    assert found["losses"] == other["losses"] == close_to(ddp["losses"], 1e-4 if cell[0] == "BYOL" else 1e-5), engine
    assert found["averages"].keys() == ddp["averages"].keys()
    for name, average in ddp["averages"].items():
        # Adam steps by up to the learning rate where a gradient is zero but for rounding, as that of a bias before a norm
        atol = 1e-6 if cell[0] == QUICK[0] else 2e-5
        torch.testing.assert_close(found["averages"][name], average, atol=atol, rtol=0, msg=f"{engine}: {name}")
    return found


def close_to(losses: list[float], atol: float = 1e-5):
    return pytest.approx(losses, abs=atol, rel=5e-6)  # a loss of 30 has a float32 resolution of 2e-6


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_sharded_weights_train_as_ddp_with_half_of_the_memory_in_each_process(pool, engine):
    ddp = pool(train_cell, 2, "ddp", *QUICK)[0]
    assert ddp["losses"] == pytest.approx(train_cell(0, 1, "ddp", *QUICK)["losses"], abs=1e-5)
    assert ddp["losses"][0] != ddp["losses"][-1] and ddp["sharded"] == 0
    found = assert_engine_trains_as_ddp(pool, engine, ddp, *QUICK)
    assert found["sharded"] > 50
    assert found["bytes"].keys() == {"weights", "moments", "average", "momentum"}
    for name, held in found["bytes"].items():  # a little above a half, because vectors of odd length are not halved
        assert 0.49 < held / ddp["bytes"][name] < 0.51, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"optim": Sgd(lr=0.1)},
        {"optim": Lars(lr=0.3)},
        {"optim": Lamb(lr=1e-3)},
        {"accumulation": 2},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "cheap"},
        {"frozen": ("image",)},
    ],
    ids=str,
)
def test_settings_do_not_change_what_fsdp2_computes(pool, changes):
    """LARS and LAMB need the norms of whole weights, which sharded weights know."""
    row = "ITC, softmax (ALIGN, CLIP)", QUICK[1], changes
    assert_engine_trains_as_ddp(pool, "fsdp2", pool(train_cell, 2, "ddp", *row)[0], *row)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cheap", "full"])
def test_activation_checkpointing_does_not_change_what_zero3_computes(pool, mode):
    row = "ITC, softmax (ALIGN, CLIP)", QUICK[1], {"activation_checkpointing": mode}
    assert_engine_trains_as_ddp(pool, "zero3", pool(train_cell, 2, "ddp", *row)[0], *row)


def test_every_objective_of_vlp_has_a_row():
    for module in pkgutil.iter_modules(objectives.__path__, "vlp.objectives."):
        importlib.import_module(module.name)

    def subclasses(cls: type) -> list[type]:
        return [c for c in cls.__subclasses__() if c.__module__.startswith("vlp.")]  # tests define others

    classes, bases = set(), [Objective]
    while bases:
        found = subclasses(bases.pop())
        classes |= {c for c in found if not subclasses(c)}
        bases += found
    tried = [o for row in ROWS_OF_TABLE.values() for o in row.objectives.values()] + list(MORE.values())
    assert classes == {type(objective) for objective in tried}


@pytest.mark.slow
@pytest.mark.parametrize("row, column", cells())
def test_every_objective_trains_on_every_engine(pool, row, column):
    cell = row, column, {"steps": CELL_STEPS}
    ddp = pool(train_cell, 2, "ddp", *cell)[0]
    if not row.startswith(DIFFERS):
        assert ddp["losses"] == close_to(train_cell(0, 1, "ddp", *cell)["losses"])
    for engine in ("fsdp2", "zero2", "zero3"):
        assert_engine_trains_as_ddp(pool, engine, ddp, *cell)


@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_parameters_without_a_gradient_in_a_step_do_not_reuse_an_old_one(pool, engine):
    """With plain SGD a gradient of zero is as good as none."""
    cell = "alternating towers", "small model", {"optim": Sgd(lr=0.1, momentum=0.0, weight_decay=0.0), "steps": 6}
    one = train_cell(0, 1, "ddp", *cell)
    assert_engine_trains_as_ddp(pool, engine, one, *cell)
