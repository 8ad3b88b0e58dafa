"""Is a step right on this device? Losses and gradients against the CPU's, and against the published code's.

float32 is float32 here: TF32 is off. Random draws are the CPU's on every device, dropout is 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks import albef_step, vlmo_step
from benchmarks.gpu.draws import DrawsOnCpu, recorded, replayed
from benchmarks.gpu.timing import DEVICE
from benchmarks.models import TINY_VLMO, VLMO, albef, tiny_albef
from tests import test_matrix as matrix
from tests import test_parity_albef, test_parity_vlmo
from tests.objectives import fusing
from vlp.errors import UserError
from vlp.models.albef import Albef
from vlp.models.vlmo import Vlmo
from vlp.objectives.hard_negatives import sample_hard_negatives
from vlp.objectives.itc import MomentumContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.masking import TextMasking, block_masks
from vlp.objectives.mlm import MaskedText
from vlp.types import Vocabulary

Step = tuple[dict[str, Tensor], dict[str, Tensor]]  # losses and gradients by name, on the CPU
PAIRS = (4, 51)  # and their tokens
FLOAT32 = {"loss_error": 1e-5, "gradient_error": 1e-4}
BF16 = {"bf16_loss_error": 0.02, "bf16_whole_gradient_error": 0.1}
# They divide by the spread of a feature over the few rows of this step, which enlarges the rounding of bf16.
BATCH_STATISTICS = ("VICReg", "Barlow Twins", "BYOL")
FLOAT64 = {"loss_error": 1e-9, "gradient_error": 1e-9}
FUSED = {
    "itc": MomentumContrast(queue_size=7),
    "itm": ImageTextMatching(candidates="global"),
    "mlm": MaskedText(distill=0.4, ramp_epochs=1.0),
}


def checks(small: bool) -> dict[str, Callable[[], dict]]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = {
        "ALBEF's published numbers": partial(published, test_parity_albef, 1e-4),
        # the published float32 is as far from float64, and ours as far again: see the test
        "VLMo's published numbers": partial(published, test_parity_vlmo, 2e-4),
    }
    for row in matrix.ROWS_OF_TABLE:
        for column in matrix.COLUMNS:
            found[f"matrix: {row} | {column}"] = partial(cell, row, column)
    found["ALBEF base, 4 pairs"] = partial(base_albef, tiny_albef() if small else albef(256))
    found["VLMo base, 4 pairs"] = partial(base_vlmo, TINY_VLMO if small else VLMO)
    for how in ("cheap", "full"):
        for column in ("two towers, cross-attention (ALBEF)", "shared attention, experts (VLMo)"):
            found[f"activation checkpointing, {how} | {column}"] = partial(checkpointed, how, column)
    found["gradient caching, two micro-batches"] = partial(one_batch, fusing.CACHED, 2)
    found["backward loss by loss"] = partial(one_batch, fusing.PER_LOSS, 1)
    found["random draws"] = draws
    found["torch.compile"] = partial(compiled, "aot_eager" if small else "inductor")
    return found


def errors(found: Step, expected: Step) -> dict[str, float]:
    """How far two steps are apart.

    Returns:
        ``loss_error``, relative to the loss or to 1; ``gradient_error``, the worst tensor's, relative to its norm or to a
        thousandth of the whole gradient's (a key's bias has a gradient of 0 in truth); ``whole_gradient_error``.
    """
    (losses, gradients), (true_losses, true_gradients) = found, expected
    assert losses.keys() == true_losses.keys() and gradients.keys() == true_gradients.keys()
    norms = {name: norm(gradient) for name, gradient in true_gradients.items()}
    apart = {name: norm(gradients[name] - gradient) for name, gradient in true_gradients.items()}
    whole = sum(each**2 for each in norms.values()) ** 0.5
    return {
        "loss_error": max(float(abs(losses[n] - loss) / max(1, abs(loss))) for n, loss in true_losses.items()),
        "gradient_error": max(apart[name] / max(norms[name], 1e-3 * whole) for name in norms),
        "whole_gradient_error": sum(each**2 for each in apart.values()) ** 0.5 / whole,
    }


def norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def judged(found: dict[str, float], bounds: dict[str, float]) -> dict:
    """The errors that have a bound, rounded, and whether all are within theirs."""
    kept = {name: float(f"{found[name]:.2e}") for name in bounds}
    return kept | {"ok": all(found[name] <= bound for name, bound in bounds.items())}


def with_bf16(exact: dict[str, float], bf16: dict[str, float], bounds: dict[str, float] = BF16) -> dict:
    return judged(exact | {f"bf16_{name}": error for name, error in bf16.items()}, FLOAT32 | bounds)


# --- the matrix of objectives and models ---------------------------------------------------------------------------


def cell(row: str, column: str) -> dict:
    """float32 here against float32 on the CPU, and bf16 here against float32 here."""
    spec = matrix.experiment(matrix.ROWS_OF_TABLE[row], matrix.COLUMNS[column])
    kept: list = []
    try:
        with DrawsOnCpu():
            expected = matrix.take_step(spec)
            with recorded(kept):
                found = matrix.take_step(spec, DEVICE)
            with replayed(kept):
                rounded = matrix.take_step(spec, DEVICE, bf16=True)
    except UserError:
        return {"refused": True}
    bounds = BF16 | ({"bf16_whole_gradient_error": 0.3} if row in BATCH_STATISTICS else {})
    return with_bf16(errors(found, expected), errors(rounded, found), bounds)


def checkpointed(how: str, column: str) -> dict:
    """The same step with and without activation checkpointing, in float32 and bf16."""
    spec = matrix.experiment(matrix.ROWS_OF_TABLE["ITC + ITM + MLM (ALBEF, VLMo)"], matrix.COLUMNS[column])
    found = {}
    with DrawsOnCpu():
        for prefix, bf16 in (("", False), ("bf16_", True)):
            plain = matrix.take_step(spec, DEVICE, bf16)
            again = matrix.take_step(spec, DEVICE, bf16, prepare=lambda model: model.set_activation_checkpointing(how))
            found |= {f"{prefix}{name}": error for name, error in errors(again, plain).items()}
    return judged(found, FLOAT32 | {"bf16_loss_error": 1e-3, "bf16_whole_gradient_error": 1e-2})


def compiled(backend: str) -> dict:
    """Compiled towers against the same ones as they are, in float32."""
    spec = matrix.experiment(
        matrix.ROWS_OF_TABLE["ITC, softmax (ALIGN, CLIP)"], matrix.COLUMNS["two towers (ALIGN, CLIP)"]
    )

    def compile_towers(model) -> None:
        for tower in (model.image, model.text):
            tower.compile(backend=backend)

    found = matrix.take_step(spec, DEVICE, prepare=compile_towers)
    return judged(errors(found, matrix.take_step(spec, DEVICE)), FLOAT32)


# --- one step at published size ------------------------------------------------------------------------------------


def base_albef(spec: Albef) -> dict:
    """The step that benchmarks/albef_step.py measures."""
    return base(albef_step, albef_step.built(spec, PAIRS), queue=1024)


def base_vlmo(spec: Vlmo) -> dict:
    """The step that benchmarks/vlmo_step.py measures."""
    return base(vlmo_step, vlmo_step.built(spec))


def base(program, model: nn.Module, **sizes) -> dict:
    def taken(device: str, bf16: bool = False) -> Step:
        given = program.prepared("product", copy.deepcopy(model), size=PAIRS, device=device, **sizes)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = program.losses_of("product", given)
        loss.backward()
        gradients = {name: p.grad.cpu() for name, p in given[0].named_parameters() if p.grad is not None}
        return {"total": loss.detach().cpu()}, gradients

    kept: list = []
    with DrawsOnCpu():
        expected = taken("cpu")
        with recorded(kept):
            found = taken(DEVICE)
        with replayed(kept):
            rounded = taken(DEVICE, bf16=True)
    return with_bf16(errors(found, expected), errors(rounded, found))


# --- numbers that the published code printed -----------------------------------------------------------------------


def published(parity, gradient_bound: float) -> dict:
    """One step from the weights and draws of tests/test_parity_albef.py or test_parity_vlmo.py, in float32."""
    with pytest.MonkeyPatch.context() as patch:
        step = parity.Published(parity.fixture, patch, device=DEVICE)
        step.total.backward()
    pairs = step.compared_losses(), step.compared_gradients()
    ours, theirs = (tuple({n: p[side].detach().cpu() for n, p in each.items()} for each in pairs) for side in (0, 1))
    return judged(errors(ours, theirs), FLOAT32 | {"gradient_error": gradient_bound})


# --- gradient caching, split backward: in float64, against one batch and one backward on the CPU ----------------------


def one_batch(graph: Callable, parts: int) -> dict:
    """A graph, of so many micro-batches, that must give the losses and gradients of one batch with one backward pass."""
    losses, gradients, _ = fusing.step(0, 1, FUSED, graph=graph, parts=parts, device=torch.device(DEVICE))
    expected, true_gradients, _ = fusing.step(0, 1, FUSED)
    losses, expected = ({n: torch.tensor(loss) for n, loss in each.items()} for each in (losses, expected))
    gradients = {name: gradient.cpu() for name, gradient in gradients.items()}
    return judged(errors((losses, gradients), (expected, true_gradients)), FLOAT64)


# --- draws ---------------------------------------------------------------------------------------------------------


def draws() -> dict:
    """What is drawn on the device itself: how often each hard negative, how many masked words and patches."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    similarity = torch.tensor([0.0, 1.0, 2.0, 3.0], device=DEVICE)
    candidates = torch.tensor([True, True, False, True], device=DEVICE)
    rows = 100_000
    drawn = sample_hard_negatives(similarity.expand(rows, 4), candidates.expand(rows, 4), generator=generator)
    wanted = similarity.masked_fill(~candidates, -torch.inf).softmax(0)
    often = drawn.bincount(minlength=4) / rows
    ids, special = torch.full((200, 100), 50, device=DEVICE), torch.arange(100, device=DEVICE) < 5
    vocabulary = Vocabulary(100, 4, special, torch.zeros_like(special))
    masked = TextMasking(probability=0.15)(ids, torch.ones_like(ids).bool(), vocabulary, generator)
    patches = block_masks(32, (14, 14), 0.4, device=DEVICE, generator=generator)
    found = {
        "negatives_error": float((often - wanted).abs().max()),
        "masked_share_error": abs(len(masked.positions) / ids.numel() - 0.15),
        "patches_error": abs(patches.shape[1] - round(0.4 * 196)) + float((patches.diff(dim=1) <= 0).sum()),
    }
    return judged(found, {"negatives_error": 0.01, "masked_share_error": 0.01, "patches_error": 0})
