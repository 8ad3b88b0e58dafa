"""Encoder x fusion x objective: every cell takes a step that trains all of the model, or is refused in one line.

``python -m tests.test_matrix`` prints the table that docs/methods.md has between ``<!-- matrix -->`` and ``<!-- /matrix -->``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.fixtures.toy import SIZES
from tests.syncs import host_reads
from vlp.config import Data, Experiment, Training
from vlp.data.augment import RandomResizedCrop
from vlp.data.reading.shards import Source
from vlp.data.text_views import Same
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.mome import TINY
from vlp.encoders.patch_targets import Pixels
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.forward import StepContext
from vlp.models.albef import Albef
from vlp.models.base import Model
from vlp.models.dual import Dual
from vlp.models.single import Single
from vlp.models.vlmo import Vlmo
from vlp.objectives.barlow_twins import BarlowTwins
from vlp.objectives.byol import Byol
from vlp.objectives.classification import Classification
from vlp.objectives.dcl import Dcl
from vlp.objectives.geometry import Alignment, Uniformity
from vlp.objectives.instance import InstanceDiscrimination
from vlp.objectives.itc import ImageTextContrast, MomentumContrast, SigmoidContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.masking import TextMasking
from vlp.objectives.mim import MaskedImage
from vlp.objectives.mlm import MaskedText
from vlp.objectives.moco import Moco
from vlp.objectives.pairwise import Triplet
from vlp.objectives.sentence import Cert, ESimCse, SimCse
from vlp.objectives.simclr import SimClr
from vlp.objectives.vicreg import VicReg
from vlp.optim.ema import EMA, MomentumConfig
from vlp.train import Attempt, Pretrainer
from vlp.training.validation import validate
from vlp.types import Batch, Vocabulary

ROWS, LENGTH, WORDS, SIDE = 8, 7, 200, 64
IMAGE = TimmImage("test_vit", image_size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
TEXT = BertText(config=SIZES, dropout=0.0)
MOME = replace(TINY, width=32, heads=2, layers=2, vl_from=1, image_size=SIDE, vocab_size=WORDS, max_text_length=16)
MASKING = TextMasking(probability=0.5)
ITC, ITM = ImageTextContrast(), ImageTextMatching(keys="student")


@dataclass(frozen=True)
class Row:
    """An objective with what its training needs.

    Args:
        objectives: The objective, and those that it needs in addition.
        reads: "image", "text", or "both".
        model: Fields of the model that it needs, where the model has them.
        fuses: Whether it reads image and text together, where the model can.
    """

    objectives: dict[str, Any]
    reads: str = "both"
    model: dict[str, Any] = field(default_factory=dict)
    fuses: bool = False
    momentum: bool = False
    views: bool = False


ROWS_OF_TABLE = {
    "ITC, softmax (ALIGN, CLIP)": Row({"itc": ITC}, model={"itc": True}),
    "ITC, sigmoid (SigLIP)": Row({"itc": SigmoidContrast()}, model={"itc": True, "bias": -10.0}),
    "ITC, momentum queues (ALBEF)": Row({"itc": MomentumContrast(queue_size=16, distill=0.0)}, model={"itc": True}, momentum=True),
    "ITC, momentum queues, distilled": Row({"itc": MomentumContrast(queue_size=16, ramp_epochs=0)}, model={"itc": True}, momentum=True),
    "ITC by two heads, + ITM (VLMo)": Row(
        {"itc": ITC, "itc_vl": ImageTextContrast(head="vl"), "itm": ITM},
        model={"itc": True, "itc_vl": True, "itm": True},
        fuses=True,
    ),
    "ITM, uniform negatives": Row({"itm": ImageTextMatching(negatives="uniform")}, model={"itm": True}, fuses=True),
    "ITM, hard negatives, + ITC": Row({"itc": ITC, "itm": ITM}, model={"itc": True, "itm": True}, fuses=True),
    "ITM, hard by the momentum encoder, + ITC": Row({"itc": ITC, "itm": ImageTextMatching()}, model={"itc": True, "itm": True}, fuses=True, momentum=True),
    "MLM with the image": Row({"mlm": MaskedText(masking=MASKING)}, model={"mlm": True}, fuses=True),
    "MLM with the image, distilled": Row({"mlm": MaskedText(masking=MASKING, distill=0.4)}, model={"mlm": True}, fuses=True, momentum=True),
    "MLM, text only": Row({"mlm": MaskedText(masking=MASKING)}, reads="text", model={"mlm": True}),
    "MIM, normalised pixels (MAE)": Row({"mim": MaskedImage(min_patches=2)}, reads="image", model={"mim": Pixels()}),
    "ITC + ITM + MLM (ALBEF, VLMo)": Row({"itc": ITC, "itm": ITM, "mlm": MaskedText(masking=MASKING)}, model={"itc": True, "itm": True, "mlm": True}, fuses=True),
    "classes, of pairs where the model has both": Row({"classes": Classification()}, model={"classes": 3}, fuses=True),
    "SimCLR": Row({"simclr": SimClr()}, reads="image", views=True),
    "DCL": Row({"dcl": Dcl()}, reads="image", views=True),
    "VICReg": Row({"vicreg": VicReg()}, reads="image", views=True),
    "Barlow Twins": Row({"barlow_twins": BarlowTwins()}, reads="image", views=True),
    "BYOL": Row({"byol": Byol()}, reads="image", views=True, momentum=True),
    "MoCo": Row({"moco": Moco(queue_size=16)}, reads="image", views=True, momentum=True),
    "instance discrimination": Row({"instance": InstanceDiscrimination(noise=4)}, reads="image"),
    "SimCSE": Row({"simcse": SimCse()}, reads="text", views=True),
    "ESimCSE": Row({"esimcse": ESimCse(queue_size=16)}, reads="text", views=True, momentum=True),
    "CERT": Row({"cert": Cert(queue_size=16)}, reads="text", views=True, momentum=True),
    "alignment and uniformity, + ITC": Row({"itc": ITC, "alignment": Alignment(sides="image_text"), "uniformity": Uniformity(sides="image_text")}, model={"itc": True}),
    "triplets, + ITC": Row({"itc": ITC, "triplet": Triplet(sides="image_text")}, model={"itc": True}),
}  # fmt: skip


def dual(row: Row) -> Dual:
    return Dual(IMAGE, TEXT, projection="both", embed_size=24, bias=row.model.get("bias"))


def albef(row: Row) -> Albef:
    bare = Albef(IMAGE, TEXT, Fusion(layers=1, heads=2, hidden_size=64), itc=False, itm=False, mlm=False, embed_size=24)
    return with_heads(bare, row)


def vlmo(row: Row) -> Vlmo:
    experts = ("image", "text", "vl") if row.fuses else ("image", "text")
    return with_heads(bare_vlmo(experts), row)


def bare_vlmo(experts: tuple[str, ...]) -> Vlmo:
    return Vlmo(replace(MOME, experts=experts), itc=False, itc_vl=False, itm=False, mlm=False, embed_size=24)


def one_tower(row: Row) -> Single:
    tower = {"text": TEXT} if row.reads == "text" else {"image": IMAGE}
    return with_heads(Single(**tower, head="linear", embed_size=24), row)


def one_mome(row: Row) -> Vlmo:
    return with_heads(bare_vlmo(("text",) if row.reads == "text" else ("image",)), row)


def with_heads(spec, row: Row):
    known = {field.name for field in dataclasses.fields(spec)}
    fields = {name: value for name, value in row.model.items() if name in known}
    if isinstance(spec, Single) and not row.views and {"mlm", "mim", "classes"} & row.model.keys():
        fields |= {"head": "none", "embed_size": None}
    return replace(spec, **fields)


COLUMNS = {
    "two towers (ALIGN, CLIP)": dual,
    "two towers, cross-attention (ALBEF)": albef,
    "shared attention, experts (VLMo)": vlmo,
    "one tower": one_tower,
    "one modality of VLMo": one_mome,
}
BOTH = (dual, albef, vlmo)


def experiment(row: Row, column) -> Experiment:
    """Return the experiment of a cell. An objective of one modality is trained with ITC if the model has both."""
    objectives = dict(row.objectives)
    if column in BOTH and row.reads != "both":
        row = replace(row, model=row.model | {"itc": True})
        objectives = {"itc": ITC} | objectives
    crop, same = RandomResizedCrop(), Same()
    views = (
        {"views": (crop,) * (row.reads == "image"), "text_views": (same,) * (row.reads == "text")} if row.views else {}
    )
    return Experiment(
        name="cell",
        model=column(row),
        objectives=objectives,
        data=Data(train=(Source("shards", label="label"),), batch_size=ROWS, max_length=LENGTH, **views),
        momentum=MomentumConfig(decay=0.9) if row.momentum else None,
        train=Training(steps=1),
    )


def batch(spec: Experiment, model) -> Batch:
    """Return random rows, of which two show the same image."""

    def view() -> Batch:
        image = ids = mask = None
        if model.preprocess is not None:
            image = torch.randn(ROWS, 3, *model.preprocess.size)
        if model.text is not None:
            ids = torch.randint(5, WORDS, (ROWS, LENGTH))
            mask = torch.arange(LENGTH) < torch.tensor([7, 4, 3, 6, 7, 5, 2, 7])[:, None]
        return Batch(index, image, ids, mask)

    index = torch.tensor([0, 1, 2, 3, 4, 5, 6, 1])
    labels = None if spec.model.classes is None else torch.arange(ROWS) % 3
    others = tuple(view() for _ in (*spec.data.views, *spec.data.text_views))
    return replace(view(), dataset_row=torch.arange(ROWS), labels=labels, views=others)


def start(
    spec: Experiment, device: str = "cpu", prepare: Callable[[torch.nn.Module], object] = lambda model: None
) -> tuple[Model, Model | None, StepContext]:
    """Return the model, the momentum encoder if there is one, and the context of the first step.

    Raises:
        UserError: If the combination is refused.
    """
    torch.manual_seed(0)
    validate(spec)
    spec = spec.resolved()
    model = spec.build_model(load_weights=False).train().to(device)
    prepare(model)
    momentum = EMA(model, spec.momentum.decay, spec.momentum.mode).network if spec.momentum else None
    generator = torch.Generator().manual_seed(0)
    queues = {o: o.init_queue(model, 20, torch.device(device), generator) for o in spec.objectives.values()}
    queues = {objective: queue for objective, queue in queues.items() if queue is not None}
    special = torch.arange(WORDS) < 5
    vocabulary = Vocabulary(WORDS, 4, special, torch.zeros_like(special)).to(torch.device(device))
    context = StepContext(queues, vocabulary)
    return model, momentum, context


def take_step(
    spec: Experiment,
    device: str = "cpu",
    bf16: bool = False,
    prepare: Callable[[torch.nn.Module], object] = lambda model: None,
    watch: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return losses and gradients by name, on the CPU; weights and batch are the same on every device.

    Args:
        prepare: Is called with the model, to checkpoint its activations or to compile it.
        watch: Returns a context manager for the forward and the backward pass.

    Raises:
        UserError: If the combination is refused.
        AssertionError: If the step does not train every parameter.
    """
    model, momentum, context = start(spec, device, prepare)
    attempt = Attempt(Pretrainer(model, spec.objectives))

    def forward(given: Batch) -> tuple:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return attempt([given], momentum, context)

    if context.queues:  # an empty queue has nothing to tell apart
        with torch.no_grad():
            _, _, (f,), _ = forward(batch(spec, model).to(torch.device(device)))
            for objective, queue in context.queues.items():
                queue.push(**objective.enqueue(f))
    given = batch(spec, model).to(torch.device(device))
    with watch():
        losses, total, _, _ = forward(given)
        total.backward()
    assert losses.keys() == spec.objectives.keys() and total.isfinite()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None] == []
    return {n: loss.detach().cpu() for n, loss in losses.items()}, {n: p.grad.cpu() for n, p in trained.items()}


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Assert that no host-device sync happens, by the operations that would cause one on a GPU."""
    with host_reads() as reads:
        yield
    assert reads == {}


def cell(row: str, column: str, watch: Callable[[], AbstractContextManager] = nullcontext) -> str:
    """Return the cell of the table: "yes", or a dash if the combination is refused."""
    try:
        take_step(experiment(ROWS_OF_TABLE[row], COLUMNS[column]), watch=watch)
    except UserError as e:
        assert "\n" not in str(e) and len(str(e)) < 250, e
        return "–"
    return "yes"


def table() -> str:
    lines = [["", *COLUMNS], ["---"] + [":---:"] * len(COLUMNS)]
    lines += [[row, *(cell(row, column) for column in COLUMNS)] for row in ROWS_OF_TABLE]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@pytest.mark.parametrize("row", ROWS_OF_TABLE)
@pytest.mark.parametrize("column", COLUMNS)
def test_every_cell_takes_a_step_without_waiting_or_is_refused_in_one_line(row, column):
    assert documented_table()[row][column] == cell(row, column, nothing_waits)


def documented_table() -> dict[str, dict[str, str]]:
    """Return row -> column -> cell of the table in docs/methods.md."""
    text = (ROOT / "docs" / "methods.md").read_text()
    lines = text.split("<!-- matrix -->")[1].split("<!-- /matrix -->")[0].strip().splitlines()
    head, _, *rows = ([each.strip() for each in line.strip("|").split("|")] for line in lines)
    assert head[1:] == list(COLUMNS) and [row[0] for row in rows] == list(ROWS_OF_TABLE)
    return {row[0]: dict(zip(COLUMNS, row[1:])) for row in rows}


if __name__ == "__main__":
    print(table())
