"""The tensors that travel together.

B batch, N tokens, P image tokens, L text tokens, D width, E embedding, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Answers:
    """What is to be said of the samples of a batch: any number of answers for each, in the order of the samples.

    Args:
        input_ids: (n, L) int64, from ``[CLS]`` to ``[SEP]``, padded to the longest.
        attention_mask: (n, L) bool.
        weight: (n,) float32 of the answer within its question.
        row: (n,) int64 of its question in the batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    weight: Tensor
    row: Tensor

    def to(self, device: torch.device) -> Answers:
        return Answers(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


@dataclass
class Batch:
    """What one step of one process sees; what a run has not is None.

    Args:
        image_id: (B,) int64; rows with an equal image_id show the same image and are positives of each other.
        image: (B, 3, H, W) uint8 as it leaves the loader; float32 and normalised once `Preprocess.normalise` has run.
        input_ids: (B, L) int64, padded to the longest row of the batch.
        attention_mask: (B, L) bool, True where there is a token.
        labels: (B,) int64 class.
        targets: (B, C) float32 share of each class, where more than one may be true; see `vlp.losses.classification`.
        answers: to the questions that the texts are.
        dataset_row: (B,) int64 number of the sample among all samples of the run's sources, from 0: its slot in a bank.
        views: further views of the same samples (a second crop, a paraphrase, a hard negative, NLVR2's second
            picture), in the order of the data.
        keys: B names ``source/number/key`` (the sample's number within its source) for logs and error messages; they never reach a device.
    """

    image_id: Tensor
    image: Tensor | None = None
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    labels: Tensor | None = None
    targets: Tensor | None = None
    answers: Answers | None = None
    dataset_row: Tensor | None = None
    views: tuple[Batch, ...] = ()
    keys: Sequence[str] = ()

    def to(self, device: torch.device) -> Batch:
        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            return value.to(device) if isinstance(value, Answers) else value

        views = tuple(view.to(device) for view in self.views)
        moved = {f.name: move(getattr(self, f.name)) for f in fields(self)}
        return Batch(**moved | {"views": views})

    def __len__(self) -> int:
        return len(self.image_id)


@dataclass(frozen=True)
class Vocabulary:
    """What masking has to know of a tokenizer.

    Args:
        size: V.
        mask_id: of ``[MASK]``; None where the tokenizer has none.
        special: (V,) bool, True for ``[PAD]``, ``[CLS]`` and their like: never masked, never drawn.
        continues: (V,) bool, True for a piece that goes on with the word of the piece before it (``##ing``).
    """

    size: int
    mask_id: int | None
    special: Tensor
    continues: Tensor

    def to(self, device: torch.device) -> Vocabulary:
        return replace(self, special=self.special.to(device), continues=self.continues.to(device))


@dataclass
class Encoded:
    """One modality after its tower.

    Args:
        tokens: (B, N, D) last hidden states, the pooled token first; that one alone where there are ``inputs``.
        mask: (B, N) bool, True where there is a token, of ``inputs`` where there are any.
        embed: (B, E) unit-norm projection.
        inputs: (B, N, D) tokens before the first layer, which early-fusion models fuse; None elsewhere.
        vl: the same by a second head; None where there is none.
        unnormalised: (B, E) the output of the projection head before normalisation; None if the model does not give it.
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
        """(B, N, D) what is fused with the other modality."""
        return self.tokens if self.inputs is None else self.inputs

    def __getitem__(self, rows: Tensor | slice) -> Encoded:
        parts = {name: part[rows] for name, part in vars(self).items() if part is not None}
        return Encoded(**parts)


@dataclass
class MaskedIds:
    """Texts in which some tokens are to be predicted.

    Args:
        input_ids: (B, L) int64 as the model sees them.
        positions: (M,) int64 of the predicted tokens in the flattened (B * L), ascending.
        labels: (M,) int64 their true ids, or -100 where a position only fills up to a fixed M; it is 0 then.
    """

    input_ids: Tensor
    positions: Tensor
    labels: Tensor
