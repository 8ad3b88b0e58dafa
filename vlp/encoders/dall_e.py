"""DALL-E's image tokenizer (Ramesh et al. 2021, app. A.2), whose codes BEiT was trained to predict.

B images, h x w codes for 8 x 8 pixels each, K = 8192 codes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.data.preprocess import Preprocess
from vlp.encoders.base import PatchTower
from vlp.encoders.patch_targets import Frozen
from vlp.errors import UserError
from vlp.weights import reading

EPSILON = 0.1  # of its logit-Laplace distribution: pixels are mapped to [0.1, 0.9]


@dataclass(frozen=True)
class DallE:
    """Prediction targets: the codes of DALL-E's discrete autoencoder, one for each patch of the tower's grid.

    Args:
        weights: File with the encoder's tensors. OpenAI's encoder.pkl is a pickled module, which is never unpickled here. If
            you trust it, convert it once:
            ``torch.save(torch.load("encoder.pkl", weights_only=False).state_dict(), "encoder.pt")``.
        codes: K.
        size: Channels of the first group, 256 in the published encoder.
    """

    weights: str | None = None
    codes: int = 8192
    size: int = 256

    def build(self, tower: PatchTower, load_weights: bool = True) -> DallETokenizer:
        """Build the tokenizer.

        Raises:
            UserError: if ``weights`` is missing or does not fit. The codes of a random encoder are worse than `RandomCodes`.
        """
        tokenizer = DallETokenizer(self, tower.grid, tower.preprocess)
        if load_weights:
            if not self.weights:
                raise UserError("DALL-E's tokenizer needs its weights; set model.mim.weights, or mim=RandomCodes()")
            state = reading.read_weights(self.weights)
            reading.load(tokenizer, {_own_name(key): value for key, value in state.items()})
        return tokenizer


def _own_name(key: str) -> str:
    """Translate OpenAI's names: ``blocks.group_1.block_2.res_path.conv_3.w`` is ``groups.0.1.convs.2.weight`` here."""
    key = re.sub(r"\bw$", "weight", re.sub(r"\bb$", "bias", key.removeprefix("blocks.")))
    key = re.sub(r"group_(\d)\.block_(\d)", lambda m: f"groups.{int(m[1]) - 1}.{int(m[2]) - 1}", key)
    key = re.sub(r"res_path\.conv_(\d)", lambda m: f"convs.{int(m[1]) - 1}", key)
    return key.replace("id_path", "shortcut").replace("output.conv", "output")


class Block(nn.Module):
    """Residual block ``x + g f(x)``. f has four convolutions with a ReLU in front of each.

    Args:
        width_in: Input channels.
        width: Output channels.
        gain: g.
    """

    def __init__(self, width_in: int, width: int, gain: float):
        super().__init__()
        inner = width // 4
        self.gain = gain
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()
        widths = [(width_in, inner, 3), (inner, inner, 3), (inner, inner, 3), (inner, width, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, side, padding=side // 2) for a, b, side in widths)

    def forward(self, x: Tensor) -> Tensor:
        inner = x
        for conv in self.convs:
            inner = conv(F.relu(inner))
        return self.shortcut(x) + self.gain * inner


class DallETokenizer(Frozen):
    """Four groups of two blocks. The width doubles and the resolution halves between groups.

    Args:
        spec: Sizes.
        grid: (h, w) of the codes.
        preprocess: Normalisation of the images, which the tokenizer undoes.
    """

    def __init__(self, spec: DallE, grid: tuple[int, int], preprocess: Preprocess):
        super().__init__()
        self.grid, self.preprocess, self.width = tuple(grid), preprocess, spec.codes
        widths = [spec.size, *(spec.size * 2**n for n in range(4))]
        gain = 1 / 8**2  # 8 blocks
        self.input = nn.Conv2d(3, spec.size, 7, padding=3)
        self.groups = nn.ModuleList(
            nn.Sequential(Block(a, b, gain), Block(b, b, gain)) for a, b in zip(widths, widths[1:])
        )
        self.output = nn.Conv2d(widths[-1], spec.codes, 1)
        self.requires_grad_(False).train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Return (B, h w) int64 codes of (B, 3, H, W) images that are normalised for the tower."""
        mean, std = (
            torch.tensor(v, device=image.device).view(3, 1, 1) for v in (self.preprocess.mean, self.preprocess.std)
        )
        size = (8 * self.grid[0], 8 * self.grid[1])
        pixels = F.interpolate(image * std + mean, size, mode="bicubic", antialias=True).clamp(0, 1)  # (B, 3, 8 h, 8 w)
        x = self.input((1 - 2 * EPSILON) * pixels + EPSILON)
        for n, group in enumerate(self.groups):
            x = group(F.max_pool2d(x, 2) if n else x)
        return self.output(F.relu(x)).argmax(1).flatten(1)  # (B, K, h, w) -> (B, h w)
