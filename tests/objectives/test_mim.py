import math
from dataclasses import replace

import pytest
import torch

from vlp.config import Data, Experiment
from vlp.data.reading.shards import Source
from vlp.encoders.image import TimmImage
from vlp.encoders.patch_targets import Pixels, RandomCodes, patchify
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.models.single import Single
from vlp.objectives.masking import block_masks
from vlp.objectives.mim import MaskedImage
from vlp.optim.optimizers import AdamW
from vlp.types import Batch

VIT = TimmImage("test_vit", image_size=(96, 64))  # 6 x 4 patches
OBJECTIVE = MaskedImage(min_patches=4)


def build(mim, image=VIT):
    torch.manual_seed(0)
    return Single(image=image, mim=mim).build().eval()


def images(rows=3, size=(96, 64)):
    return torch.randn(rows, 3, *size, generator=torch.Generator().manual_seed(0))


def bundle(model, image):
    return Forward(model, Batch(torch.arange(len(image)), image))


def run(objective, f, seed=5):
    torch.manual_seed(seed)
    return objective(f)


def masks(rows=3, grid=(6, 4), seed=5):
    """Return the masks that the objective draws with this seed."""
    torch.manual_seed(seed)
    return block_masks(rows, grid, 0.4, 4)


def test_pixel_loss_is_the_mean_squared_error_of_masked_patches():
    model, image = build(Pixels()), images()
    f, drawn = bundle(model, image), masks()
    answers = model.masked_image(f, torch.cat([n * 24 + drawn[n] for n in range(3)])).view(3, -1, 768)
    total = count = 0
    for row in range(3):
        patches = patchify(image, (6, 4))[row]
        for i, patch in enumerate(drawn[row].tolist()):
            pixels = patches[patch]
            wanted = (pixels - pixels.mean()) / (pixels.var() + 1e-6) ** 0.5
            total, count = total + (answers[row, i] - wanted).square().sum().item(), count + 768
    assert count == 3 * 768 * round(0.4 * 24)
    assert run(OBJECTIVE, f).item() == pytest.approx(total / count, rel=1e-5)


def test_code_loss_is_the_cross_entropy_of_masked_patches():
    model, image = build(RandomCodes(codes=40)), images()
    f, drawn = bundle(model, image), masks()
    positions = torch.cat([row * 24 + drawn[row] for row in range(3)])
    chances = model.masked_image(f, positions).softmax(1).tolist()
    codes = model.mim.targets(image).flatten()[positions]
    expected = -sum(math.log(chances[i][code]) for i, code in enumerate(codes.tolist())) / len(codes)
    assert run(OBJECTIVE, f).item() == pytest.approx(expected, rel=1e-5)


def test_masked_patches_enter_the_loss_only_as_targets():
    model, image = build(RandomCodes(codes=40)), images()
    hidden = torch.zeros(3, 24).scatter(1, masks(), 1).view(3, 1, 6, 4)
    hidden = hidden.repeat_interleave(16, 2).repeat_interleave(16, 3)
    model.mim.targets.forward = lambda image: torch.zeros(3, 24, dtype=torch.int64)
    losses = [run(OBJECTIVE, bundle(model, image + shift * hidden)).item() for shift in (0, 3)]
    assert losses[0] == losses[1] != run(OBJECTIVE, bundle(model, image + 3 * (1 - hidden))).item()


def test_every_parameter_has_a_gradient_also_with_pooling_before_the_norm():
    towers = (VIT, TimmImage("vit_wee_patch16_reg1_gap_256", image_size=64))
    for tower, size in zip(towers, ((96, 64), (64, 64))):
        model = build(Pixels(), tower)
        run(OBJECTIVE, bundle(model, images(size=size))).backward()
        assert {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()


def test_training_memorises_one_image():
    model, image = build(RandomCodes(codes=40)).train(), images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = run(OBJECTIVE, bundle(model, image)).item()
    for seed in range(40):
        optimizer.zero_grad()
        run(OBJECTIVE, bundle(model, image), seed).backward()
        optimizer.step()
    assert run(OBJECTIVE, bundle(model, image)).item() < before / 2


def test_validate_names_the_missing_setting():
    def experiment(model, **more):
        objectives = {"mim": MaskedImage(**more)}
        return Experiment(name="x", model=model, objectives=objectives, data=Data(train=(Source("s"),)), optim=AdamW())

    model = Single(image=VIT, mim=Pixels())
    for wrong, complaint in (
        (experiment(Single(text=BertText(config={"model_type": "bert"}))), "needs an image tower"),
        (experiment(replace(model, mim=None)), "set model.mim"),
    ):
        with pytest.raises(UserError, match=complaint):
            wrong.objectives["mim"].validate(wrong)
    right = experiment(model)
    right.objectives["mim"].validate(right)
