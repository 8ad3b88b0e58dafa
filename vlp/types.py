"""Tensors that travel together.

B batch, N tokens, P image tokens, L text tokens, D width, E embedding, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def keep_host_copy(tensor: Tensor, host: np.ndarray) -> Tensor:
    """Attach the values of ``tensor`` on the host, which `on_host` returns without waiting for the device."""
    tensor.host_copy = host  # type: ignore[attr-defined]
    return tensor


def on_host(tensor: Tensor) -> np.ndarray:
    """Return the values of a tensor on the host.

    The texts of a batch keep a copy on the host, see `Batch.to`. Reading any other tensor costs one host-device sync.
    """
    copy = vars(tensor).get("host_copy")
    return tensor.detach().cpu().numpy() if copy is None else copy


@contextmanager
def computing_on_host() -> Iterator[None]:
    """Compute with values on the host, as a context or a decorator, even while a step is traced with tensors that have none."""
    with _disable_current_modes():
        yield


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, asynchronously if its memory is pinned. Small ones keep a copy on the host."""
    moved = tensor.to(device, non_blocking=True)
    if tensor.dim() > 2:
        return moved
    copy = tensor.numpy() if tensor.device.type == "cpu" else vars(tensor).get("host_copy")
    return moved if copy is None else keep_host_copy(moved, copy)


@dataclass
class Answers:
    """Answers to the questions of a batch: any number for each question, in the order of the questions.

    Args:
        input_ids: (n, L) int64, from ``[CLS]`` to ``[SEP]``, padded to the longest.
        attention_mask: (n, L) bool.
        weight: (n,) float32 weight of the answer within its question.
        row: (n,) int64 row of its question in the batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    weight: Tensor
    row: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Answers:
        """Return the answers with a function applied to each tensor."""
        return Answers(**{name: function(tensor) for name, tensor in vars(self).items()})


@dataclass
class Batch:
    """The samples of one micro-batch of one process. Inputs that a run does not have are None.

    Args:
        image_id: (B,) int64. Rows with equal ids show the same image and are positives of each other.
        image: (B, 3, H, W) uint8 from the loader; float32 and normalised after `Preprocess.normalise`.
        input_ids: (B, L) int64, padded to the longest row of the batch.
        attention_mask: (B, L) bool, True for tokens, False for padding.
        labels: (B,) int64 class.
        targets: (B, C) float32 share of each class, if more than one may be true; see `vlp.losses.classification`.
        answers: Answers to the texts, which are questions.
        dataset_row: (B,) int64 number of the sample among all samples of the run's sources, from 0: its row in a memory
            bank.
        views: Further views of the same samples (a second crop, a paraphrase, a hard negative, NLVR2's second image), in
            the order of the data.
        keys: B names ``source/number/key``, the number within the source, for logs and error messages. They stay on the
            host.
    """

    image_id: Tensor
    # Typed as present: whoever reads an input has checked in `validate` that the run has it.
    image: Tensor = None  # type: ignore[assignment]
    input_ids: Tensor = None  # type: ignore[assignment]
    attention_mask: Tensor = None  # type: ignore[assignment]
    labels: Tensor = None  # type: ignore[assignment]
    targets: Tensor | None = None
    answers: Answers = None  # type: ignore[assignment]
    dataset_row: Tensor = None  # type: ignore[assignment]
    views: tuple[Batch, ...] = ()
    keys: Sequence[str] = ()

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device. The copy is asynchronous if the memory is pinned.

        All but images keep a copy on the host, see `on_host`.
        """
        return self.map(lambda tensor: _move(tensor, device))

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with a function applied to each tensor, also of the views and the answers."""

        def mapped(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            return value.map(function) if isinstance(value, Answers) else value

        views = tuple(view.map(function) for view in self.views)
        return Batch(**{name: mapped(value) for name, value in vars(self).items()} | {"views": views})

    def __len__(self) -> int:
        return len(self.image_id)


@dataclass(frozen=True)
class Vocabulary:
    """What objectives need to know about a tokenizer.

    Args:
        size: V.
        mask_id: Id of ``[MASK]``, or None if the tokenizer has no such token.
        special: (V,) bool, True for ``[PAD]``, ``[CLS]`` and other special tokens, which are never masked or drawn.
        continues: (V,) bool, True for a piece that continues the word of the piece before it (``##ing``).
        pieces: Returns the ids of a word as it is written within a text, empty if the tokenizer cannot spell it. None where
            there is no tokenizer.
    """

    size: int
    mask_id: int | None
    special: Tensor
    continues: Tensor
    pieces: Callable[[str], tuple[int, ...]] | None = None

    def to(self, device: torch.device) -> Vocabulary:
        return replace(self, special=_move(self.special, device), continues=_move(self.continues, device))

    def on_host(self) -> Vocabulary:
        special, continues = (torch.from_numpy(on_host(x)) for x in (self.special, self.continues))
        return replace(self, special=special, continues=continues)


@dataclass
class Encoded:
    """One modality after its tower.

    Args:
        tokens: (B, N, D) last hidden states, the pooled token first. Only the pooled token if there are ``inputs``.
        mask: (B, N) bool, True for tokens, False for padding; of ``inputs`` if there are any.
        embed: (B, E) projection of unit norm.
        inputs: (B, N, D) tokens before the first layer, which early-fusion models fuse. None for other models.
        vl: The same through a second contrastive head, or None.
        unnormalised: (B, E) output of the projection head before normalisation, or None if the model does not give it.
    """

    tokens: Tensor
    mask: Tensor
    embed: Tensor
    inputs: Tensor | None = None
    vl: Encoded | None = None
    unnormalised: Tensor | None = None

    @property
    def projection(self) -> Tensor:
        """(B, E) output of the projection head before normalisation, of which ``embed`` is the unit vector."""
        if self.unnormalised is None:
            raise ValueError("the model gives only unit-norm embeddings; set Encoded.unnormalised where it encodes")
        return self.unnormalised

    @property
    def fusible(self) -> Tensor:
        """(B, N, D) tokens that are fused with the other modality."""
        return self.tokens if self.inputs is None else self.inputs

    def __getitem__(self, rows: Tensor | slice) -> Encoded:
        return Encoded(**{name: part if part is None else part[rows] for name, part in vars(self).items()})


@dataclass
class MaskedIds:
    """Texts in which some tokens are to be predicted.

    Args:
        input_ids: (B, L) int64 that the model reads.
        positions: (M,) int64 of the predicted tokens in the flattened (B * L), ascending.
        labels: (M,) int64 true ids. -100 where a position only fills up to a fixed M; that position is 0.
    """

    input_ids: Tensor
    positions: Tensor
    labels: Tensor
