import torch

from vlp.encoders.image import TimmImage
from vlp.encoders.patch_targets import Pixels, RandomCodes, patchify

SIZE = (32, 64)


def tower():
    return TimmImage("test_vit", image_size=SIZE).build()


def image(seed=0):
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def test_patches_are_cut_row_by_row_and_pixel_by_pixel():
    pixels, patches = image(), patchify(image(), (2, 4))
    assert patches.shape == (2, 8, 16 * 16 * 3)
    for n in range(8):
        y, x = 16 * (n // 4), 16 * (n % 4)
        expected = [pixels[1, c, y + i, x + j] for i in range(16) for j in range(16) for c in range(3)]
        assert torch.equal(patches[1, n], torch.stack(expected))


def test_pixels_are_normalised_patch_by_patch_as_mae_does():
    targets = Pixels().build(tower())
    assert targets.width == 768
    patches = patchify(image(), (2, 4))
    found = targets(image())
    for n in range(8):
        values = patches[1, n].tolist()
        mean = sum(values) / 768
        variance = sum((v - mean) ** 2 for v in values) / 767  # unbiased, as in torch and MAE
        expected = torch.tensor([(v - mean) / (variance + 1e-6) ** 0.5 for v in values])
        torch.testing.assert_close(found[1, n], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(Pixels(normalise=False).build(tower())(image()), patches)
    assert targets(torch.full((1, 3, *SIZE), 0.7)).abs().max() < 1e-3  # constant patches


def test_random_codes_are_the_nearest_rows_and_survive_a_state_dict():
    torch.manual_seed(0)
    spec, net = RandomCodes(codes=50, size=6), tower()
    targets = spec.build(net)
    codes = targets(image())
    assert codes.shape == (2, 8) and codes.dtype == torch.int64 and targets.width == 50
    assert len(codes.unique()) > 3 and codes.max() < 50
    projected = torch.nn.functional.normalize(Pixels().build(net)(image()) @ targets.projection, dim=-1)
    distances = torch.cdist(projected.flatten(0, 1), targets.codebook)
    assert torch.equal(codes.flatten(), distances.argmin(1))
    again = spec.build(net)
    assert not torch.equal(again(image()), codes)
    again.load_state_dict(targets.state_dict())
    assert torch.equal(again(image()), codes)
    # brightness and contrast of an image do not change its codes
    assert torch.equal(targets(2 * image() + 1), codes)


def test_targets_are_frozen():
    for spec in (Pixels(), RandomCodes(codes=50)):
        targets = spec.build(tower()).train()
        assert not targets.training and not any(p.requires_grad for p in targets.parameters())
        assert not targets(image().requires_grad_()).requires_grad
