import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from vlp.encoders.dall_e import DallE
from vlp.encoders.image import TimmImage
from vlp.errors import UserError

TOWER = TimmImage("test_vit", image_size=(48, 64), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))  # 3 x 4 patches
CHANNELS, CODES = 16, 30


def published_state():
    """Random tensors under OpenAI's names."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def conv(name, a, b, side):
        state[f"{name}.w"] = torch.randn(b, a, side, side, generator=generator) * (a * side**2) ** -0.5
        state[f"{name}.b"] = torch.randn(b, generator=generator) * 0.1

    conv("blocks.input", 3, CHANNELS, 7)
    width = CHANNELS
    for group in range(1, 5):
        out = CHANNELS * 2 ** (group - 1)
        for block in (1, 2):
            name = f"blocks.group_{group}.block_{block}"
            if width != out:
                conv(f"{name}.id_path", width, out, 1)
            conv(f"{name}.res_path.conv_1", width, out // 4, 3)
            conv(f"{name}.res_path.conv_2", out // 4, out // 4, 3)
            conv(f"{name}.res_path.conv_3", out // 4, out // 4, 3)
            conv(f"{name}.res_path.conv_4", out // 4, out, 1)
            width = out
    conv("blocks.output.conv", width, CODES, 1)
    return state


def published_codes(state, pixels):
    """The published encoder, written down tensor by tensor."""

    def conv(x, name):
        return F.conv2d(x, state[f"{name}.w"], state[f"{name}.b"], padding=state[f"{name}.w"].shape[-1] // 2)

    x = conv(0.8 * pixels + 0.1, "blocks.input")
    for group in range(1, 5):
        for block in (1, 2):
            name = f"blocks.group_{group}.block_{block}"
            inner = x
            for n in range(1, 5):
                inner = conv(inner.relu(), f"{name}.res_path.conv_{n}")
            x = (conv(x, f"{name}.id_path") if f"{name}.id_path.w" in state else x) + inner / 64
        x = F.max_pool2d(x, 2) if group < 4 else x
    return conv(x.relu(), "blocks.output.conv").argmax(1)


def test_codes_equal_those_of_the_published_encoder(tmp_path):
    state = published_state()
    save_file(state, tmp_path / "encoder.safetensors")
    spec = DallE(str(tmp_path / "encoder.safetensors"), CODES, CHANNELS)
    tokenizer = spec.build(TOWER.build()).train()
    assert tokenizer.width == CODES and not tokenizer.training
    assert not any(p.requires_grad for p in tokenizer.parameters())
    # the tokenizer sees 8 x 8 pixels per code, half the tower's 16: here every second pixel repeats the one before
    small = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(1))
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    mean, std = torch.tensor(TOWER.mean).view(3, 1, 1), torch.tensor(TOWER.std).view(3, 1, 1)
    seen = F.interpolate(large, (24, 32), mode="bicubic", antialias=True).clamp(0, 1)
    codes = tokenizer((large - mean) / std)
    assert codes.shape == (2, 12) and len(codes.unique()) > 2
    assert torch.equal(codes, published_codes(state, seen).flatten(1))


def test_weights_are_required_unless_a_checkpoint_follows():
    with pytest.raises(UserError, match="needs its weights"):
        DallE().build(TOWER.build())
    spec = DallE(codes=CODES, size=CHANNELS)
    assert spec.build(TOWER.build(), load_weights=False).width == CODES
