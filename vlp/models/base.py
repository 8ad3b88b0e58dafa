"""The contract of a model: what training, objectives and tasks call."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from vlp.types import Batch, Encoded


class Encodings(Protocol):
    """The part of `vlp.forward.Forward` that models read: the batch and the encodings of its images and texts."""

    batch: Batch

    @property
    def image(self) -> Encoded: ...
    @property
    def text(self) -> Encoded: ...
    @property
    def images(self) -> tuple[Encoded, ...]: ...
    @property
    def projected(self) -> Any: ...
    @property
    def fused(self) -> Tensor: ...
