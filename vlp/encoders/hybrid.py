"""Transformer layers on the grid of another image tower: the hybrid of Dosovitskiy et al. 2021 (sec. 3.1).

A convolutional tower learns shapes from few images. The layers know where each grid cell is, and so does the pooled token that
contrastive losses read.

B images, H x W pixels, h x w grid, C width of the tower below, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vlp.encoders.activation_checkpointing import Checkpointing, checkpoint_blocks
from vlp.encoders.base import ImageTower, ImageTowerSpec
from vlp.encoders.grid_positions import sine_positions
from vlp.encoders.text import layer_ids
from vlp.errors import UserError
from vlp.specs.fields import check_limits, setting
from vlp.weights import reading
from vlp.weights.reading import Grid
from vlp.weights.run import read_run, tower_spec


@dataclass(frozen=True)
class HybridImage(ImageTowerSpec):
    """Spec of transformer layers on the grid of another image tower.

    Args:
        base: The tower below. ``train.frozen=image.base`` freezes it.
        width: D of the transformer layers and of the tokens.
        layers: Number of pre-norm transformer layers.
        heads: Attention heads.
        weights: A run folder, whose newest image tower is taken. None starts the layers at random, and ``base`` from its own
            weights.
    """

    base: ImageTowerSpec
    width: int = setting(64, least=4)
    layers: int = setting(1, least=1)
    heads: int = setting(4, least=1)
    weights: str | None = None

    def resolved(self) -> HybridImage:
        """Return the same tower with the sizes of ``base`` filled in."""
        return replace(self, base=self.base.resolved())

    def build(self, load_weights: bool = True) -> HybridTower:
        """Build the tower.

        Args:
            load_weights: False leaves the parameters random even where ``weights`` is set.

        Raises:
            UserError: if the sizes do not go together, ``base`` has no grid, or the weights do not fit.
        """
        check_limits(self)
        if self.width % self.heads:
            raise UserError(f"{self.heads} heads do not divide the width {self.width}; set heads to a divisor of it")
        base = self.base.build(load_weights and not self.weights)
        if base.grid is None:
            raise UserError(f"{type(self.base).__name__} has no grid of tokens for further layers; choose another base")
        tower = HybridTower(self, base)
        if load_weights and self.weights:
            tower_spec(self.weights, "image", HybridImage)
            tower.report = reading.load(tower, read_run(self.weights, "image"), grids=tower.position_grids())
        return tower


class HybridTower(ImageTower):
    """A tower, learned 2-D positions that start as sines, transformer layers, and a norm.

    Token 0 is the mean of the others, which are the grid, row by row.

    Args:
        spec: Resolved.
        base: The tower below, with a grid.
    """

    grid: tuple[int, int]

    def __init__(self, spec: HybridImage, base: ImageTower):
        super().__init__()
        self.base, self.width, self.grid, self.preprocess = base, spec.width, base.grid, base.preprocess
        self.report = base.report
        self.projection = nn.Linear(base.width, spec.width)
        self.positions = nn.Parameter(sine_positions(self.grid, spec.width)[None])  # (1, h w, D)
        self.blocks = nn.ModuleList(Block(spec.width, spec.heads, qkv_bias=True) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width)

    def forward(self, image: Tensor) -> Tensor:
        """Return (B, 1 + h w, D) tokens of (B, 3, H, W) normalised images."""
        grid = self.base(image)[:, 1:]  # (B, 1 + h w, C) -> (B, h w, C)
        tokens = self.projection(grid) + self.positions  # (B, h w, D)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)  # (B, 1 + h w, D)

    def position_grids(self) -> dict[str, Grid]:
        """Return the position embeddings: those of the layers, and those of the tower below."""
        below = {f"base.{name}": grid for name, grid in self.base.position_grids().items()}
        return below | {"positions": Grid(self.grid, 0)}

    def layer_ids(self) -> dict[str, int]:
        """Return each parameter's depth: those of the tower below, then the projection, each layer, and the norm."""
        below = {f"base.{name}": depth for name, depth in self.base.layer_ids().items()}
        own = layer_ids(self, r"^blocks\.(\d+)\.", last=["norm."])
        first = max(below.values()) + 1
        return {name: below.get(name, first + depth) for name, depth in own.items()}

    def no_weight_decay(self) -> set[str]:
        """Return the names of positions, and what the tower below names."""
        return {f"base.{name}" for name in self.base.no_weight_decay()} | {"positions"}

    def set_activation_checkpointing(self, mode: Checkpointing) -> None:
        """Switch activation checkpointing of the transformer layers."""
        checkpoint_blocks(self.blocks, mode)
